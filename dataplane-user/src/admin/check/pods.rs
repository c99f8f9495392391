//! `portolan check --pods`: whether Services work in the cluster as it is, tried from a pod on each node. It makes a namespace with a
//! DaemonSet of the agent's own image and Services of each kind, has the pods call them, and removes the namespace, whatever happens.

use super::probe::Asked;
use super::{CheckLine, CheckPage};
use crate::admin::AdminError;
use crate::admin::remote::{self, Answer, succeeded, words};
use crate::admin::status::Verdict;
use crate::config::CheckArgs;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::signal::unix::{SignalKind, signal};

/// By which the namespaces of this verb are found, should one be left.
const LABEL: &str = "app.kubernetes.io/managed-by=portolan-check";
/// The port of the servers.
const PORT: u16 = 8_080;
/// The port of the Services.
const SERVED: u16 = 80;
/// How long pods may take to be ready.
const START: Duration = Duration::from_secs(120);
/// For how long something is tried that does not work: Services and endpoints take a moment to come to each node.
const SETTLED: Duration = Duration::from_secs(15);
/// How often each is called.
const CALLS: u32 = 10;
/// Of how many nodes a pod calls the node ports.
const NEIGHBOURS: usize = 10;
/// How old a namespace must be to be taken for one that a killed run left.
const ABANDONED: Duration = Duration::from_secs(900);

/// A pod that calls and is called.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pod {
    name: String,
    node: String,
    addresses: Vec<IpAddr>,
    node_addresses: Vec<IpAddr>,
}

/// A Service: its addresses, and its node ports by protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Called {
    addresses: Vec<IpAddr>,
    node_ports: BTreeMap<String, u16>,
}

/// What was made, and what is known of it.
struct Trial {
    namespace: String,
    image: String,
    pull_secrets: Value,
    stopped: Arc<AtomicBool>,
}

/// Tries the cluster: all nodes, or one.
///
/// # Errors
/// If `kubectl` cannot be run, no agent is installed, the pods cannot be made, or somebody ended it.
pub async fn look(args: &CheckArgs) -> Result<CheckPage, AdminError> {
    let failed = |error| AdminError::End(format!("cannot wait for signals: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let (image, pull_secrets) = image(args.image.as_deref())?;
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let namespace = format!("portolan-check-{:x}", since.as_millis());
    let stopped = Arc::new(AtomicBool::new(false));
    let trial = Trial { namespace: namespace.clone(), image, pull_secrets, stopped: stopped.clone() };
    let only = args.show.node.clone();
    let mut trying = tokio::task::spawn_blocking(move || trial.run(only.as_deref()));
    let ended = tokio::select! {
        ended = &mut trying => Some(ended),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    stopped.store(true, Ordering::SeqCst);
    // Whoever still makes something there is refused.
    let removed = remove(&namespace);
    let outcome = match ended {
        Some(ended) => {
            ended.unwrap_or_else(|error| Err(AdminError::End(format!("the trial broke: {error}"))))
        }
        None => {
            let _ = tokio::time::timeout(Duration::from_secs(10), &mut trying).await;
            remove(&namespace)?;
            Err(AdminError::End("it was ended; what it had made is removed".to_owned()))
        }
    };
    removed?;
    outcome
}

/// The image of the agent, and the secrets by which it is pulled.
fn image(wanted: Option<&str>) -> Result<(String, Value), AdminError> {
    let select = ["get", "pods", "--all-namespaces", "--selector", remote::LABEL];
    let list = remote::objects(&select)?;
    let spec = list.pointer("/items/0/spec");
    let secrets = spec.map_or(Value::Null, |spec| spec["imagePullSecrets"].clone());
    let agents = spec.and_then(|spec| spec.pointer("/containers/0/image")).and_then(Value::as_str);
    match wanted.or(agents) {
        Some(image) => Ok((image.to_owned(), secrets)),
        None => Err(AdminError::End(format!(
            "no pod with the label {} runs: Portolan is not installed in this cluster, or name an --image",
            remote::LABEL
        ))),
    }
}

/// Removes the namespace with all that is in it, and waits for that.
fn remove(namespace: &str) -> Result<(), AdminError> {
    let delete = ["delete", "namespace", namespace, "--ignore-not-found", "--timeout=90s"];
    succeeded(&delete, remote::kubectl(&words(&delete), "")?).map(drop)
}

/// Removes what earlier runs left that were killed.
fn remove_abandoned() -> Result<(), AdminError> {
    let list = remote::objects(&["get", "namespaces", "--selector", LABEL])?;
    for namespace in list["items"].as_array().into_iter().flatten() {
        let text = |path: &str| namespace.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let created = crate::status::age(text("/metadata/creationTimestamp"), SystemTime::now());
        if created.is_some_and(|seconds| seconds > ABANDONED.as_secs()) {
            remove(text("/metadata/name"))?;
        }
    }
    Ok(())
}

impl Trial {
    fn run(&self, only: Option<&str>) -> Result<CheckPage, AdminError> {
        remove_abandoned()?;
        let apply = ["apply", "--filename", "-"];
        let text = serde_json::to_string(&objects(&self.namespace, &self.image, &self.pull_secrets))?;
        succeeded(&apply, self.kubectl(&apply, &text)?)?;
        let (pods, mut checks) = self.pods()?;
        let services = self.services()?;
        let callers = pods.iter().filter(|pod| only.is_none_or(|node| pod.node == node));
        let before = checks.len();
        for pod in callers {
            checks.extend(self.calls_of(pod, &pods, &services)?);
        }
        if checks.len() == before && checks.is_empty() {
            return Err(AdminError::End("no node has a pod to call from".to_owned()));
        }
        let verdict = checks.iter().map(|line| line.verdict).max().unwrap_or(Verdict::Well);
        Ok(CheckPage { verdict, installed: true, checks })
    }

    fn kubectl(&self, arguments: &[&str], input: &str) -> Result<Answer, AdminError> {
        if self.stopped.load(Ordering::SeqCst) {
            return Err(AdminError::End("it was ended".to_owned()));
        }
        remote::kubectl(&words(arguments), input)
    }

    fn list(&self, kind: &str) -> Result<Value, AdminError> {
        let arguments = ["get", kind, "--namespace", &self.namespace, "--output", "json"];
        Ok(serde_json::from_str(&succeeded(&arguments, self.kubectl(&arguments, "")?)?)?)
    }

    /// Waits for the pods. Those that are ready, and a line for each that is not.
    fn pods(&self) -> Result<(Vec<Pod>, Vec<CheckLine>), AdminError> {
        let begun = Instant::now();
        loop {
            let (set, pods) = (self.list("daemonsets")?, self.list("pods")?);
            let wanted = set.pointer("/items/0/status/desiredNumberScheduled").and_then(Value::as_u64);
            let (ready, waiting) = sorted(&pods);
            let all = wanted.is_some_and(|wanted| wanted > 0 && wanted == ready.len() as u64);
            if all || begun.elapsed() > START {
                let late = waiting.into_iter().map(|(node, why)| {
                    let helps = format!(
                        "`kubectl get pods --namespace {} --output wide` while it runs",
                        self.namespace
                    );
                    CheckLine::failing("a pod", format!("does not become ready: {why}"), helps).at(&node)
                });
                return Ok((ready, late.collect()));
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn services(&self) -> Result<BTreeMap<String, Called>, AdminError> {
        Ok(called(&self.list("services")?))
    }

    /// Has a pod call.
    fn ask(&self, pod: &Pod, target: &str, udp: bool, count: u32) -> Result<Asked, AdminError> {
        let count = format!("--count={count}");
        let mut arguments = vec![
            "exec",
            "--namespace",
            &self.namespace,
            &pod.name,
            "--",
            "portolan",
            "probe",
            "ask",
            target,
            &count,
        ];
        if udp {
            arguments.push("--udp");
        }
        let answer = self.kubectl(&arguments, "")?;
        // The client's own exit code says nothing more.
        serde_json::from_str(&answer.out)
            .map_err(|_| AdminError::End(format!("kubectl {}: {}", arguments.join(" "), answer.err.trim())))
    }

    /// The same again and again, until it is as it should be or for a while.
    fn settled(
        &self,
        pod: &Pod,
        (target, udp, count): (&str, bool, u32),
        is_well: impl Fn(&Asked) -> bool,
    ) -> Result<(bool, Asked), AdminError> {
        let begun = Instant::now();
        loop {
            let asked = self.ask(pod, target, udp, count)?;
            let well = is_well(&asked);
            if well || begun.elapsed() > SETTLED {
                return Ok((well, asked));
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn calls_of(
        &self,
        pod: &Pod,
        pods: &[Pod],
        services: &BTreeMap<String, Called>,
    ) -> Result<Vec<CheckLine>, AdminError> {
        let none = Called::default();
        let of = |name: &str| services.get(name).unwrap_or(&none);
        let mut lines = Vec::new();
        for address in &of("all").addresses {
            let to = SocketAddr::new(*address, SERVED);
            for udp in [false, true] {
                let (well, asked) = self.settled(pod, (&to.to_string(), udp, CALLS), all_answered)?;
                lines.push(line("ClusterIP", pod, &to.to_string(), udp, well, &asked));
            }
        }
        let name = format!("all.{}.svc:{SERVED}", self.namespace);
        let (well, asked) = self.settled(pod, (&name, false, 1), all_answered)?;
        lines.push(line("DNS", pod, &name, false, well, &asked));
        for address in &of("local").addresses {
            let to = SocketAddr::new(*address, SERVED).to_string();
            let is_own =
                |asked: &Asked| all_answered(asked) && asked.answers.iter().all(|it| it.pod == pod.name);
            let (well, asked) = self.settled(pod, (&to, false, CALLS), is_own)?;
            lines.push(line("hairpin, internalTrafficPolicy Local", pod, &to, false, well, &asked));
        }
        for address in &of("empty").addresses {
            let to = SocketAddr::new(*address, SERVED).to_string();
            let (well, asked) = self.settled(pod, (&to, false, 1), |asked| asked.refused == 1)?;
            lines.push(line("no endpoints: refused", pod, &to, false, well, &asked));
        }
        for (neighbour, address) in neighbours(pod, pods, &of("all").addresses) {
            for (protocol, port) in &of("all").node_ports {
                let (to, udp) = (SocketAddr::new(address, *port).to_string(), protocol == "UDP");
                let (well, asked) = self.settled(pod, (&to, udp, CALLS), all_answered)?;
                lines.push(line("node port", pod, &to, udp, well, &asked));
            }
            for port in of("local").node_ports.values() {
                let to = SocketAddr::new(address, *port).to_string();
                // From its own node it is the cluster's (P5), from elsewhere that node's.
                let is_there = |asked: &Asked| {
                    let there = |it: &super::probe::Answer| it.node == neighbour || neighbour == pod.node;
                    all_answered(asked) && asked.answers.iter().all(there)
                };
                let (well, asked) = self.settled(pod, (&to, false, CALLS), is_there)?;
                lines.push(line("externalTrafficPolicy Local", pod, &to, false, well, &asked));
            }
        }
        Ok(lines)
    }
}

fn all_answered(asked: &Asked) -> bool {
    asked.refused == 0 && asked.timed_out == 0 && asked.failed.is_empty() && !asked.answers.is_empty()
}

/// The nodes whose ports a pod calls: its own and those behind it in turn, by an address of each family that Services have.
fn neighbours(pod: &Pod, pods: &[Pod], services: &[IpAddr]) -> Vec<(String, IpAddr)> {
    let at = pods.iter().position(|other| other.node == pod.node).unwrap_or_default();
    let families: BTreeSet<_> = services.iter().map(IpAddr::is_ipv4).collect();
    let in_turn = pods.iter().cycle().skip(at).take(pods.len().min(NEIGHBOURS));
    in_turn
        .flat_map(|other| other.node_addresses.iter().map(|address| (other.node.clone(), *address)))
        .filter(|(_, address)| families.contains(&address.is_ipv4()))
        .collect()
}

/// What came of it, for people.
fn line(check: &'static str, pod: &Pod, to: &str, udp: bool, well: bool, asked: &Asked) -> CheckLine {
    let protocol = if udp { "UDP" } else { "TCP" };
    let nodes: BTreeSet<_> = asked.answers.iter().map(|answer| answer.node.as_str()).collect();
    let nodes: Vec<_> = nodes.into_iter().collect();
    let mut parts = Vec::new();
    if !asked.answers.is_empty() {
        parts.push(format!("{} answered, by {}", asked.answers.len(), nodes.join(", ")));
    }
    if asked.refused > 0 {
        parts.push(format!("{} refused", asked.refused));
    }
    if asked.timed_out > 0 {
        parts.push(format!("{} without an answer", asked.timed_out));
    }
    parts.extend(asked.failed.first().cloned());
    let found = format!("{protocol} {to}: {}", parts.join("; "));
    if well {
        return CheckLine::well(check, found).at(&pod.node);
    }
    let is_v4 = to.parse::<SocketAddr>().map_or(true, |to| to.is_ipv4());
    let from = pod.addresses.iter().find(|address| address.is_ipv4() == is_v4);
    let helps = match (from, to.parse::<SocketAddr>()) {
        (Some(from), Ok(_)) => format!(
            "`portolan explain --node {} {from} {to} --protocol {}` tells why, and `portolan watch --node {}` shows it as it \
             happens",
            pod.node,
            protocol.to_lowercase(),
            pod.node
        ),
        _ => format!(
            "if ClusterIPs answer, look at the cluster's DNS: `portolan explain --node {} node 'kube-system/kube-dns:dns'`",
            pod.node
        ),
    };
    CheckLine::failing(check, found, helps).at(&pod.node)
}

/// Pods that are ready, and the node of each that is not, with why.
fn sorted(list: &Value) -> (Vec<Pod>, Vec<(String, String)>) {
    let (mut ready, mut waiting) = (Vec::new(), Vec::new());
    for pod in list["items"].as_array().into_iter().flatten() {
        let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let addresses = |path: &str| -> Vec<IpAddr> {
            let all = pod.pointer(path).and_then(Value::as_array).into_iter().flatten();
            all.filter_map(|address| address["ip"].as_str()?.parse().ok()).collect()
        };
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let is_ready = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
        let node = text("/spec/nodeName");
        if is_ready {
            let name = text("/metadata/name");
            let (addresses, node_addresses) = (addresses("/status/podIPs"), addresses("/status/hostIPs"));
            ready.push(Pod { name, node, addresses, node_addresses });
        } else {
            let why = pod.pointer("/status/containerStatuses/0/state/waiting/reason").and_then(Value::as_str);
            waiting.push((node, why.map_or_else(|| text("/status/phase"), str::to_owned)));
        }
    }
    ready.sort_by(|a: &Pod, b: &Pod| a.node.cmp(&b.node));
    (ready, waiting)
}

fn called(list: &Value) -> BTreeMap<String, Called> {
    let mut services = BTreeMap::new();
    for service in list["items"].as_array().into_iter().flatten() {
        let Some(name) = service.pointer("/metadata/name").and_then(Value::as_str) else { continue };
        let all = service.pointer("/spec/clusterIPs").and_then(Value::as_array).into_iter().flatten();
        let addresses = all.filter_map(|address| address.as_str()?.parse().ok()).collect();
        let ports = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
        let node_ports = ports.filter_map(|port| {
            let number = u16::try_from(port["nodePort"].as_u64()?).ok()?;
            Some((port["protocol"].as_str()?.to_owned(), number))
        });
        services.insert(name.to_owned(), Called { addresses, node_ports: node_ports.collect() });
    }
    services
}

/// All that is made.
fn objects(namespace: &str, image: &str, pull_secrets: &Value) -> Value {
    let (label, value) = LABEL.split_once('=').unwrap_or((LABEL, ""));
    let app = json!({ "app": "portolan-probe" });
    let meta = |name: &str| json!({ "name": name, "namespace": namespace });
    let ports = |protocols: &[&str]| -> Value {
        let port = |protocol: &&str| json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": SERVED, "targetPort": PORT });
        protocols.iter().map(port).collect()
    };
    let service = |name: &str, spec: Value| {
        let mut spec = spec;
        spec["ipFamilyPolicy"] = "PreferDualStack".into();
        json!({ "apiVersion": "v1", "kind": "Service", "metadata": meta(name), "spec": spec })
    };
    let container = json!({
        "name": "probe",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["probe", "serve", format!("--port={PORT}")],
        "env": [
            { "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } },
            { "name": "POD_NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
        ],
        "ports": [{ "containerPort": PORT, "protocol": "TCP" }, { "containerPort": PORT, "protocol": "UDP" }],
        "readinessProbe": { "tcpSocket": { "port": PORT }, "periodSeconds": 1 },
        "resources": { "requests": { "cpu": "1m", "memory": "8Mi" }, "limits": { "memory": "64Mi" } },
        "securityContext": {
            "readOnlyRootFilesystem": true,
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
        },
    });
    let pod = json!({
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": 0,
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "tolerations": [{ "operator": "Exists" }],
        "imagePullSecrets": pull_secrets,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": 65_534, "runAsGroup": 65_534, "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [container],
    });
    json!({ "apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": { "name": namespace, "labels": { label: value } },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": meta("probe"),
            "spec": {
                "selector": { "matchLabels": app },
                "template": { "metadata": { "labels": app }, "spec": pod },
            },
        },
        service("all", json!({ "type": "NodePort", "selector": app, "ports": ports(&["TCP", "UDP"]) })),
        service("local", json!({
            "type": "NodePort",
            "selector": app,
            "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Local",
            "ports": ports(&["TCP"]),
        })),
        service("empty", json!({ "selector": { "app": "nobody" }, "ports": ports(&["TCP"]) })),
    ] })
}

#[cfg(test)]
mod tests {
    use super::super::probe;
    use super::*;

    fn pod(name: &str, node: &str, last: u8) -> Pod {
        Pod {
            name: name.to_owned(),
            node: node.to_owned(),
            addresses: vec![[10, 244, 0, last].into()],
            node_addresses: vec![[192, 168, 0, last].into(), "fd00::1".parse().unwrap()],
        }
    }

    #[test]
    fn a_line_tells_who_answered_or_what_helps() {
        let answer = |node: &str| probe::Answer { node: node.to_owned(), ..probe::Answer::default() };
        let asked = Asked { answers: vec![answer("b"), answer("a"), answer("b")], ..Asked::default() };
        assert!(all_answered(&asked));
        let well = line("ClusterIP", &pod("p", "a", 1), "10.96.0.1:80", false, true, &asked);
        assert_eq!((well.verdict, well.node.as_deref()), (Verdict::Well, Some("a")));
        assert_eq!(well.found, "TCP 10.96.0.1:80: 3 answered, by a, b");
        let asked = Asked { timed_out: 2, ..asked };
        assert!(!all_answered(&asked));
        let failing = line("ClusterIP", &pod("p", "a", 1), "10.96.0.1:80", true, false, &asked);
        let helps = failing.helps.unwrap();
        assert!(helps.contains("explain --node a 10.244.0.1 10.96.0.1:80 --protocol udp"), "{helps}");
        assert!(failing.found.ends_with("2 without an answer"), "{}", failing.found);
        assert!(!all_answered(&Asked::default()), "nothing came");
    }

    #[test]
    fn node_ports_are_called_of_some_nodes_and_of_the_families_that_services_have() {
        let pods: Vec<_> = (0..30).map(|n| pod("p", &format!("node-{n:02}"), n)).collect();
        let called = neighbours(&pods[28], &pods, &["10.96.0.1".parse().unwrap()]);
        let nodes: Vec<_> = called.iter().map(|(node, _)| node.as_str()).collect();
        assert_eq!(nodes[..4], ["node-28", "node-29", "node-00", "node-01"]);
        assert_eq!(nodes.len(), NEIGHBOURS);
        assert!(called.iter().all(|(_, address)| address.is_ipv4()));
    }

    #[test]
    fn pods_that_are_not_ready_are_named_with_why() {
        let list = json!({ "items": [
            { "metadata": { "name": "p" }, "spec": { "nodeName": "a" }, "status": {
                "podIPs": [{ "ip": "10.0.0.1" }], "hostIPs": [{ "ip": "192.168.0.1" }],
                "conditions": [{ "type": "Ready", "status": "True" }],
            } },
            { "metadata": { "name": "q" }, "spec": { "nodeName": "b" }, "status": {
                "phase": "Pending",
                "containerStatuses": [{ "state": { "waiting": { "reason": "ImagePullBackOff" } } }],
            } },
        ] });
        let (ready, waiting) = sorted(&list);
        assert_eq!((ready.len(), ready[0].node_addresses.len()), (1, 1));
        assert_eq!(waiting, [("b".to_owned(), "ImagePullBackOff".to_owned())]);
    }

    #[test]
    fn services_are_called_at_all_their_addresses() {
        let list = json!({ "items": [{ "metadata": { "name": "all" }, "spec": {
            "clusterIPs": ["10.96.0.1", "fd00::1"],
            "ports": [{ "protocol": "TCP", "nodePort": 30_001 }, { "protocol": "UDP", "nodePort": 30_002 }],
        } }] });
        let all = &called(&list)["all"];
        assert_eq!((all.addresses.len(), all.node_ports["TCP"], all.node_ports["UDP"]), (2, 30_001, 30_002));
        let made = objects("n", "i", &Value::Null);
        let kinds: Vec<_> =
            made["items"].as_array().unwrap().iter().map(|it| it["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["Namespace", "DaemonSet", "Service", "Service", "Service"]);
    }
}
