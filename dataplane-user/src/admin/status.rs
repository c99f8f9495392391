//! `portolan status`: one screen about this node, from what the kernel holds and what the agent says of itself.
//!
//! Either may be missing: the programs serve without an agent, and an agent that just began has no maps yet.

mod kernel;
pub mod nodes;
mod text;

use super::AdminError;
use super::names::Names;
use crate::config::Output;
use crate::kernel::other_proxies;
use crate::status::{self, AgentStatus, local};
use crate::version;
use kernel::KernelStatus;
use serde::Serialize;
use std::path::Path;
use std::time::SystemTime;

/// What it comes to, as an exit code: 1 and 2 are for verbs that fail and for wrong usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// All is well.
    Well,
    /// Somebody should look at something.
    Warning,
    /// It does not work.
    Failing,
}

impl Verdict {
    /// Its exit code.
    pub const fn code(self) -> u8 {
        match self {
            Self::Well => 0,
            Self::Warning => 3,
            Self::Failing => 4,
        }
    }

    pub(super) const fn mark(self) -> char {
        match self {
            Self::Well => '✓',
            Self::Warning => '!',
            Self::Failing => '✗',
        }
    }
}

/// What somebody should know, and do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub verdict: Verdict,
    /// What was found, and what helps.
    pub text: String,
}

/// The page.
#[derive(Clone, Debug, Serialize)]
pub struct StatusPage {
    /// The worst of the findings.
    pub verdict: Verdict,
    /// Version of this command line.
    pub version: &'static str,
    /// What somebody should look at, the worst first.
    pub findings: Vec<Finding>,
    /// What the agent says of itself; none if none answers.
    pub agent: Option<AgentStatus>,
    /// What the kernel holds; none if it holds nothing.
    pub kernel: Option<KernelStatus>,
    /// What other proxies have left on the node, or make.
    pub other_proxies: Vec<String>,
}

/// Looks at the node whose pins are in this folder.
///
/// # Errors
/// If maps are there and cannot be read.
pub fn look(bpffs: &Path) -> Result<StatusPage, AdminError> {
    let agent = match local::ask(bpffs, status::PATH) {
        Ok(text) => Ok(serde_json::from_str::<AgentStatus>(&text)?),
        Err(error) => Err(error.to_string()),
    };
    let kernel = KernelStatus::look(bpffs, &Names::read(bpffs))?;
    let others = other_proxies::look();
    Ok(StatusPage::new(agent, kernel, others))
}

impl StatusPage {
    pub(super) fn new(
        agent: Result<AgentStatus, String>,
        kernel: Option<KernelStatus>,
        others: other_proxies::Found,
    ) -> Self {
        let mut findings = Vec::new();
        let mut find = |verdict, text: String| findings.push(Finding { verdict, text });
        match &agent {
            Ok(agent) => of_agent(agent, &mut find),
            Err(error) if kernel.is_some() => find(
                Verdict::Warning,
                format!("what is in the kernel is served, and nothing changes any more: {error}"),
            ),
            Err(error) => find(Verdict::Failing, format!("nothing is served: {error}")),
        }
        if let Some(kernel) = &kernel {
            kernel.findings(&mut find);
        }
        if !others.traces.is_empty() {
            let taking_over = kernel.as_ref().is_some_and(|kernel| kernel.taking_over);
            let what = others.traces.join(", ");
            let helps = if taking_over {
                "connections are left to it until they end (`portolan take-over`)"
            } else {
                "if it still runs, take it away; its rules go with deploy/kube-proxy-cleanup.yaml"
            };
            find(Verdict::Warning, format!("another proxy's {what}: {helps}"));
        }
        for unknown in others.unknown {
            find(Verdict::Warning, format!("whether another proxy is here is not known: {unknown}"));
        }
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.verdict));
        let verdict = findings.first().map_or(Verdict::Well, |worst| worst.verdict);
        let (version, other_proxies) = (version::text(), others.traces);
        Self { verdict, version, findings, agent: agent.ok(), kernel, other_proxies }
    }

    /// The page as somebody asked for it.
    ///
    /// # Errors
    /// If it cannot be written as JSON or YAML.
    pub fn print(&self, output: Output) -> Result<String, AdminError> {
        match output {
            Output::Table => Ok(self.text(SystemTime::now(), false)),
            Output::Wide => Ok(self.text(SystemTime::now(), true)),
            Output::Json | Output::Yaml => super::structured(self, output),
        }
    }
}

/// One of everything.
#[cfg(test)]
pub(super) fn kernel_sample(reason: super::DropRow) -> KernelStatus {
    KernelStatus {
        layout: "",
        other_layouts: vec![String::new()],
        service_ports: 0,
        frontends: 0,
        endpoints: 0,
        tables: vec![kernel::TableFill { table: "", entries: 0, capacity: 0 }],
        interfaces: [("*".to_owned(), vec![String::new()])].into(),
        sockets: vec![String::new()],
        taking_over: false,
        connections_left: 0,
        reasons: vec![reason],
    }
}

/// What the agent's own page tells.
fn of_agent(agent: &AgentStatus, find: &mut impl FnMut(Verdict, String)) {
    if let Some(trouble) = &agent.trouble {
        find(Verdict::Failing, format!("the node cannot serve what it was told: {trouble}"));
    }
    for part in &agent.hanging {
        find(Verdict::Failing, format!("a part of the agent hangs: {part}; the kubelet starts it anew"));
    }
    let broken = agent.source.watches.iter().filter(|watch| !watch.unavailable);
    for error in broken.filter_map(|watch| watch.error.as_ref()) {
        find(Verdict::Warning, error.clone());
    }
    for warning in &agent.warnings {
        find(Verdict::Warning, warning.clone());
    }
    if !agent.node_eligible {
        find(
            Verdict::Warning,
            "the Node is about to go: load balancers are told to leave it (H1)".to_owned(),
        );
    }
    if agent.snapshot.served {
        let text = "objects of the snapshot are served, for the API server has not told everything";
        find(Verdict::Warning, text.to_owned());
    }
    for complaint in &agent.complaints {
        let (reason, count) = (&complaint.reason, complaint.count);
        find(
            Verdict::Warning,
            format!(
                "{count} × {reason}: `kubectl get events --all-namespaces --field-selector reason={reason}`"
            ),
        );
    }
    if agent.private_pins {
        let text = "programs and flows end with the agent: the BPF file system is its own alone (C3)";
        find(Verdict::Warning, text.to_owned());
    }
}
