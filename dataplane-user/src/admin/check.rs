//! `portolan check`: whether this node can run Portolan, before it is installed; and whether it does, afterwards. It changes nothing,
//! and beside each fault it says what to do.

mod api_server;
mod machine;
pub mod pods;
mod ports;
pub mod probe;
mod services;

use super::columns::{self, Row};
use super::status::{self, Verdict};
use super::{AdminError, structured};
use crate::config::{CheckArgs, Output};
use crate::kernel::other_proxies;
use crate::status::AgentStatus;
use serde::Serialize;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckLine {
    /// How it is.
    pub verdict: Verdict,
    /// The node, where several are looked at.
    pub node: Option<String>,
    /// What was looked at.
    pub check: &'static str,
    /// What was found.
    pub found: String,
    /// What helps, if something is to be done.
    pub helps: Option<String>,
}

impl CheckLine {
    fn well(check: &'static str, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Well, node: None, check, found: found.into(), helps: None }
    }

    fn warning(check: &'static str, found: impl Into<String>, helps: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, node: None, check, found: found.into(), helps: Some(helps.into()) }
    }

    fn failing(check: &'static str, found: impl Into<String>, helps: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failing, node: None, check, found: found.into(), helps: Some(helps.into()) }
    }

    /// On this node.
    fn at(self, node: &str) -> Self {
        Self { node: Some(node.to_owned()), ..self }
    }
}

impl Row for CheckLine {
    const HEADINGS: &'static [&'static str] = &["", "CHECK", "FOUND", "WHAT-HELPS"];

    fn cells(&self) -> Vec<String> {
        let helps = self.helps.clone().unwrap_or_default();
        let found = match &self.node {
            Some(node) => format!("{node}: {}", self.found),
            None => self.found.clone(),
        };
        vec![self.verdict.mark().to_string(), self.check.to_owned(), found, helps]
    }
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct CheckPage {
    /// The worst of the lines.
    pub verdict: Verdict,
    /// Whether an agent runs here: then its work is looked at as well.
    pub installed: bool,
    /// What was looked at.
    pub checks: Vec<CheckLine>,
}

/// Looks at this node.
///
/// # Errors
/// If maps are there and cannot be read.
pub async fn look(args: &CheckArgs) -> Result<CheckPage, AdminError> {
    let page = status::look(&args.show.bpffs)?;
    let agent = page.agent.as_ref();
    let mut checks = machine::look(args);
    checks.extend(ports::look(agent.map(|agent| agent.pid)));
    checks.push(other_proxy(other_proxies::look(), agent));
    checks.push(api_server::look(args, agent).await);
    if let Some(agent) = agent {
        checks.extend(of_status(&page.findings, agent));
        checks.extend(services::look(&args.show.bpffs)?);
    }
    let verdict = checks.iter().map(|line| line.verdict).max().unwrap_or(Verdict::Well);
    Ok(CheckPage { verdict, installed: agent.is_some(), checks })
}

/// Two proxies on a node translate the same packets twice, or take each other's ports.
fn other_proxy(found: other_proxies::Found, agent: Option<&AgentStatus>) -> CheckLine {
    const CHECK: &str = "other proxies";
    let runs = ports::process_of("kube-proxy");
    let traces = found.traces.join(", ");
    match (runs, found.traces.is_empty()) {
        (Some(pid), _) => CheckLine::failing(
            CHECK,
            format!("kube-proxy runs here, process {pid}"),
            "send it away from this node first: docs/take-over.md has the steps",
        ),
        (None, false) if agent.is_some() => CheckLine::warning(
            CHECK,
            format!("left over: {traces}"),
            "deploy/kube-proxy-cleanup.yaml takes it away, when `portolan take-over` lists no connection",
        ),
        (None, false) => CheckLine::warning(
            CHECK,
            format!("left over: {traces}"),
            "it serves until Portolan does, so leave it until then (docs/take-over.md)",
        ),
        (None, true) if found.unknown.is_empty() => CheckLine::well(CHECK, "none"),
        (None, true) => CheckLine::warning(CHECK, found.unknown.join(", "), "look by `nft list ruleset`"),
    }
}

/// What the agent says of itself.
fn of_status(findings: &[status::Finding], agent: &AgentStatus) -> Vec<CheckLine> {
    const CHECK: &str = "agent";
    let helps = "`portolan status -o wide` and the agent's log tell more";
    let lines = findings.iter().map(|finding| CheckLine {
        verdict: finding.verdict,
        node: None,
        check: CHECK,
        found: finding.text.clone(),
        helps: Some(helps.to_owned()),
    });
    let lines: Vec<_> = lines.filter(|line| !line.found.starts_with("another proxy")).collect();
    if lines.is_empty() {
        return vec![CheckLine::well(CHECK, format!("{} serves {}", agent.version, agent.node))];
    }
    lines
}

impl CheckPage {
    /// As somebody asked for it.
    ///
    /// # Errors
    /// If it cannot be written as JSON or YAML.
    pub fn print(&self, output: Output) -> Result<String, AdminError> {
        match output {
            Output::Table | Output::Wide => Ok(columns::table(&self.checks)),
            Output::Json | Output::Yaml => structured(self, output),
        }
    }
}
