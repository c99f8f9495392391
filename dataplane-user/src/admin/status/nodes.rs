//! `portolan status --all-nodes`: each node's own page, asked for by `kubectl exec` in its pod of the DaemonSet, a row each; and what
//! is not the same on all of them. For a workstation: it needs no root there, and no right but those that `kubectl` has.

use super::{Finding, Verdict};
use crate::admin::columns::{self, Row};
use crate::admin::remote::{self, AgentPod, Answer, LABEL};
use crate::admin::{AdminError, structured};
use crate::config::Output;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::ffi::OsString;

/// How many nodes are asked at once.
const AT_ONCE: usize = 16;

/// A node and what it says.
#[derive(Clone, Debug, Serialize)]
pub struct NodeRow {
    /// Its name.
    pub node: String,
    /// As its own page has it; failing, if it does not answer.
    pub verdict: Verdict,
    /// Its agent's version.
    pub version: Option<String>,
    /// Service ports in its kernel.
    pub service_ports: Option<u64>,
    /// Endpoints in its kernel.
    pub endpoints: Option<u64>,
    /// What somebody should look at.
    pub findings: Vec<String>,
}

impl Row for NodeRow {
    const HEADINGS: &'static [&'static str] =
        &["", "NODE", "VERSION", "SERVICE-PORTS", "ENDPOINTS", "TO-LOOK-AT"];

    fn cells(&self) -> Vec<String> {
        let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        vec![
            self.verdict.mark().to_string(),
            self.node.clone(),
            self.version.clone().unwrap_or_else(|| "-".to_owned()),
            number(self.service_ports),
            number(self.endpoints),
            self.findings.first().cloned().unwrap_or_else(|| "-".to_owned()),
        ]
    }
}

/// All nodes.
#[derive(Clone, Debug, Serialize)]
pub struct NodesPage {
    /// The worst of them.
    pub verdict: Verdict,
    /// What is not the same on all nodes.
    pub findings: Vec<Finding>,
    /// The nodes, by name.
    pub nodes: Vec<NodeRow>,
}

/// Asks one node.
fn ask(pod: &AgentPod) -> NodeRow {
    let node = &pod.node;
    let answer = remote::portolan(pod, &["status", "--output", "json"].map(OsString::from));
    let failed = |why: String| NodeRow {
        node: node.clone(),
        verdict: Verdict::Failing,
        version: None,
        service_ports: None,
        endpoints: None,
        findings: vec![why],
    };
    match answer {
        Ok(Answer { out, err, .. }) => match serde_json::from_str::<Value>(&out) {
            Ok(page) => row(node, &page),
            // The verb's own exit code says nothing of this: a page came, or none.
            Err(_) => failed(format!("does not answer: {}", err.lines().last().unwrap_or_default())),
        },
        Err(error) => failed(error.to_string()),
    }
}

/// What a page of any version says.
fn row(node: &str, page: &Value) -> NodeRow {
    let verdict = match page["verdict"].as_str() {
        Some("well") => Verdict::Well,
        Some("warning") => Verdict::Warning,
        Some(_) | None => Verdict::Failing,
    };
    let findings = page["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    NodeRow {
        node: node.to_owned(),
        verdict,
        version: page.pointer("/agent/version").and_then(Value::as_str).map(str::to_owned),
        service_ports: page.pointer("/kernel/service_ports").and_then(Value::as_u64),
        endpoints: page.pointer("/kernel/endpoints").and_then(Value::as_u64),
        findings: findings.iter().filter_map(|it| it["text"].as_str().map(str::to_owned)).collect(),
    }
}

/// Asks all nodes, some at a time.
///
/// # Errors
/// If `kubectl` does not list the pods.
pub fn look() -> Result<NodesPage, AdminError> {
    let pods = remote::pods()?;
    let mut nodes = Vec::new();
    for some in pods.chunks(AT_ONCE) {
        nodes.extend(std::thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|pod| scope.spawn(|| ask(pod))).collect();
            asked.into_iter().filter_map(|asked| asked.join().ok()).collect::<Vec<_>>()
        }));
    }
    Ok(NodesPage::new(nodes))
}

impl NodesPage {
    fn new(mut nodes: Vec<NodeRow>) -> Self {
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        let mut findings = Vec::new();
        let mut differ = |what: &str, values: BTreeSet<String>| {
            if values.len() > 1 {
                let values = values.into_iter().collect::<Vec<_>>().join(", ");
                findings
                    .push(Finding { verdict: Verdict::Warning, text: format!("{what} differ: {values}") });
            }
        };
        differ("versions", nodes.iter().filter_map(|node| node.version.clone()).collect());
        let ports = nodes.iter().filter_map(|node| node.service_ports.map(|ports| ports.to_string()));
        differ("service ports in the kernel", ports.collect());
        if nodes.is_empty() {
            let text = format!("no pod has the label {LABEL}: is Portolan installed in this cluster?");
            findings.push(Finding { verdict: Verdict::Failing, text });
        }
        let all = nodes.iter().map(|node| node.verdict).chain(findings.iter().map(|finding| finding.verdict));
        let verdict = all.max().unwrap_or(Verdict::Well);
        Self { verdict, findings, nodes }
    }

    /// As somebody asked for it.
    ///
    /// # Errors
    /// If it cannot be written as JSON or YAML.
    pub fn print(&self, output: Output) -> Result<String, AdminError> {
        match output {
            Output::Json | Output::Yaml => structured(self, output),
            Output::Table | Output::Wide => {
                let findings = self.findings.iter().map(|it| format!("{} {}\n", it.verdict.mark(), it.text));
                Ok(columns::table(&self.nodes) + &findings.collect::<String>())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, version: &str, ports: u64) -> NodeRow {
        let page = json!({
            "verdict": "well", "findings": [], "agent": { "version": version },
            "kernel": { "service_ports": ports, "endpoints": 2 },
        });
        row(name, &page)
    }

    #[test]
    fn a_row_for_each_node_and_what_differs_below() {
        let page = NodesPage::new(vec![node("b", "1", 7), node("a", "1", 7)]);
        let expected = "    NODE   VERSION   SERVICE-PORTS   ENDPOINTS   TO-LOOK-AT\n\
                        ✓   a      1         7               2           -\n\
                        ✓   b      1         7               2           -\n";
        assert_eq!((page.verdict, page.print(Output::Table).unwrap().as_str()), (Verdict::Well, expected));
        let page = NodesPage::new(vec![node("a", "1", 7), node("b", "2", 6)]);
        assert_eq!(page.verdict, Verdict::Warning);
        let texts: Vec<_> = page.findings.iter().map(|finding| finding.text.as_str()).collect();
        assert_eq!(texts, ["versions differ: 1, 2", "service ports in the kernel differ: 6, 7"]);
        assert_eq!(NodesPage::new(Vec::new()).verdict, Verdict::Failing);
    }

    #[test]
    fn a_node_whose_page_says_it_fails_is_the_verdict() {
        let page =
            json!({ "verdict": "failing", "findings": [{ "verdict": "failing", "text": "no uplink" }] });
        let failing = row("c", &page);
        assert_eq!((failing.version.clone(), failing.findings.clone()), (None, vec!["no uplink".to_owned()]));
        assert_eq!(NodesPage::new(vec![node("a", "1", 7), failing]).verdict, Verdict::Failing);
    }
}
