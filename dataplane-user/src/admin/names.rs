//! The file that tells which service port has which id, for the command line: a BPF file system holds no files.
//!
//! The agent writes it whole and at once whenever a service port comes or goes. Nothing depends on it but what people read,
//! and only root reads it: so it is with the maps, and names of Services are not every local user's business.

use crate::compile::ServicePortName;
use crate::status::local;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind::NotFound, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Where the files lie, in a folder for each pin folder. It is gone after a reboot, as the pins are.
pub const RUN_FOLDER: &str = "/run/portolan";

/// Names of service ports (`namespace/name:port`) by their ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Names(BTreeMap<u32, String>);

/// The file that belongs to a pin folder: the folder's path with `/` as `-`, and `-` as `\x2d`.
pub fn path(bpffs: &Path) -> PathBuf {
    let bpffs = fs::canonicalize(bpffs).or_else(|_| std::path::absolute(bpffs)).unwrap_or(bpffs.to_owned());
    let escaped = bpffs.to_string_lossy().trim_matches('/').replace('-', "\\x2d").replace('/', "-");
    Path::new(RUN_FOLDER).join(escaped).join("names.json")
}

/// Makes the folder of a file that only root may read.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    let make = || {
        path.parent().map_or(Ok(()), |folder| {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            // One that an earlier version made.
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
        })
    };
    // Another agent's cleanup may remove the folder above at any moment in which it is empty.
    make().or_else(|error| if error.kind() == NotFound { make() } else { Err(error) })
}

impl Names {
    /// The names of [`crate::sync::Mirror::names`].
    pub fn new<'a>(names: impl IntoIterator<Item = (u32, &'a ServicePortName)>) -> Self {
        Self(names.into_iter().map(|(id, name)| (id, name.to_string())).collect())
    }

    /// The names that belong to a pin folder; none if the file is missing or cannot be read.
    pub fn read(bpffs: &Path) -> Self {
        let text = fs::read(path(bpffs)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Writes the file that belongs to a pin folder. Readers see the old one or the new one.
    ///
    /// # Errors
    /// If the folder or the file cannot be written.
    pub fn write(&self, bpffs: &Path) -> io::Result<()> {
        self.write_to(&path(bpffs))
    }

    fn write_to(&self, path: &Path) -> io::Result<()> {
        make_folder(path)?;
        let new = path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }

    /// Removes the file that belongs to a pin folder, the socket beside it, their folder, and the one above if nobody else has a file there.
    pub fn remove(bpffs: &Path) {
        let path = path(bpffs);
        // What cannot be removed does no harm: it is read only together with pinned maps.
        let _ = fs::remove_file(&path);
        let _ = fs::remove_file(local::path(bpffs));
        let _ = path.parent().map(fs::remove_dir);
        let _ = fs::remove_dir(RUN_FOLDER);
    }

    /// The ids of a service port (`namespace/name:port`), one for each IP family, or of all ports of a Service.
    pub fn ids(&self, wanted: &str) -> Vec<u32> {
        self.0.iter().filter(|(_, name)| is_of(name, wanted)).map(|(id, _)| *id).collect()
    }

    /// The name of an id, else the id itself.
    pub fn name(&self, id: u32) -> String {
        self.0.get(&id).cloned().unwrap_or_else(|| format!("#{id}"))
    }
}

/// Whether a service port (`namespace/name:port`) is the one that is wanted, or a port of the Service that is (`namespace/name`).
pub fn is_of(service_port: &str, wanted: &str) -> bool {
    service_port == wanted || service_port.split_once(':').is_some_and(|(service, _)| service == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectName;

    #[test]
    fn names_come_back_from_their_file_and_others_are_ids() {
        let port = ServicePortName {
            service: ObjectName::new("default", "web"),
            port: "http".into(),
            proto: 6,
            ipv6: false,
        };
        let folder = std::env::temp_dir().join(format!("portolan-names-{}", std::process::id()));
        let file = folder.join("names.json");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("names.new"), "half of an earlier version's, for everybody to read").unwrap();
        Names::new([(7, &port)]).write_to(&file).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(&folder)), (0o600, 0o700));
        let names: Names = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        fs::remove_dir_all(folder).unwrap();
        assert_eq!((names.name(7).as_str(), names.name(8).as_str()), ("default/web:http", "#8"));
    }

    #[test]
    fn each_pin_folder_has_a_file_of_its_own() {
        let file = |bpffs: &str| path(Path::new(bpffs)).to_string_lossy().into_owned();
        assert_eq!(file("/no/such-pins"), "/run/portolan/no-such\\x2dpins/names.json");
        assert_ne!(file("/no/such-pins"), file("/no/such/pins"));
    }
}
