//! The Kubernetes API: one watch for each kind, with the rights of the role `system:node-proxier`.
//!
//! Needs to list and watch services, endpointslices, nodes and servicecidrs, and to create events; does without
//! servicecidrs and events where they are refused. An API server that is away, slow or refuses us costs nothing that
//! was known: the watch is tried again, ever more slowly, and after a gap everything is listed anew. Certificates, keys
//! and addresses are read again when they change.
//!
//! What is asked for is JSON: the few fields that are read of each object are found without building the others.

mod access;
mod failure;
mod follow;
mod kubeconfig;
mod listing;
mod pause;
mod proxy;
mod seen;
mod servers;

use super::objects::{
    HEADLESS_LABEL, PROXY_NAME_LABEL, WrittenEndpointSlice, WrittenNode, WrittenService, WrittenServiceCidr,
};
use super::{Changes, Events, Options, Status, Watch};
use crate::causes::causes;
pub(super) use access::Access;
use follow::{Following, follow};
use kube::config::Kubeconfig;
pub use servers::{Answered, ApiServer, Servers};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What cannot be done without, and where it is.
const NEEDED: [(&str, &str); 3] = [
    ("services", "/api/v1/services"),
    ("endpointslices", "/apis/discovery.k8s.io/v1/endpointslices"),
    ("nodes", "/api/v1/nodes"),
];

/// How long a connection may be silent. An API server sends bookmarks about once a minute.
const SILENCE: Duration = Duration::from_secs(90);

/// Why there is nothing to watch. What goes wrong later is in the [`Status`].
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {}: {reason}: check the file, its context, and the files it names", file.display())]
    Kubeconfig {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// No kubeconfig, and not in a pod of the cluster.
    #[error("no service account of a pod ({reason}): give --kubeconfig FILE or --manifests DIR")]
    NotInCluster {
        /// What is missing.
        reason: String,
    },
    /// A proxy that is none. What it is is not said: a password may be in it.
    #[error("{name} is no proxy such as http://proxy.example:3128 or socks5://proxy.example:1080")]
    Proxy {
        /// Where it was named.
        name: &'static str,
    },
    /// No client can be made of the configuration.
    #[error("no client for {server}: {reason}: check the certificates and the token")]
    Client {
        /// The API server.
        server: String,
        /// Why.
        reason: String,
    },
}

/// Watches the API server that `kubeconfig` names; without one, that of the cluster in which this is a pod, which is looked for.
/// Servers that were named come before both.
///
/// Does not wait for the API server: it may come later.
pub async fn watch(
    kubeconfig: Option<&Path>,
    servers: Servers,
    options: Options,
    changes: impl Into<Changes>,
) -> Result<Watch, ClusterError> {
    let access = Access::open(kubeconfig, servers).await?;
    let server = access.session().await.server;
    tracing::info!(server = &*server, "watching the Kubernetes API");
    Ok(start(access, options, changes))
}

/// What an API server answers.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Where it is.
    pub server: String,
    /// Its version.
    pub version: String,
    /// What it does not let this account list.
    pub denied: Vec<&'static str>,
}

/// Asks the API server what [`watch`] would follow, once, for its version and for a single object of each kind.
///
/// # Errors
/// If it cannot be reached, or the credentials cannot be used.
pub async fn ask(kubeconfig: Option<&Path>, servers: Servers) -> Result<Answer, ClusterError> {
    let found = servers.found.clone();
    let session = Access::open(kubeconfig, servers).await?.session().await;
    let failed = |error: kube::Error| ClusterError::Client {
        server: session.server.to_string(),
        reason: causes(&error),
    };
    let version = session.client.apiserver_version().await.map_err(failed)?.git_version;
    let mut denied = Vec::new();
    for (resource, path) in NEEDED {
        let request = http::Request::get(format!("{path}?limit=1")).body(Vec::new());
        let Ok(request) = request else { continue };
        match session.client.request::<serde_json::Value>(request).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 403 => denied.push(resource),
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(Answer { server: found.get().unwrap_or_else(|| session.server.to_string()), version, denied })
}

/// The API servers that a kubeconfig names; none if there is no such file.
///
/// # Errors
/// If it is there and cannot be read.
pub fn servers_of(kubeconfig: &Path) -> Result<Vec<String>, ClusterError> {
    if !kubeconfig.exists() {
        return Ok(Vec::new());
    }
    let read = Kubeconfig::read_from(kubeconfig)
        .map_err(|error| ClusterError::Kubeconfig { file: kubeconfig.to_owned(), reason: causes(&error) })?;
    let clusters = read.clusters.into_iter().filter_map(|cluster| cluster.cluster?.server);
    Ok(clusters.collect())
}

fn start(access: Access, options: Options, changes: impl Into<Changes>) -> Watch {
    let changes = changes.into();
    let status = Status::default();
    let (events, publisher) = Events::to(access.clone(), &options.node_name);
    let following = |labels: Option<String>, fields: Option<String>| Following {
        access: access.clone(),
        labels,
        fields,
        changes: changes.clone(),
        status: status.clone(),
    };
    let own_node = format!("metadata.name={}", options.node_name);
    let tasks = vec![
        tokio::spawn(follow::<WrittenNode>(following(None, Some(own_node)))),
        tokio::spawn(follow::<WrittenServiceCidr>(following(None, None))),
        tokio::spawn(follow::<WrittenService>(following(Some(services(&options)), None))),
        tokio::spawn(follow::<WrittenEndpointSlice>(following(Some(format!("!{HEADLESS_LABEL}")), None))),
        tokio::spawn(publisher),
    ];
    Watch { status, events, tasks }
}

/// The label selector of F2.
fn services(options: &Options) -> String {
    match &options.service_proxy_name {
        None => format!("!{PROXY_NAME_LABEL}"),
        Some(name) => format!("{PROXY_NAME_LABEL}={name}"),
    }
}

#[cfg(test)]
mod tests;
