//! Whether the API server answers where the agent looks for it, and lets it read what it needs.

use super::{CheckArgs, CheckLine};
use crate::causes::causes;
use crate::status::AgentStatus;
use crate::watch::cluster::{self, Servers};
use std::path::Path;
use std::time::Duration;

const CHECK: &str = "API server";
/// Where kubeadm has the kubelet's kubeconfig: on the node itself, and as a pod of `kubectl debug node` sees it.
const KUBELET: [&str; 2] = ["/etc/kubernetes/kubelet.conf", "/host/etc/kubernetes/kubelet.conf"];
/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(15);

pub(super) async fn look(args: &CheckArgs, agent: Option<&AgentStatus>) -> CheckLine {
    let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    if args.kubeconfig.is_none() && !in_pod {
        return unasked(agent);
    }
    let servers = Servers {
        named: args.named_servers(),
        state: args.state_dir.clone(),
        kubelet: named_to_the_kubelet(),
        ..Servers::default()
    };
    let asked = cluster::ask(args.kubeconfig.as_deref(), servers);
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) if answer.denied.is_empty() => {
            CheckLine::well(CHECK, format!("{}, Kubernetes {}", answer.server, answer.version))
        }
        // The account of a pod that only looks is none that the agent will have.
        Ok(Ok(answer)) if args.kubeconfig.is_none() && agent.is_none() => CheckLine::warning(
            CHECK,
            format!(
                "{}, Kubernetes {}, answers; this pod's account may not list {}",
                answer.server,
                answer.version,
                answer.denied.join(", ")
            ),
            "the agent's account may, if it has the role system:node-proxier, as deploy/portolan.yaml gives it",
        ),
        Ok(Ok(answer)) => CheckLine::failing(
            CHECK,
            format!("{} does not let this account list {}", answer.server, answer.denied.join(", ")),
            "bind it to the role system:node-proxier, as deploy/portolan.yaml does",
        ),
        Ok(Err(error)) => CheckLine::failing(
            CHECK,
            causes(&error),
            "name it by --api-server: `kubectl get nodes --output wide` has the addresses of the control plane",
        ),
        Err(_) => CheckLine::failing(
            CHECK,
            format!("no answer within {} s", PATIENCE.as_secs()),
            "does this node reach it? --api-server names another address",
        ),
    }
}

/// What cannot be read is looked for elsewhere.
fn named_to_the_kubelet() -> Vec<String> {
    KUBELET.iter().filter_map(|file| cluster::servers_of(Path::new(file)).ok()).flatten().collect()
}

/// Without credentials of its own the agent's word counts.
fn unasked(agent: Option<&AgentStatus>) -> CheckLine {
    let Some(agent) = agent else {
        return CheckLine::warning(CHECK, "not asked", "--kubeconfig FILE names credentials to ask with");
    };
    let watches = agent.source.watches.iter().filter(|watch| !watch.unavailable);
    match watches.filter_map(|watch| watch.error.as_ref()).next() {
        None => CheckLine::well(CHECK, format!("the agent follows {}", agent.source.place)),
        Some(error) => CheckLine::failing(CHECK, error.clone(), "the agent's log tells since when"),
    }
}
