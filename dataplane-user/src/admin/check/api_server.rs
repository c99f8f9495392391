//! Whether the API server answers where the agent looks for it, and lets it read what it needs.

use super::{CheckArgs, CheckLine};
use crate::causes::causes;
use crate::status::AgentStatus;
use crate::watch::cluster::{self, Servers};
use std::time::Duration;

const CHECK: &str = "API server";
/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(15);

pub(super) async fn look(args: &CheckArgs, agent: Option<&AgentStatus>) -> CheckLine {
    let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    if args.kubeconfig.is_none() && !in_pod {
        return unasked(agent);
    }
    let servers =
        Servers { named: args.named_servers(), state: args.state_dir.clone(), ..Servers::default() };
    let asked = cluster::ask(args.kubeconfig.as_deref(), servers);
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) if answer.denied.is_empty() => {
            CheckLine::well(CHECK, format!("{}, Kubernetes {}", answer.server, answer.version))
        }
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
