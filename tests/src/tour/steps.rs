//! The steps of the tour. Each asks real servers, shows the answers and checks them against the contract.

use super::narration::{Narration, Tally};
use super::world::{
    BARE_NODE, CHANCE, LEAST, LEAVING, LOCAL_PORT, NODE_PORT, PODS, PORT, SERIAL_PORT, SHELL, TRIES,
    TRIES_NODE_PORT, TRIES_PORT, WEB, World, pod, wait,
};
use crate::deaf::Deaf;
use crate::lab::{Asked, Client, Failure, Lab, ask_datagram, at};
use crate::serial::{self, Server};
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// Requests from which the spread over endpoints is told. One of three is missed with a probability below 1 in a million.
const MANY: usize = 40;
/// How long silence must last to count as a drop.
const SILENCE: Duration = Duration::from_millis(700);
/// The headless Service of the StatefulSet, where there is a cluster.
const NGINX: &str = "nginx.default.svc.cluster.local";
/// Clients of each algorithm that is shown.
const SLOW_CLIENTS: u32 = 120;
/// Clients from each place where two of three endpoints do not serve: that chance sends none of them to one of these has a probability of
/// 1 in 10^10.
const TRYING_CLIENTS: u32 = 60;
/// Entries of a dump that are shown.
const DUMP_ENTRIES: usize = 2;

/// One step.
type Step = fn(&Tour, &mut Narration) -> Result<()>;

/// The steps in their order.
pub(crate) const STEPS: [(&str, Step); 10] = [
    ("A ClusterIP from a pod", Tour::cluster_ip_from_a_pod),
    ("A ClusterIP from a node", Tour::cluster_ip_from_a_node),
    ("The node port on 127.0.0.1 of a node", Tour::loopback),
    ("The node port of every node from outside", Tour::node_ports),
    ("externalTrafficPolicy Cluster and Local side by side", Tour::policies),
    ("Least-connections beside random, with one slow pod", Tour::a_slow_pod),
    ("One pod of three refuses, one is silent, and no client fails", Tour::dead_pods),
    ("A pod goes away and the traffic moves on", Tour::a_pod_leaves),
    ("The endpoints' counters", Tour::counters),
    ("A map as bpftool shows it", Tour::a_map),
];

/// The steps that only a cluster has.
pub(crate) const CLUSTER_STEPS: [(&str, Step); 1] =
    [("Names: a headless Service, a pod that is replaced, an ExternalName", Tour::names)];

/// What the steps look at.
pub(crate) struct Tour {
    pub(crate) lab: Lab,
    pub(crate) world: World,
}

/// What `portolan services` says of second tries.
#[derive(serde::Deserialize)]
struct ServiceTries {
    name: String,
    tries: Moved,
}

#[derive(serde::Deserialize)]
struct Moved {
    silent: u64,
    refused: u64,
    rescued: u64,
}

/// Whether it was a pod of the Service that answered, and saw this client.
fn from(answer: &Asked, client: Ipv4Addr) -> bool {
    answer
        .as_ref()
        .is_ok_and(|answer| PODS.contains(&answer.pod.as_str()) && answer.client.ip() == IpAddr::V4(client))
}

impl Tour {
    fn shell(&self) -> Result<Client> {
        Ok(Client::at(pod(&self.lab, SHELL)?.place()))
    }

    fn cluster_ip_from_a_pod(&self, say: &mut Narration) -> Result<()> {
        let shell = self.shell()?;
        let own = pod(&self.lab, SHELL)?.address();
        say.tell(&format!("Service web is {WEB}:{PORT}; the pod {SHELL} is {own}"));
        let tcp = shell.tcp(at(WEB, PORT));
        say.asked(&format!("{SHELL}: TCP {WEB}:{PORT}"), &tcp);
        let udp = shell.udp(at(WEB, PORT));
        say.asked(&format!("{SHELL}: UDP {WEB}:{PORT}"), &udp);
        say.check(
            from(&tcp, own) && from(&udp, own),
            "pods of the Service answer and see the pod's own address (P9)",
        );
        let tally = Tally::of(MANY, || shell.tcp(at(WEB, PORT)));
        say.seen(&format!("{MANY} connections"), &tally);
        say.check(
            tally.pods().len() == PODS.len() && tally.failures.is_empty(),
            "all three pods take their part and none fails",
        );
        let unused = shell.tcp(at(WEB, 81));
        say.asked(&format!("{SHELL}: TCP {WEB}:81, a port of no Service"), &unused);
        say.check(unused == Err(Failure::Refused), "refused at once (P13)");
        Ok(())
    }

    fn cluster_ip_from_a_node(&self, say: &mut Narration) -> Result<()> {
        let node = self.lab.node(BARE_NODE);
        let client = Client::at(node.place());
        say.tell(&format!("{} is {}", node.name(), node.address()));
        let tcp = client.tcp(at(WEB, PORT));
        say.asked(&format!("{}: TCP {WEB}:{PORT}", node.name()), &tcp);
        let udp = client.udp(at(WEB, PORT));
        say.asked(&format!("{}: UDP {WEB}:{PORT}", node.name()), &udp);
        // A datagram keeps the address that the node chose for the way to the Service.
        let by_packet = from(&udp, node.sources().v4) || from(&udp, node.address());
        say.check(
            from(&tcp, node.sources().v4) && by_packet,
            "pods of the Service answer and see the node's address (P9)",
        );
        Ok(())
    }

    fn loopback(&self, say: &mut Narration) -> Result<()> {
        let loopback = Ipv4Addr::LOCALHOST;
        for node in self.lab.nodes() {
            let client = Client::at(node.place());
            let tcp = client.tcp(at(loopback, NODE_PORT));
            say.asked(&format!("{}: TCP {loopback}:{NODE_PORT}", node.name()), &tcp);
            let udp = client.udp(at(loopback, NODE_PORT));
            say.asked(&format!("{}: UDP {loopback}:{NODE_PORT}", node.name()), &udp);
            let answered = [&tcp, &udp].iter().all(|answer| answer.is_ok());
            say.check(answered, &format!("on {} a pod of the Service answers (P18)", node.name()));
        }
        Ok(())
    }

    fn node_ports(&self, say: &mut Narration) -> Result<()> {
        let client = Client::at(self.lab.client());
        say.tell(&format!("the client outside is {}", self.lab.client_address()));
        for node in self.lab.nodes() {
            let to = at(node.address(), NODE_PORT);
            let (mut sources, mut right) = (BTreeSet::new(), true);
            for udp in [false, true] {
                let tally = Tally::of(MANY, || if udp { client.udp(to) } else { client.tcp(to) });
                right &= tally.failures.is_empty() && tally.pods().len() == PODS.len();
                for answer in &tally.answers {
                    let own = [node.sources().v4, node.gateways().v4, node.address()];
                    right &= own.map(IpAddr::V4).contains(&answer.client_ip());
                    sources.insert((answer.pod.clone(), answer.node.clone(), answer.client_ip()));
                }
                if let Some(failure) = tally.failures.first() {
                    say.seen(&format!("client: {to}"), failure);
                }
            }
            for (pod, on, source) in sources {
                say.seen(
                    &format!("client: TCP and UDP {} {to}", node.name()),
                    format!("{pod} on {on} saw {source}"),
                );
            }
            say.check(
                right,
                &format!("{} serves all pods, which see an address of that node (P4)", node.name()),
            );
        }
        Ok(())
    }

    fn policies(&self, say: &mut Narration) -> Result<()> {
        let own = IpAddr::V4(self.lab.client_address());
        let client = Client::at(self.lab.client()).timeout(SILENCE);
        for node in self.lab.nodes() {
            let has_pods = PODS.iter().any(|name| node.pod(name).is_some());
            let cluster = client.tcp(at(node.address(), NODE_PORT));
            say.asked(&format!("client: {}:{NODE_PORT} (Cluster)", node.name()), &cluster);
            let local = client.tcp(at(node.address(), LOCAL_PORT));
            say.asked(&format!("client: {}:{LOCAL_PORT} (Local)", node.name()), &local);
            say.check(cluster.is_ok(), "Cluster: every node answers (P4)");
            if has_pods {
                let right = local
                    .as_ref()
                    .is_ok_and(|answer| answer.node == node.name() && answer.client_ip() == own);
                say.check(right, "Local: a pod of this node answers and sees the client's address (P7)");
            } else {
                say.check(local == Err(Failure::TimedOut), "Local: a node without a pod is silent (P3)");
            }
        }
        let bare = self.lab.node(BARE_NODE);
        let inside = self.shell()?.tcp(at(bare.address(), LOCAL_PORT));
        say.asked(&format!("{SHELL}: {}:{LOCAL_PORT} (Local)", bare.name()), &inside);
        let shell = pod(&self.lab, SHELL)?.address();
        say.check(from(&inside, shell), "but a pod on that node is answered, with its own address (P5)");
        Ok(())
    }

    fn a_slow_pod(&self, say: &mut Narration) -> Result<()> {
        let pods = PODS.map(|name| pod(&self.lab, name));
        let slow = PODS[1];
        let mut servers = Vec::new();
        for pod in pods {
            let pod = pod?;
            let work = if pod.name() == slow { serial::SLOW } else { serial::QUICK };
            servers.push(Server::start(pod.place(), at(pod.address(), SERIAL_PORT), pod.name(), work)?);
        }
        say.tell(&format!(
            "each pod answers one connection after the other, within {} ms, but {slow} within {} ms; {} clients come in a second",
            serial::QUICK.as_millis(),
            serial::SLOW.as_millis(),
            serial::RATE
        ));
        let client = pod(&self.lab, SHELL)?;
        let (mut of_slow, mut failed) = (Vec::new(), 0);
        for (name, service) in [("random", CHANCE), ("least-connections", LEAST)] {
            let met = serial::clients(client.place(), at(service, PORT), SLOW_CLIENTS, serial::RATE)?;
            let shares: Vec<_> = met.answered.iter().map(|(pod, count)| format!("{pod} ×{count}")).collect();
            let (p50, p99) = (met.quantile(500).as_millis(), met.quantile(990).as_millis());
            say.seen(name, format!("p50 {p50} ms, p99 {p99} ms: {}", shares.join(", ")));
            of_slow.push(met.answered.get(slow).copied().unwrap_or_default());
            failed += met.failed;
        }
        say.check(
            of_slow[1] < of_slow[0] && failed == 0,
            "whoever has many open connections gets fewer new ones (L2)",
        );
        Ok(())
    }

    fn dead_pods(&self, say: &mut Narration) -> Result<()> {
        let [serves, refuses, silent] = PODS.map(|name| pod(&self.lab, name));
        let (serves, refuses, silent) = (serves?, refuses?, silent?);
        let _server =
            Server::start(serves.place(), at(serves.address(), TRIES_PORT), serves.name(), Duration::ZERO)?;
        let _deaf = Deaf::listen(silent.place(), at(silent.address(), TRIES_PORT))?;
        say.tell(&format!(
            "at port {TRIES_PORT} the pod {} serves, nothing listens in {}, and the queue of {} is full",
            serves.name(),
            refuses.name(),
            silent.name()
        ));
        let (shell, node) = (pod(&self.lab, SHELL)?, self.lab.node(BARE_NODE));
        let callers = [
            (SHELL, shell.place(), at(TRIES, PORT)),
            ("client", self.lab.client(), at(node.address(), TRIES_NODE_PORT)),
        ];
        for (who, place, to) in callers {
            let met = serial::clients(place, to, TRYING_CLIENTS, serial::RATE)?;
            let (p50, p99) = (met.quantile(500).as_millis(), met.quantile(990).as_millis());
            let served = met.answered.get(serves.name()).copied().unwrap_or_default();
            say.seen(
                &format!("{who}: {TRYING_CLIENTS} × TCP {to}"),
                format!("{served} served, {} failed; p50 {p50} ms, p99 {p99} ms", met.failed),
            );
            say.check(served == TRYING_CLIENTS as usize, "each was given to an endpoint that serves it (L5)");
        }
        let rows: Vec<ServiceTries> = serde_json::from_str(&node.portolan(&["services", "-o", "json"])?)?;
        let moved = rows.into_iter().find(|row| row.name.starts_with("default/tries:"));
        let ServiceTries { tries: Moved { silent, refused, rescued }, .. } =
            moved.context("portolan services does not name the Service")?;
        say.seen(
            &format!("portolan services, on {}", node.name()),
            format!(
                "moved from the silent pod {silent}, from the one that refuses {refused}; rescued {rescued}"
            ),
        );
        say.check(
            silent > 0 && refused > 0 && rescued > 0,
            "what was silent and what refused is told, and how many connections that has rescued",
        );
        Ok(())
    }

    fn a_pod_leaves(&self, say: &mut Narration) -> Result<()> {
        let shell = self.shell()?;
        let leaving = pod(&self.lab, LEAVING)?;
        let mut stream = (0..MANY * 10)
            .filter_map(|_| shell.connect(at(WEB, PORT)).ok())
            .find_map(|mut stream| (stream.ask().ok()?.pod == LEAVING).then_some(stream))
            .with_context(|| format!("{LEAVING} never answers"))?;
        let datagrams = self.datagrams_to(LEAVING)?;
        say.tell(&format!(
            "a TCP connection and a UDP flow are open from {SHELL} to {LEAVING} on {}",
            leaving.node()
        ));
        drop(leaving);
        say.tell(&self.world.begin_leaving(&self.lab)?);
        let moved = || {
            let tally = Tally::of(MANY, || shell.tcp(at(WEB, PORT)));
            !tally.pods().contains_key(LEAVING)
        };
        wait(moved, "new connections go elsewhere")?;
        let tally = Tally::of(MANY, || shell.tcp(at(WEB, PORT)));
        say.seen(&format!("{MANY} new connections"), &tally);
        say.check(
            tally.failures.is_empty() && !tally.pods().contains_key(LEAVING),
            "new connections go to the other pods and none fails (T5)",
        );
        let old = stream.ask();
        say.asked("the open connection", &old);
        say.check(
            old.is_ok_and(|answer| answer.pod == LEAVING),
            "the open connection stays with the pod that drains (C2)",
        );
        self.world.finish_leaving(&self.lab)?;
        say.tell(&format!("{LEAVING} has drained and is gone"));
        let ask = || ask_datagram(&datagrams, None, SILENCE);
        wait(|| ask().is_ok(), "the UDP flow is answered again")?;
        let again = ask();
        say.asked("the UDP flow, same socket", &again);
        say.check(
            again.is_ok_and(|answer| answer.pod != LEAVING),
            "the UDP flow has moved to another pod (C1)",
        );
        let tally = Tally::of(MANY, || shell.tcp(at(WEB, PORT)));
        say.seen(&format!("{MANY} new connections"), &tally);
        say.check(
            tally.failures.is_empty() && tally.pods().len() == PODS.len() - 1,
            "two pods serve, none fails",
        );
        Ok(())
    }

    /// A connected UDP socket of the shell whose flow goes to this pod.
    fn datagrams_to(&self, name: &str) -> Result<std::net::UdpSocket> {
        let place = pod(&self.lab, SHELL)?.place().clone();
        for _ in 0..MANY * 10 {
            let socket = place.udp_socket(None)?;
            socket.connect(at(WEB, PORT))?;
            if ask_datagram(&socket, None, SILENCE).is_ok_and(|answer| answer.pod == name) {
                return Ok(socket);
            }
        }
        anyhow::bail!("{name} never answers a datagram")
    }

    /// Asks CoreDNS from the shell, as a user does.
    fn nslookup(&self, say: &mut Narration, name: &str) -> Result<String> {
        say.tell(&format!("nslookup {name}, in the pod {SHELL}"));
        let place = pod(&self.lab, SHELL)?.place().clone();
        let output = place.command("nslookup")?.arg(name).output().context("nslookup")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        say.quote(text.trim_end());
        Ok(text)
    }

    fn names(&self, say: &mut Narration) -> Result<()> {
        let World::Cluster(plane) = &self.world else { return Ok(()) };
        plane.start_dns()?;
        let server = crate::controlplane::dns::ADDRESS;
        say.tell(&format!(
            "CoreDNS is a pod behind the ClusterIP {server}, and reaches the API server by 10.96.0.1"
        ));
        let client = pod(&self.lab, SHELL)?.place().clone();
        let answers = || client.run("nslookup", &["-timeout=1", NGINX]).is_ok();
        wait(answers, "CoreDNS answers")?;
        let text = self.nslookup(say, NGINX)?;
        let pods = self.lab.nodes().iter().flat_map(|node| node.pods_by_name());
        let pods: Vec<_> = pods.filter(|pod| PODS.contains(&pod.name())).collect();
        let all = pods.iter().all(|pod| text.contains(&pod.address().to_string()));
        say.check(all, "a headless Service is the addresses of its pods (D4)");
        let name = format!("{}.{NGINX}", PODS[0]);
        let before = pod(&self.lab, PODS[0])?.address();
        let text = self.nslookup(say, &name)?;
        say.check(text.contains(&before.to_string()), "a pod of a StatefulSet has a name (D5)");
        say.tell(&format!("kubectl delete pod {}", PODS[0]));
        plane.kubectl(&["delete", "pod", PODS[0]], "")?;
        let follows = || {
            let new = self.lab.pod(PODS[0]).map(|pod| pod.address());
            let text = client.run("nslookup", &[&name]).unwrap_or_default();
            new.is_some_and(|new| new != before && text.contains(&new.to_string()))
        };
        wait(follows, "the name has the address of the new pod")?;
        let text = self.nslookup(say, &name)?;
        say.check(!text.contains(&before.to_string()), "its name follows it to its new address (D5)");
        let text = self.nslookup(say, "elsewhere.default.svc.cluster.local")?;
        say.check(text.contains("canonical name"), "an ExternalName is an alias (D8)");
        for service in ["nginx", "web"] {
            plane.wait_for_endpoints(service, PODS.len(), Duration::from_secs(60))?;
        }
        Ok(())
    }

    fn counters(&self, say: &mut Narration) -> Result<()> {
        let node = self.lab.node(BARE_NODE);
        say.tell(&format!("portolan backends, on {}", node.name()));
        let text = node.portolan(&["backends"])?;
        say.quote(&text);
        let address = pod(&self.lab, PODS[0])?.address().to_string();
        say.check(text.contains(&address), "the endpoints are there with what they have served");
        Ok(())
    }

    fn a_map(&self, say: &mut Narration) -> Result<()> {
        let node = self.lab.node(BARE_NODE);
        let map = node.bpffs().join(dataplane_common::tables::LAYOUT).join("frontends");
        let map = map.to_str().context("path")?;
        say.tell(&format!("bpftool map dump pinned {map}"));
        let text = node.place().run("bpftool", &["map", "dump", "pinned", map])?;
        // Entries without a service port stand for whole addresses; those with one tell more.
        let entries: Vec<_> = text.split("},{").collect();
        let telling = entries.iter().filter(|entry| !entry.contains("\"service\": 0,")).take(DUMP_ENTRIES);
        let telling: Vec<_> = telling
            .map(|entry| entry.trim_start_matches("[{").trim_end().trim_end_matches("}]").trim_end())
            .collect();
        say.quote(telling.join("\n    },{\n").trim_start_matches('\n'));
        say.tell(&format!("  ({DUMP_ENTRIES} of {} entries)", entries.len()));
        let names = ["\"addr\"", "\"port\"", "\"service\""];
        say.check(
            names.iter().all(|name| text.contains(name)),
            "bpftool knows the names of the fields (the map has BTF)",
        );
        Ok(())
    }
}
