//! The Kubernetes API: one watch for each kind, with the rights of the role `system:node-proxier`.
//!
//! Needs to list and watch services, endpointslices, nodes and servicecidrs, and to create events; does without
//! servicecidrs and events where they are refused. An API server that is away, slow or refuses us costs nothing that
//! was known: the watch is tried again, ever more slowly, and after a gap everything is listed anew.

mod failure;
mod follow;
mod seen;
mod servers;

use super::objects::{
    HEADLESS_LABEL, PROXY_NAME_LABEL, WrittenEndpointSlice, WrittenNode, WrittenService, WrittenServiceCidr,
};
use super::{Changes, Events, Options, Status, Watch};
use crate::causes::causes;
use follow::{Following, follow};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
pub use servers::{ApiServer, Servers};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    let mut config = match kubeconfig {
        Some(file) => from_file(file).await?,
        None => Config::incluster().map_err(|error| ClusterError::NotInCluster { reason: causes(&error) })?,
    };
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    // The watches try again themselves, and say why.
    config.default_retry = false;
    let server = config.cluster_url.to_string();
    // Whether the certificates and the token can be used does not hang on the server.
    let client = Client::try_from(config.clone())
        .map_err(|error| ClusterError::Client { server: server.clone(), reason: causes(&error) })?;
    if kubeconfig.is_some() && servers.named.is_empty() {
        tracing::info!(server, "watching the Kubernetes API");
        return Ok(start(client, server, options, changes));
    }
    Ok(start(servers::client(config, servers), "the API server".into(), options, changes))
}

async fn from_file(file: &Path) -> Result<Config, ClusterError> {
    let failed =
        |error: &dyn Error| ClusterError::Kubeconfig { file: file.to_owned(), reason: causes(error) };
    let kubeconfig = Kubeconfig::read_from(file).map_err(|error| failed(&error))?;
    let options = KubeConfigOptions::default();
    Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| failed(&error))
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

fn start(client: Client, server: String, options: Options, changes: impl Into<Changes>) -> Watch {
    let changes = changes.into();
    let status = Status::default();
    let (events, publisher) = Events::to(client.clone(), &options.node_name);
    let following = |labels: Option<String>, fields: Option<String>| Following {
        client: client.clone(),
        server: server.clone(),
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
