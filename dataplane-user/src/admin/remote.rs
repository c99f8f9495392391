//! Verbs for another node, from a workstation: by `kubectl exec` in the pod of that node's agent. They need no root there, and no
//! right but those that `kubectl` has.

use super::{AdminError, structured};
use crate::config::Output as Form;
use serde_json::Value;
use std::ffi::OsString;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};

/// By which the pods of agents are found, in all namespaces.
pub const LABEL: &str = "app.kubernetes.io/name=portolan";
/// The container of such a pod.
const CONTAINER: &str = "portolan";
/// The flag that names a node.
const FLAG: &str = "--node";
/// The flag by which all are asked.
const ALL_NODES: &str = "--all-nodes";

/// The pod of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The node it runs on.
    pub node: String,
}

/// What a command printed, and how it ended.
pub struct Answer {
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// Why `kubectl` did not run.
pub(super) fn not_run(error: std::io::Error) -> AdminError {
    AdminError::End(format!("cannot run kubectl: {error}. Is it in PATH?"))
}

/// Words as `kubectl` takes them.
pub(super) fn words(arguments: &[&str]) -> Vec<OsString> {
    arguments.iter().map(OsString::from).collect()
}

/// What a command printed that must succeed; `arguments` are its own.
///
/// # Errors
/// If it has not, with what it said.
pub(super) fn succeeded(arguments: &[&str], answer: Answer) -> Result<String, AdminError> {
    if answer.code == Some(0) {
        return Ok(answer.out);
    }
    Err(AdminError::End(format!("kubectl {}: {}", arguments.join(" "), answer.err.trim())))
}

/// Objects, as `kubectl` has them.
///
/// # Errors
/// If it cannot be run, or does not list them.
pub(super) fn objects(arguments: &[&str]) -> Result<Value, AdminError> {
    let all = [arguments, &["--output", "json"]].concat();
    Ok(serde_json::from_str(&succeeded(&all, kubectl(&words(&all), "")?)?)?)
}

/// Runs `kubectl`, with a text on its standard input.
///
/// # Errors
/// If there is none.
pub(super) fn kubectl(arguments: &[OsString], input: &str) -> Result<Answer, AdminError> {
    let output = run(arguments, input)?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Answer { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) })
}

/// The same, for one whose output is no text.
fn run(arguments: &[OsString], input: &str) -> Result<Output, AdminError> {
    let mut command = Command::new("kubectl");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(not_run)?;
    // What it does not read it needs no more.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output().map_err(not_run)
}

/// The pods of all agents.
///
/// # Errors
/// If `kubectl` does not list them.
pub fn pods() -> Result<Vec<AgentPod>, AdminError> {
    Ok(pods_of(&objects(&["get", "pods", "--all-namespaces", "--selector", LABEL])?))
}

fn pods_of(list: &Value) -> Vec<AgentPod> {
    let text =
        |pod: &Value, path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    // While a DaemonSet is rolled out a node may have one that ends.
    let lives = |pod: &&Value| pod.pointer("/metadata/deletionTimestamp").is_none();
    let pod = |pod: &Value| AgentPod {
        namespace: text(pod, "/metadata/namespace"),
        name: text(pod, "/metadata/name"),
        node: text(pod, "/spec/nodeName"),
    };
    items.iter().filter(lives).map(pod).collect()
}

/// All pods, as `kubectl` has them.
///
/// # Errors
/// As [`pods`].
pub fn all_pods() -> Result<Value, AdminError> {
    objects(&["get", "pods", "--all-namespaces"])
}

fn exec(pod: &AgentPod, arguments: &[OsString]) -> Vec<OsString> {
    let exec = ["exec", "--namespace", &pod.namespace, &pod.name, "--container", CONTAINER, "--", "portolan"];
    exec.iter().map(OsString::from).chain(arguments.iter().cloned()).collect()
}

/// Runs `portolan` with these arguments in a pod.
///
/// # Errors
/// If there is no `kubectl`.
pub fn portolan(pod: &AgentPod, arguments: &[OsString]) -> Result<Answer, AdminError> {
    kubectl(&exec(pod, arguments), "")
}

/// The command that does so, for what it says as it goes on.
pub fn portolan_command(pod: &AgentPod, arguments: &[OsString]) -> Command {
    let mut command = Command::new("kubectl");
    command.args(exec(pod, arguments));
    command
}

/// The pod of a node's agent.
///
/// # Errors
/// If there is none, or `kubectl` cannot be run.
pub fn pod_on(node: &str) -> Result<AgentPod, AdminError> {
    let pods = pods()?;
    if let Some(pod) = pods.iter().find(|pod| pod.node == node) {
        return Ok(pod.clone());
    }
    let mut nodes: Vec<_> = pods.iter().map(|pod| pod.node.as_str()).collect();
    nodes.sort_unstable();
    let found = if nodes.is_empty() { "none".to_owned() } else { nodes.join(", ") };
    Err(AdminError::End(format!(
        "no pod with the label {LABEL} runs on a node `{node}`; nodes that have one: {found}"
    )))
}

/// The pod of the agent of the node that is named, or of every node, in the order of their names.
///
/// # Errors
/// As [`pod_on`].
pub fn pods_on(node: Option<&str>) -> Result<Vec<AgentPod>, AdminError> {
    if let Some(node) = node {
        return Ok(vec![pod_on(node)?]);
    }
    let mut pods = pods()?;
    if pods.is_empty() {
        return Err(AdminError::End(format!("no pod with the label {LABEL} runs")));
    }
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(pods)
}

/// What `portolan` with these arguments writes in a pod, if that is no text.
///
/// # Errors
/// If it does not succeed there, with what it said.
pub fn bytes(pod: &AgentPod, arguments: &[OsString]) -> Result<Vec<u8>, AdminError> {
    let output = run(&exec(pod, arguments), "")?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(AdminError::End(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// The last lines of an agent's log, or of the one before it in the same pod.
///
/// # Errors
/// If there is none.
pub fn log(pod: &AgentPod, lines: u32, previous: bool) -> Result<String, AdminError> {
    let tail = format!("--tail={lines}");
    let mut arguments =
        vec!["logs", "--namespace", &pod.namespace, &pod.name, "--container", CONTAINER, &tail];
    if previous {
        arguments.push("--previous");
    }
    succeeded(&arguments, kubectl(&words(&arguments), "")?)
}

/// Asks the node what this command line asks.
///
/// # Errors
/// If no agent's pod is on that node, or `kubectl` cannot be run.
pub fn ask(node: &str, command_line: impl IntoIterator<Item = OsString>) -> Result<Answer, AdminError> {
    let mut answer = portolan(&pod_on(node)?, &without_node(command_line))?;
    // kubectl says how the command ended, which the exit code says as well.
    let lines = answer.err.lines().filter(|line| !line.starts_with("command terminated with exit code"));
    answer.err = lines.map(|line| format!("{line}\n")).collect();
    Ok(answer)
}

/// Asks each node what this command line asks. What they say, each under the name of its node, and the worst of their exit codes.
///
/// # Errors
/// If no agent's pod runs, or `kubectl` cannot be run.
pub fn ask_all(
    command_line: impl IntoIterator<Item = OsString>,
    output: Form,
) -> Result<(String, u8), AdminError> {
    let is_data = matches!(output, Form::Json | Form::Yaml);
    let mut words = without(command_line, &[ALL_NODES], &[]);
    if is_data {
        words = without(words, &[], &["--output", "-o"]);
        words.push("--output=json".into());
    }
    let pods = pods_on(None)?;
    let (mut text, mut all, mut worst) = (String::new(), serde_json::Map::new(), 0);
    for pod in &pods {
        let answer = portolan(pod, &words)?;
        let code = answer.code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        worst = worst.max(code);
        let said = if answer.out.is_empty() { &answer.err } else { &answer.out };
        if is_data {
            // Where a node has no answer its words are in its place.
            let value = serde_json::from_str(&answer.out).unwrap_or_else(|_| Value::from(said.trim()));
            all.insert(pod.node.clone(), value);
        } else {
            text.push_str(&format!("{}:\n{said}\n", pod.node));
        }
    }
    Ok(if is_data { (structured(&all, output)?, worst) } else { (text, worst) })
}

/// The arguments of a command line without the flag that names the node.
fn without_node(command_line: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    without(command_line, &[], &[FLAG])
}

/// The arguments without some switches, and without some flags that have a value.
fn without(
    command_line: impl IntoIterator<Item = OsString>,
    switches: &[&str],
    flags: &[&str],
) -> Vec<OsString> {
    let mut left = Vec::new();
    let mut words = command_line.into_iter();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy().into_owned();
        // `--flag=value`, and `-fvalue`.
        let joined = |flag: &&str| match text.strip_prefix(*flag) {
            Some(value) => value.starts_with('=') || !flag.starts_with("--") && !value.is_empty(),
            None => false,
        };
        if flags.contains(&text.as_str()) {
            words.next();
        } else if !switches.contains(&text.as_str()) && !flags.iter().any(joined) {
            left.push(word);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_other_node_is_asked_the_same_without_its_name() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        for line in ["--node a services -o json", "services --node=a -o json", "services -o json --node a"] {
            assert_eq!(without_node(words(line)), words("services -o json"), "{line}");
        }
        assert_eq!(without_node(words("explain node --node-name x 10.0.0.1:80")).len(), 5);
    }

    #[test]
    fn all_nodes_are_asked_the_same_and_for_json_where_that_is_put_together() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let line = || words("flows --all-nodes --bpffs /x");
        assert_eq!(without(line(), &[ALL_NODES], &[]), words("flows --bpffs /x"));
        for line in ["flows -o yaml x", "flows -oyaml x", "flows --output=yaml x", "--output yaml flows x"] {
            assert_eq!(without(words(line), &[], &["--output", "-o"]), words("flows x"), "{line}");
        }
    }

    #[test]
    fn a_pod_that_ends_is_not_asked() {
        let list = json!({ "items": [
            { "metadata": { "namespace": "n", "name": "old", "deletionTimestamp": "t" }, "spec": { "nodeName": "a" } },
            { "metadata": { "namespace": "n", "name": "new" }, "spec": { "nodeName": "a" } },
        ] });
        let names: Vec<_> = pods_of(&list).into_iter().map(|pod| pod.name).collect();
        assert_eq!(names, ["new"]);
    }
}
