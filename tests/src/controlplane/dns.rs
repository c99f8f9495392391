//! The cluster's names: a real CoreDNS as a pod behind the Service `kube-dns`. It reaches the API server as any pod does, at the
//! first address of the service range, so it lives by the dataplane that it is called through.

use super::binaries::COREDNS;
use super::{API_SERVER, ControlPlane};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::Path;

/// The ClusterIP of `kube-dns`.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The cluster domain.
pub const DOMAIN: &str = "cluster.local";
/// A name outside the cluster that CoreDNS knows, for ExternalName Services, and its address.
pub const OUTSIDE_NAME: &str = "www.example.test";
/// Of a range for documentation.
pub const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
/// The API server's ClusterIP.
const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Who CoreDNS is, the name of its image and of its pods.
const NAME: &str = "coredns";
const NAMESPACE: &str = "kube-system";

impl ControlPlane {
    /// Starts CoreDNS. It answers once agents run.
    pub fn start_dns(&self) -> Result<()> {
        let program = self.binaries.find_or_build_extra(COREDNS)?;
        let images = self.images();
        fs::create_dir_all(&images)?;
        symlink(which(&program)?, images.join(NAME)).context("the image of CoreDNS")?;
        self.apply(&account())?;
        let arguments = ["create", "token", NAME, "-n", NAMESPACE, "--duration=24h"];
        let token = self.kubectl(&arguments, "")?;
        let (kubeconfig, corefile) = (self.folder.join("coredns.kubeconfig"), self.folder.join("Corefile"));
        fs::write(&kubeconfig, credentials(&self.folder.join("certs/apiserver.crt"), token.trim()))?;
        fs::write(&corefile, configuration(&kubeconfig))?;
        self.apply(&workload(&corefile))
    }
}

/// A program that PATH leads to, by its whole path.
fn which(program: &Path) -> Result<std::path::PathBuf> {
    if program.is_absolute() {
        return Ok(program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| path.is_file());
    found.with_context(|| format!("{} is not in PATH", program.display()))
}

/// The service account, and what it may read.
fn account() -> [Value; 3] {
    let rules = json!([
        { "apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"] },
        { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"] },
    ]);
    [
        json!({ "apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": { "name": NAME, "namespace": NAMESPACE } }),
        json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
                "metadata": { "name": "system:coredns" }, "rules": rules }),
        json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
                "metadata": { "name": "system:coredns" },
                "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns" },
                "subjects": [{ "kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE }] }),
    ]
}

/// A kubeconfig with the account's token.
fn credentials(certificate: &Path, token: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters: [{{name: lab, cluster: {{server: \"https://{API_SERVICE}:443\", tls-server-name: \"{}\", \
         certificate-authority: {}}}}}]\n\
         users: [{{name: lab, user: {{token: {token}}}}}]\n\
         contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n",
        API_SERVER.0,
        certificate.display()
    )
}

/// As kubeadm writes it, but for a server outside: there is none, only one name that stands for all others. Answers are kept
/// for a second, so that changes are seen.
fn configuration(kubeconfig: &Path) -> String {
    format!(
        ".:53 {{\n    errors\n    ready\n    kubernetes {DOMAIN} in-addr.arpa ip6.arpa {{\n        kubeconfig {} lab\n        \
         pods insecure\n        ttl 1\n    }}\n    hosts {{\n        {OUTSIDE_ADDRESS} {OUTSIDE_NAME}\n        fallthrough\n    }}\n    \
         loadbalance\n}}\n",
        kubeconfig.display()
    )
}

/// The Deployment and its Service.
fn workload(corefile: &Path) -> [Value; 2] {
    let labels = json!({ "k8s-app": "kube-dns" });
    let port =
        |name: &str, protocol: &str| json!({ "name": name, "protocol": protocol, "containerPort": 53 });
    let container = json!({
        "name": NAME, "image": NAME, "args": ["-conf", corefile],
        "ports": [port("dns", "UDP"), port("dns-tcp", "TCP")],
        "readinessProbe": { "httpGet": { "path": "/ready", "port": 8181 } },
    });
    let port = |name: &str, protocol: &str| json!({ "name": name, "protocol": protocol, "port": 53, "targetPort": 53 });
    [
        json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": NAME, "namespace": NAMESPACE },
                "spec": { "replicas": 1, "selector": { "matchLabels": labels },
                          "template": { "metadata": { "labels": labels }, "spec": { "containers": [container] } } } }),
        json!({ "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": "kube-dns", "namespace": NAMESPACE, "labels": labels },
                "spec": { "selector": labels, "clusterIP": ADDRESS,
                          "ports": [port("dns", "UDP"), port("dns-tcp", "TCP")] } }),
    ]
}
