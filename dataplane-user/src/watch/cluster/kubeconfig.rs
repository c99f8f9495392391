//! A kubeconfig, and the files that it names.
//!
//! `kube` would make its own configuration of one, but takes the proxy of the environment for every server and compares
//! `NO_PROXY` with the proxy's name instead of the server's. So it is put together here; see [`super::proxy`].

use super::{ClusterError, proxy};
use crate::causes::causes;
use kube::Config;
use kube::config::{AuthInfo, Cluster, ExecAuthCluster, Kubeconfig};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

/// What the client is made of, and the proxy in words for the log.
pub(super) fn load(file: &Path) -> Result<(Config, Option<String>), ClusterError> {
    let failed = |reason: String| ClusterError::Kubeconfig { file: file.to_owned(), reason };
    let kubeconfig = Kubeconfig::read_from(file).map_err(|error| failed(causes(&error)))?;
    let (cluster, mut user) = current(&kubeconfig).map_err(failed)?;
    let server = cluster.server.as_deref().ok_or_else(|| failed("its cluster has no server".to_owned()))?;
    let server = server.parse().map_err(|error| failed(format!("server `{server}`: {error}")))?;
    let described = ExecAuthCluster::try_from(&cluster).map_err(|error| failed(causes(&error)))?;
    let proxy = proxy::choose(cluster.proxy_url.as_deref(), &server)?;
    let mut config = Config::new(server);
    if let Some(pem) = &described.certificate_authority_data {
        config.root_cert = Some(certificates(pem).map_err(failed)?);
    }
    if let Some(exec) = user.exec.as_mut().filter(|exec| exec.provide_cluster_info) {
        exec.cluster = Some(described);
    }
    config.auth_info = user;
    config.accept_invalid_certs = cluster.insecure_skip_tls_verify.unwrap_or_default();
    config.disable_compression = cluster.disable_compression.unwrap_or_default();
    config.tls_server_name.clone_from(&cluster.tls_server_name);
    let (proxy, words) = proxy.unzip();
    config.proxy_url = proxy;
    Ok((config, words))
}

/// Cluster and user of the current context. As for client-go, a user that is not there is nobody.
fn current(kubeconfig: &Kubeconfig) -> Result<(Cluster, AuthInfo), String> {
    let name = kubeconfig.current_context.as_deref().filter(|name| !name.is_empty());
    let name = name.ok_or("it has no current-context")?;
    let context = kubeconfig.contexts.iter().find(|context| context.name == name);
    let context = context.and_then(|context| context.context.as_ref());
    let context = context.ok_or_else(|| format!("its current-context `{name}` is not there"))?;
    let cluster = kubeconfig.clusters.iter().find(|cluster| cluster.name == context.cluster);
    let cluster = cluster.and_then(|cluster| cluster.cluster.clone());
    let cluster = cluster.ok_or_else(|| format!("its cluster `{}` is not there", context.cluster))?;
    let user = kubeconfig.auth_infos.iter().find(|user| Some(&user.name) == context.user.as_ref());
    Ok((cluster, user.and_then(|user| user.auth_info.clone()).unwrap_or_default()))
}

fn certificates(pem: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let certificates = CertificateDer::pem_slice_iter(pem).map(|certificate| Ok(certificate?.to_vec()));
    let certificates: Result<Vec<_>, rustls_pki_types::pem::Error> = certificates.collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err("its certificate-authority holds no certificate".to_owned()),
        Err(error) => Err(format!("its certificate-authority: {error}")),
    }
}

/// Tells by a hash whether a kubeconfig, or a certificate or key that it names, is another than before. What cannot be read
/// counts as empty. Token files are not among them: the client reads those again by itself.
pub(super) fn fingerprint(file: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    std::fs::read(file).unwrap_or_default().hash(&mut hasher);
    if let Ok(kubeconfig) = Kubeconfig::read_from(file) {
        for named in named_files(&kubeconfig) {
            std::fs::read(named).unwrap_or_default().hash(&mut hasher);
        }
    }
    hasher.finish()
}

fn named_files(kubeconfig: &Kubeconfig) -> Vec<PathBuf> {
    let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
    let users = kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref());
    let authorities = clusters.filter_map(|cluster| cluster.certificate_authority.as_ref());
    let identities = users.flat_map(|user| [&user.client_certificate, &user.client_key]).flatten();
    authorities.chain(identities).map(PathBuf::from).collect()
}
