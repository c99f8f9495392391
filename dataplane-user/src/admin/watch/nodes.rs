//! Watches other nodes, from a workstation: `portolan watch` in the pods of their agents, by `kubectl exec`, put together here, with the
//! names of the pods at both ends.

use super::super::AdminError;
use super::super::remote::{self, AgentPod};
use super::line::EventLine;
use super::{Screen, host};
use crate::config::WatchArgs;
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How often an address that no pod had is looked for again.
const PERIOD: Duration = Duration::from_secs(5);

/// Watches the node that was named, or all.
///
/// # Errors
/// If no agent's pod is there, or `kubectl` cannot be run.
pub fn watch(args: &WatchArgs) -> Result<(), AdminError> {
    let pods = remote::pods_on(args.show.node.as_deref())?;
    let is_one = pods.len() == 1;
    let (sender, receiver) = mpsc::channel();
    let mut children = Vec::new();
    for pod in pods {
        children.push(Watching(start(args, &pod, sender.clone())?));
    }
    drop(sender);
    let (mut screen, mut names) = (Screen::new(args), PodNames::default());
    loop {
        match receiver.recv_timeout(Duration::from_millis(200)) {
            Ok((node, line)) => {
                let mut line = names.told(line);
                line.node = (!is_one).then_some(node);
                screen.show(line)?;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            // The last of them has ended, and said why.
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                screen.flush()?;
                return Err(AdminError::End("no node is watched any more".to_owned()));
            }
        }
        screen.flush()?;
        if screen.is_closed() {
            return Ok(());
        }
    }
}

/// `kubectl`, which ends with this.
struct Watching(Child);

impl Drop for Watching {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Begins to watch a node; its lines come by the channel.
fn start(
    args: &WatchArgs,
    pod: &AgentPod,
    sender: mpsc::Sender<(String, EventLine)>,
) -> Result<Child, AdminError> {
    let mut command = remote::portolan_command(pod, &args.for_a_node());
    command.stdout(Stdio::piped()).stdin(Stdio::null());
    let mut child = command.spawn().map_err(remote::not_run)?;
    if let Some(out) = child.stdout.take() {
        let node = pod.node.clone();
        std::thread::spawn(move || {
            for text in BufReader::new(out).lines() {
                let Ok(text) = text else { return };
                // What is no event, an older version says.
                let Ok(line) = serde_json::from_str(&text) else { continue };
                if sender.send((node.clone(), line)).is_err() {
                    return;
                }
            }
        });
    }
    Ok(child)
}

/// The names of pods by their addresses.
#[derive(Default)]
struct PodNames {
    names: HashMap<String, String>,
    asked: Option<Instant>,
}

impl PodNames {
    /// The line with the names of its ends.
    fn told(&mut self, mut line: EventLine) -> EventLine {
        line.client_name = line.client_name.or_else(|| self.name(line.client.as_deref()?));
        line.endpoint_name = line.endpoint_name.or_else(|| self.name(line.endpoint.as_deref()?));
        line
    }

    fn name(&mut self, end: &str) -> Option<String> {
        let host = host(end);
        if !self.names.contains_key(host) && self.asked.is_none_or(|asked| asked.elapsed() >= PERIOD) {
            self.asked = Some(Instant::now());
            // Without them addresses are shown.
            if let Ok(list) = remote::all_pods() {
                self.names = names_of(&list);
            }
        }
        self.names.get(host).cloned()
    }
}

/// Pods with an address of their own: those in the node's network have the node's.
fn names_of(list: &Value) -> HashMap<String, String> {
    let text = |pod: &Value, path: &str| pod.pointer(path).and_then(Value::as_str).map(str::to_owned);
    let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut names = HashMap::new();
    for pod in items.iter().filter(|pod| pod.pointer("/spec/hostNetwork") != Some(&Value::Bool(true))) {
        // One that has ended may have left its address to another.
        let lives = text(pod, "/status/phase").is_some_and(|phase| phase == "Running" || phase == "Pending");
        let (Some(namespace), Some(name), true) =
            (text(pod, "/metadata/namespace"), text(pod, "/metadata/name"), lives)
        else {
            continue;
        };
        for address in pod.pointer("/status/podIPs").and_then(Value::as_array).into_iter().flatten() {
            if let Some(address) = text(address, "/ip") {
                names.insert(address, format!("{namespace}/{name}"));
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pods_are_named_by_their_own_addresses_while_they_run() {
        let pod = |name: &str, phase: &str, host: bool, ip: &str| {
            json!({
                "metadata": { "namespace": "shop", "name": name },
                "spec": { "hostNetwork": host },
                "status": { "phase": phase, "podIPs": [{ "ip": ip }] },
            })
        };
        let list = json!({ "items": [
            pod("web", "Running", false, "10.0.0.1"),
            pod("old", "Succeeded", false, "10.0.0.1"),
            pod("agent", "Running", true, "192.168.0.1"),
            pod("web-6", "Running", false, "fd00::1"),
        ] });
        let names = names_of(&list);
        assert_eq!(names.len(), 2);
        assert_eq!((&*names["10.0.0.1"], &*names[host("[fd00::1]:80")]), ("shop/web", "shop/web-6"));
        assert_eq!((host("10.0.0.1:80"), host("fd00::1")), ("10.0.0.1", "fd00::1"));
    }
}
