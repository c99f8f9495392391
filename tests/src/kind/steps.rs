//! The steps of the tour in a kind cluster: everything by `kubectl`, and a client outside in Docker's network.

use super::ask::parse;
use super::cluster::{Cluster, wait};
use super::docker::NETWORK;
use super::install::{agents, portolan, remains, uninstall};
use super::objects::{LOCAL_PORT, NAMESPACE, NODE_PORT, NODES, PODS, PORT, SHELL};
use super::{LAB_IMAGE, undo};
use crate::lab::{Answer, Asked, Failure};
use crate::tour::{Narration, Tally};
use anyhow::{Context as _, Result, ensure};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Requests from which the spread over endpoints is told. One of three is missed with a probability below 1 in a million.
const MANY: u32 = 40;
/// Milliseconds between two questions of somebody who asks all the time.
const PAUSE: u32 = 20;

type Step = fn(&Tour, &mut Narration) -> Result<()>;

/// The steps in their order.
pub(super) const STEPS: [(&str, Step); 10] = [
    ("What Portolan says of itself", Tour::status),
    ("A name and a ClusterIP from a pod", Tour::a_pod_asks),
    ("A ClusterIP from every node", Tour::nodes_ask),
    ("The node port of every node from outside", Tour::node_ports),
    ("externalTrafficPolicy Cluster and Local side by side", Tour::policies),
    ("Why a connection goes where it goes", Tour::explain),
    ("Every node is tried from pods of its own", Tour::tries_from_pods),
    ("All nodes are watched from a workstation", Tour::watch),
    ("A pod goes away and the traffic moves on", Tour::a_pod_leaves),
    ("All agents are replaced under load", Tour::restart),
];
/// The last step where the run ends at once.
pub(super) const UNINSTALL: (&str, Step) = ("Uninstalled, nothing is left on a node", Tour::uninstall);

/// After it, where the cluster was made for this run: kube-proxy is brought in, and Portolan takes its place.
pub(super) const TAKE_OVER: (&str, Step) =
    ("kube-proxy serves, and Portolan takes its place", Tour::take_over);

/// What the steps look at.
pub(super) struct Tour {
    pub(super) cluster: Cluster,
}

/// Where somebody asks from.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// A pod of the tour's namespace.
    Pod(&'a str),
    Outside,
}

/// Prints how the agent's process on a node is held by seccomp (`/proc/PID/status`).
const SECCOMP_OF_THE_AGENT: &str = "for process in /proc/[0-9]*; do \
     tr '\\0' ' ' <$process/cmdline | grep -q '^[^ ]*portolan agent' && \
     sed -n 's/^Seccomp:[[:space:]]*//p' $process/status; done 2>/dev/null; true";
/// By a filter (`SECCOMP_MODE_FILTER`).
const FILTERED: &str = "2";

impl Tour {
    fn ask(&self, from: Place<'_>, target: &str, more: &[&str]) -> Result<Tally> {
        let question = [&["ask", target], more].concat();
        let text = match from {
            Place::Pod(pod) => {
                let exec = ["exec", "--namespace", NAMESPACE, pod, "--", "/bin/portolan-lab"];
                self.cluster.kubectl(&[&exec, question.as_slice()].concat(), "")?
            }
            Place::Outside => {
                let run = ["run", "--rm", "--network", NETWORK, LAB_IMAGE];
                self.cluster.docker.docker(&[&run, question.as_slice()].concat())?
            }
        };
        Ok(parse(&text).into_iter().collect())
    }

    pub(super) fn once(&self, from: Place<'_>, target: &str, more: &[&str]) -> Result<Asked> {
        let tally = self.ask(from, target, more)?;
        let mut answers = tally.answers.into_iter().map(Ok).chain(tally.failures.into_iter().map(Err));
        answers.next().context("nobody asked")
    }

    fn many(&self, from: Place<'_>, to: &SocketAddr, udp: bool) -> Result<Tally> {
        let count = MANY.to_string();
        let udp: &[&str] = if udp { &["--udp"] } else { &[] };
        self.ask(from, &to.to_string(), &[&["--count", count.as_str()], udp].concat())
    }

    /// The names, nodes and addresses of the tour's pods that have a label `app`.
    pub(super) fn pods(&self, app: &str) -> Result<Vec<(String, String, Vec<IpAddr>)>> {
        let pods = self.cluster.list("pods", NAMESPACE)?;
        let mut found = Vec::new();
        for pod in pods.iter().filter(|pod| pod["metadata"]["labels"]["app"] == app) {
            let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
            let name = text(&pod["metadata"]["name"]).context("a pod without a name")?;
            let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
            let addresses = addresses.filter_map(|address| address["ip"].as_str()).map(str::parse);
            let addresses = addresses.collect::<Result<Vec<_>, _>>()?;
            if let Some(node) = text(&pod["spec"]["nodeName"]).filter(|_| !addresses.is_empty()) {
                found.push((name, node, addresses));
            }
        }
        found.sort();
        Ok(found)
    }

    fn shell(&self) -> Result<Vec<IpAddr>> {
        let pods = self.pods(SHELL)?;
        Ok(pods.into_iter().next().context("there is no pod `shell`")?.2)
    }

    /// The ClusterIPs of the Service `web` with its port, one of each IP family.
    pub(super) fn cluster_ips(&self) -> Result<Vec<SocketAddr>> {
        let path = "--output=jsonpath={.spec.clusterIPs[*]}";
        let text = self.cluster.kubectl(&["get", "service", "web", "--namespace", NAMESPACE, path], "")?;
        text.split_whitespace().map(|address| Ok(SocketAddr::new(address.parse()?, PORT))).collect()
    }

    /// Where a port of a node is asked for, by each IP family that Services have.
    pub(super) fn at_node(&self, node: &str, port: u16) -> Result<Vec<SocketAddr>> {
        let families: Vec<_> = self.cluster_ips()?.iter().map(SocketAddr::is_ipv4).collect();
        let addresses = self.cluster.addresses(node)?.into_iter();
        let served = addresses.filter(|address| families.contains(&address.is_ipv4()));
        Ok(served.map(|address| SocketAddr::new(address, port)).collect())
    }

    fn status(&self, say: &mut Narration) -> Result<()> {
        say.tell("helm test portolan --namespace kube-system");
        let tested = self.cluster.helm(&["test", "portolan", "--namespace=kube-system", "--timeout=180s"])?;
        say.check(tested.contains("Succeeded"), "the chart's own test succeeds");
        for (number, (node, pod)) in agents(&self.cluster)?.iter().enumerate() {
            say.tell(&format!("kubectl exec --namespace kube-system {pod} -- portolan status"));
            let status = portolan(&self.cluster, pod, &["status"])?;
            if number == 0 {
                say.quote(&status);
            }
            say.check(status.contains("all is well"), &format!("{node}: all is well"));
            let check = portolan(&self.cluster, pod, &["check"])?;
            if check.contains('✗') {
                say.quote(&check);
            }
            say.check(!check.contains('✗'), &format!("{node}: `portolan check` finds nothing wrong"));
            let mode = self.cluster.on_node(node, &["sh", "-c", SECCOMP_OF_THE_AGENT], "")?;
            say.check(mode.trim() == FILTERED, &format!("{node}: a seccomp profile holds for the agent"));
        }
        Ok(())
    }

    fn a_pod_asks(&self, say: &mut Narration) -> Result<()> {
        let (own, addresses) = (self.shell()?, self.cluster_ips()?);
        say.tell(&format!("Service web is {}; the pod {SHELL} is {}", list(&addresses), list(&own)));
        let by_name = format!("web.{NAMESPACE}.svc.cluster.local:{PORT}");
        let mut right = true;
        for more in [[].as_slice(), &["--udp"]] {
            let answer = self.once(Place::Pod(SHELL), &by_name, more)?;
            say.asked(&format!("{SHELL}: {} web:{PORT}", protocol(!more.is_empty())), &answer);
            right &= answer.is_ok_and(|answer| own.contains(&answer.client_ip()));
        }
        say.check(right, "cluster DNS knows the name, and the pods see the pod's own address (P9)");
        for to in &addresses {
            for udp in [false, true] {
                let tally = self.many(Place::Pod(SHELL), to, udp)?;
                say.seen(&format!("{SHELL}: {MANY} × {} {to}", protocol(udp)), &tally);
                say.check(all_answer(&tally, PODS.len()), "all three pods take their part and none fails");
            }
            let unused = SocketAddr::new(to.ip(), 81);
            let answer = self.once(Place::Pod(SHELL), &unused.to_string(), &[])?;
            say.asked(&format!("{SHELL}: TCP {unused}, a port of no Service"), &answer);
            say.check(answer == Err(Failure::Refused), "refused at once (P13)");
        }
        Ok(())
    }

    fn nodes_ask(&self, say: &mut Narration) -> Result<()> {
        for (pod, node, _) in self.pods(NODES)? {
            for to in self.cluster_ips()? {
                for udp in [false, true] {
                    let tally = self.many(Place::Pod(&pod), &to, udp)?;
                    say.seen(&format!("{node}: {} {to}", protocol(udp)), &tally);
                    say.check(all_answer(&tally, PODS.len()), "all pods answer");
                }
            }
            let loopback = self.once(Place::Pod(&pod), &format!("127.0.0.1:{NODE_PORT}"), &[])?;
            say.asked(&format!("{node}: TCP 127.0.0.1:{NODE_PORT}"), &loopback);
            say.check(loopback.is_ok(), "its node port answers on 127.0.0.1 as well (S3)");
        }
        Ok(())
    }

    fn node_ports(&self, say: &mut Narration) -> Result<()> {
        for node in self.cluster.nodes()? {
            for to in self.at_node(&node, NODE_PORT)? {
                let mut right = true;
                let mut sources = BTreeSet::new();
                for udp in [false, true] {
                    let tally = self.many(Place::Outside, &to, udp)?;
                    right &= all_answer(&tally, PODS.len());
                    if let Some(failure) = tally.failures.first() {
                        say.seen(&format!("outside: {} {to}", protocol(udp)), failure);
                    }
                    let seen = tally.answers.into_iter();
                    sources.extend(
                        seen.map(|answer| (answer.pod.clone(), answer.node.clone(), answer.client_ip())),
                    );
                }
                for (pod, on, source) in sources {
                    say.seen(&format!("outside: TCP and UDP {to}"), format!("{pod} on {on} saw {source}"));
                }
                say.check(right, &format!("{node} serves all pods (P4)"));
            }
        }
        Ok(())
    }

    fn policies(&self, say: &mut Narration) -> Result<()> {
        let pods = self.pods("web")?;
        for node in self.cluster.nodes()? {
            let has_pods = pods.iter().any(|(_, on, _)| *on == node);
            let [cluster, local] = [NODE_PORT, LOCAL_PORT].map(|port| self.at_node(&node, port));
            for (to, to_local) in cluster?.into_iter().zip(local?) {
                let cluster = self.once(Place::Outside, &to.to_string(), &[])?;
                say.asked(&format!("outside: {to} (Cluster)"), &cluster);
                let local = self.once(Place::Outside, &to_local.to_string(), &["--timeout", "1000"])?;
                say.asked(&format!("outside: {to_local} (Local)"), &local);
                say.check(cluster.is_ok(), &format!("Cluster: {node} answers (P4)"));
                if has_pods {
                    let kept = |answer: &Answer| answer.node == node && answer.client_ip() != to.ip();
                    let right = local.as_ref().is_ok_and(kept);
                    say.check(right, "Local: a pod of this node answers and sees the client (P7)");
                } else {
                    say.check(local == Err(Failure::TimedOut), "Local: a node without a pod is silent (P3)");
                }
            }
        }
        Ok(())
    }

    fn explain(&self, say: &mut Narration) -> Result<()> {
        let node = self.pods(SHELL)?.first().context("there is no pod `shell`")?.1.clone();
        let (_, pod) =
            agents(&self.cluster)?.into_iter().find(|(on, _)| *on == node).context("no agent there")?;
        for to in self.cluster_ips()? {
            let shell = self.shell()?.into_iter().find(|own| own.is_ipv4() == to.is_ipv4());
            let shell = shell.context("the shell has no address of that family")?.to_string();
            say.tell(&format!("portolan explain {shell} {to}, on {node}"));
            let text = portolan(&self.cluster, &pod, &["explain", &shell, &to.to_string()])?;
            say.quote(&text);
            let same = |address: &&IpAddr| address.is_ipv4() == to.is_ipv4();
            let pods = self.pods("web")?;
            let mut endpoints = pods.iter().filter_map(|(_, _, addresses)| addresses.iter().find(same));
            let all = endpoints.all(|address| text.contains(&address.to_string()));
            say.check(
                text.contains("✓ would connect") && all,
                "it names every endpoint, and says that it would connect",
            );
        }
        Ok(())
    }

    fn tries_from_pods(&self, say: &mut Narration) -> Result<()> {
        let all = ["check", "--pods"];
        say.tell(&format!("portolan {}", all.join(" ")));
        let output = undo::attempt(&mut self.cluster.portolan_command(&all)?, "")?;
        say.quote(&(String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr)));
        say.check(
            output.status.success(),
            "ClusterIPs, node ports, DNS, hairpin and policies work from a pod of every node",
        );
        say.check(self.trials()? == 0, "the namespace of the pods is gone");
        say.tell("portolan check --pods, and Ctrl-C in the middle");
        let mut command = self.cluster.portolan_command(&all)?;
        let mut ended = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("portolan")?;
        wait("its namespace is made", || Ok(self.trials()? == 1))?;
        // SAFETY: a plain system call on a child that was not waited for.
        unsafe { libc::kill(ended.id() as i32, libc::SIGINT) };
        say.check(!ended.wait()?.success(), "it ends");
        say.check(self.trials()? == 0, "its namespace is gone all the same");
        Ok(())
    }

    /// How many namespaces of `portolan check --pods` there are.
    fn trials(&self) -> Result<usize> {
        let names = self.cluster.kubectl(&["get", "namespaces", "--output=name"], "")?;
        Ok(names.lines().filter(|name| name.contains("portolan-check-")).count())
    }

    fn watch(&self, say: &mut Narration) -> Result<()> {
        let service = format!("{NAMESPACE}/web");
        let command = [
            "watch",
            "--all-nodes",
            "--service",
            &service,
            "--pod",
            SHELL,
            "--event",
            "ended",
            "--count",
            "3",
        ];
        say.tell(&format!("portolan {}", command.join(" ")));
        let all = [command.as_slice(), &["--output", "json"]].concat();
        let mut command = self.cluster.portolan_command(&all)?;
        let watching = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("portolan")?;
        let watching = RefCell::new(watching);
        let web = self.cluster_ips()?.into_iter().next().context("web has no ClusterIP")?;
        let asked = wait("three connections have ended", || {
            self.once(Place::Pod(SHELL), &web.to_string(), &[])?
                .map_err(|failure| anyhow::anyhow!("{failure}"))?;
            Ok(watching.borrow_mut().try_wait()?.is_some())
        });
        // One that saw fewer is not waited for.
        let mut watching = watching.into_inner();
        let _ = watching.kill();
        let text = String::from_utf8_lossy(&watching.wait_with_output()?.stdout).into_owned();
        asked?;
        let events: Vec<serde_json::Value> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        for event in &events {
            say.seen(
                "ended",
                format!("{} → {} on {}", event["client_name"], event["endpoint_name"], event["node"]),
            );
        }
        let (shell, node) = (format!("{NAMESPACE}/{SHELL}"), self.pods(SHELL)?[0].1.clone());
        let right = |event: &serde_json::Value| {
            let endpoint = event["endpoint_name"].as_str().unwrap_or_default();
            event["client_name"] == shell.as_str()
                && endpoint.starts_with(&format!("{NAMESPACE}/web-"))
                && event["bytes_out"].as_u64() > Some(0)
        };
        say.check(
            events.len() == 3 && events.iter().all(right),
            "pods have their names at both ends, and what passed is told",
        );
        self.report(say)?;
        let first = events.first().is_some_and(|event| event["node"] == node.as_str());
        say.check(first, &format!("the node that did it is {node}, where the client is"));
        Ok(())
    }

    /// One archive of all nodes.
    fn report(&self, say: &mut Narration) -> Result<()> {
        let file = self.cluster.folder().join("report.tar.gz").display().to_string();
        let command = ["report", "--all-nodes", "--output", &file];
        say.tell(&format!("portolan {}", command.join(" ")));
        undo::output(&mut self.cluster.portolan_command(&command)?, "")?;
        let list = undo::output(Command::new("tar").args(["-tzf", &file]), "")?;
        let files: BTreeSet<&str> = list.lines().collect();
        let has = |node: &str, name: &str| files.contains(format!("portolan-report/{node}/{name}").as_str());
        let parts = ["status.json", "check.json", "flows.json", "metrics.txt", "log.txt"];
        let nodes = self.cluster.nodes()?;
        let whole = nodes.iter().all(|node| parts.iter().all(|name| has(node, name)));
        if !whole {
            say.quote(&list);
        }
        say.check(whole, "it has what every node reports, and the logs of the agents");
        Ok(())
    }

    fn a_pod_leaves(&self, say: &mut Narration) -> Result<()> {
        let web = self.cluster_ips()?.into_iter().next().context("web has no ClusterIP")?;
        let (leaving, left) = (PODS[2], PODS.len() - 1);
        say.tell(&format!("kubectl scale statefulset web --replicas={left}: {leaving} is to go"));
        let scale = |replicas: usize| {
            let replicas = format!("--replicas={replicas}");
            self.cluster.kubectl(&["scale", "statefulset", "web", &replicas, "--namespace", NAMESPACE], "")
        };
        scale(left)?;
        let asked = ["--count", "200", "--pause", "50"];
        let during = self.ask(Place::Pod(SHELL), &web.to_string(), &asked)?;
        say.seen("200 connections meanwhile", &during);
        say.check(during.failures.is_empty(), "while it drains and goes, none fails (T5)");
        wait("it is gone", || Ok(self.pods("web")?.len() == left))?;
        let after = self.many(Place::Pod(SHELL), &web, false)?;
        say.seen(&format!("{MANY} connections"), &after);
        say.check(all_answer(&after, left), "two pods serve, none fails");
        scale(PODS.len())?;
        wait("it is back", || Ok(all_answer(&self.many(Place::Pod(SHELL), &web, false)?, PODS.len())))
    }

    fn restart(&self, say: &mut Narration) -> Result<()> {
        let asking = Asking::begin(self)?;
        say.tell("kubectl rollout restart --namespace kube-system daemonset portolan");
        let before: BTreeSet<_> = agents(&self.cluster)?.into_iter().map(|(_, pod)| pod).collect();
        self.cluster
            .kubectl(&["rollout", "restart", "--namespace=kube-system", "daemonset", "portolan"], "")?;
        let status =
            ["rollout", "status", "--namespace=kube-system", "daemonset", "portolan", "--timeout=240s"];
        self.cluster.kubectl(&status, "")?;
        let after: BTreeSet<_> = agents(&self.cluster)?.into_iter().map(|(_, pod)| pod).collect();
        say.check(before.is_disjoint(&after), "every agent is a new one");
        let tally = asking.end()?;
        say.seen(&format!("{} connections meanwhile", tally.answers.len() + tally.failures.len()), &tally);
        say.check(tally.answers.len() > 100 && tally.failures.is_empty(), "no connection fails (C3)");
        Ok(())
    }

    fn uninstall(&self, say: &mut Narration) -> Result<()> {
        say.tell("helm uninstall portolan --namespace kube-system; kubectl apply -f deploy/cleanup.yaml");
        uninstall(&self.cluster)?;
        for node in self.cluster.nodes()? {
            let left = remains(&self.cluster, &node)?;
            say.quote(&left);
            say.check(
                left.is_empty(),
                &format!("{node}: no program, map, link, route, rule or file is left"),
            );
            for to in self.at_node(&node, NODE_PORT)? {
                let closed = self.once(Place::Outside, &to.to_string(), &[])?;
                say.asked(&format!("outside: {to}"), &closed);
                say.check(closed == Err(Failure::Refused), "its node port is closed");
            }
        }
        Ok(())
    }
}

/// The pod `shell` asks the Service `web` again and again, by connections, until it is told to end.
pub(super) struct Asking {
    asker: Child,
    answers: PathBuf,
}

impl Asking {
    pub(super) fn begin(tour: &Tour) -> Result<Self> {
        let web = tour.cluster_ips()?.into_iter().next().context("web has no ClusterIP")?.to_string();
        // Nobody reads meanwhile, and a pipe would be full soon.
        let answers = tour.cluster.folder().join("answers");
        let pause = PAUSE.to_string();
        let mut command = tour.cluster.kubectl_command();
        command.args(["exec", "--namespace", NAMESPACE, SHELL, "--", "/bin/portolan-lab", "ask", &web]);
        command.args(["--count", "1000000", "--pause", &pause]);
        command.stdin(Stdio::null()).stdout(File::create(&answers)?).stderr(Stdio::null());
        Ok(Self { asker: command.spawn().context("kubectl exec")?, answers })
    }

    /// All that was answered, but for what may be half a line.
    pub(super) fn end(mut self) -> Result<Tally> {
        ensure!(self.asker.try_wait()?.is_none(), "kubectl exec has ended by itself");
        self.asker.kill()?;
        self.asker.wait()?;
        let text = fs::read_to_string(&self.answers)?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Ok(parse(whole).into_iter().collect())
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let _ = self.asker.kill();
        let _ = self.asker.wait();
    }
}

const fn protocol(udp: bool) -> &'static str {
    if udp { "UDP" } else { "TCP" }
}

fn list(all: &[impl ToString]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

/// Whether so many pods answered, and nothing failed.
fn all_answer(tally: &Tally, pods: usize) -> bool {
    tally.failures.is_empty() && tally.pods().len() == pods
}

/// Says what the agents said last, where something went wrong.
pub(super) fn tell_logs(cluster: &Cluster) {
    for (node, pod) in agents(cluster).unwrap_or_default() {
        let mut logs = cluster.kubectl_command();
        logs.args(["logs", "--namespace=kube-system", &pod, "--all-containers", "--tail=30"]);
        if let Ok(output) = undo::attempt(&mut logs, "") {
            println!("--- the agent of {node}\n{}", String::from_utf8_lossy(&output.stdout));
        }
    }
}
