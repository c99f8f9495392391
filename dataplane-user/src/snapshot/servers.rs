//! Where API servers were found before, kept on disk: a Portolan that starts must reach one before the Services of the cluster
//! work, the API server's own among them.
//!
//! Not trusted: whoever is asked must prove by the cluster's CA that it is one.

use crate::model::{EndpointSlice, ObjectName, Store};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Who says where an API server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The endpoints of the Service `default/kubernetes`, as they were last.
    Endpoints,
    /// The kubelet's kubeconfig.
    Kubelet,
}

impl Source {
    /// The file of its servers in the state folder.
    pub(super) const fn file(self) -> &'static str {
        match self {
            Self::Endpoints => "api-servers",
            Self::Kubelet => "api-servers.kubelet",
        }
    }
}

/// What was written, one in each line; nothing if there is no such file or it cannot be read.
pub fn read(folder: &Path, source: Source) -> Vec<String> {
    let text = fs::read_to_string(folder.join(source.file())).unwrap_or_default();
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Replaces what was written.
///
/// # Errors
/// If the folder or the file cannot be written; the old file is then still there.
pub fn write(folder: &Path, source: Source, servers: &[String]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let (path, new) = (folder.join(source.file()), folder.join(format!("{}.new", source.file())));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(servers.iter().map(|server| format!("{server}\n")).collect::<String>().as_bytes())?;
    file.sync_all()?;
    fs::rename(new, path)
}

/// The API servers that a cluster's own Service has as endpoints, in order; empty if nothing is known of it.
pub fn of(store: &Store) -> Vec<String> {
    let slices = store.slices(&ObjectName::new("default", "kubernetes"));
    let mut servers: Vec<_> = slices.iter().flat_map(of_slice).map(|server| server.to_string()).collect();
    servers.sort();
    servers.dedup();
    servers
}

fn of_slice(slice: &EndpointSlice) -> impl Iterator<Item = SocketAddr> {
    let port = slice.ports.first().map(|port| port.port);
    let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
    ready.filter_map(move |endpoint| Some(SocketAddr::new(endpoint.address, port?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::samples::{endpoint, slice};
    use crate::model::{Change, Object};

    #[test]
    fn the_endpoints_of_the_api_servers_own_service_come_back_from_their_file() {
        let mut store = Store::new("n1");
        assert!(of(&store).is_empty());
        let endpoints = vec![endpoint("192.168.0.3", "n1"), endpoint("192.168.0.2", "n1")];
        let own = slice("kubernetes", "kubernetes", endpoints);
        let port = own.ports[0].port;
        store.apply(Change::Applied(Object::EndpointSlice(own)));
        let servers = of(&store);
        assert_eq!(servers, [format!("192.168.0.2:{port}"), format!("192.168.0.3:{port}")]);

        let folder = std::env::temp_dir().join(format!("portolan-servers-{}", std::process::id()));
        assert!(read(&folder, Source::Endpoints).is_empty(), "nothing was written yet");
        write(&folder, Source::Endpoints, &servers).unwrap();
        assert_eq!(read(&folder, Source::Endpoints), servers);
        assert!(read(&folder, Source::Kubelet).is_empty(), "each source has a file of its own");
        fs::remove_dir_all(folder).unwrap();
    }
}
