//! A leg's part of the lab: a node, a client and an endpoint on it, a client outside, and what serves the Service.

use super::hooks;
use super::load::{self, LOAD_TIME};
use super::programs::{self, ProgramShare};
use super::{Case, Leg, Way};
use crate::controlplane::ControlPlane;
use crate::lab::{AgentOptions, Client, Lab, Node, Place, Pod, PodOptions, Process, Source, at, program};
use crate::load::{Mode, Outcome, Ports, parse};
use anyhow::{Context, Result, ensure};
use dataplane_user::kernel::link::Link;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The first port of a leg's server; also that of its Service.
const PORT: u16 = 7000;
/// The node port for connect-request-close; each leg has its own. Among the first 86 of the range, which the API server leaves to
/// those who choose for themselves (KEP-3668): it draws one for each other port of these Services.
const NODE_PORT: u16 = 30_010;
/// The same for the endpoint on another node.
const FAR_NODE_PORT: u16 = 30_050;
/// The host number of the first outside client.
const OUTSIDE: u8 = 210;
/// Seconds of load before a round counts.
const WARM_UP: f64 = 0.2;
/// Where clients run, and where servers.
const CLIENT_CPU: &str = "0";
const SERVER_CPU: &str = "1";

/// Seconds that a rival's connection tracking keeps what has ended; the default of two minutes fills its table here.
const CONNTRACK: &[(&str, &str)] = &[
    ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1"),
    ("net/netfilter/nf_conntrack_tcp_timeout_close", "1"),
    ("net/netfilter/nf_conntrack_tcp_timeout_last_ack", "1"),
];

/// A node tells its neighbours of a shorter way, which would not lead over it.
const NO_REDIRECTS: [&str; 2] = ["net/ipv4/conf/all/send_redirects", "net/ipv4/conf/eth0/send_redirects"];

/// A leg in the lab.
pub(super) struct Station {
    leg: Leg,
    node: Arc<Node>,
    client: Arc<Pod>,
    outside: Place,
    endpoint: Ipv4Addr,
    /// The endpoint on another node.
    far: Ipv4Addr,
    service: Ipv4Addr,
    index: u16,
    logs: PathBuf,
    _servers: [Process; 2],
    proxy: Option<Process>,
    /// Of programs that do nothing.
    _hooks: Vec<Link>,
    failure: Option<String>,
}

impl Station {
    /// Makes it, and starts what serves it. The lab's last node is that of the endpoints elsewhere.
    pub(super) fn new(lab: &Lab, plane: &ControlPlane, index: usize, leg: Leg) -> Result<Self> {
        let node = lab.nodes()[index].clone();
        let far_node = lab.nodes().last().context("a lab without nodes")?;
        let name = |what: &str| format!("{what}-{}", index + 1);
        let client = node.add_pod(&name("client"), &PodOptions::client())?;
        let pod = node.add_pod(&name("server"), &PodOptions::client())?;
        let far_pod = far_node.add_pod(&name("far"), &PodOptions::client())?;
        let outside = lab.add_outside(&name("outside"), OUTSIDE + index as u8)?;
        for place in [client.place(), &outside] {
            place.sysctl("net/ipv4/ip_local_port_range", "10000 65535")?;
        }
        // The direct way to the endpoint elsewhere leads over this node, as that by its node port does.
        node.place().sysctls(&NO_REDIRECTS.map(|key| (key, "0")))?;
        // Only the legs without a Service go to a pod's own address.
        outside.ip(&[
            format!("route add {} via {}", node.pod_range(), node.address()),
            format!("route add {}/32 via {}", far_pod.address(), node.address()),
        ])?;
        let servers = [serve(lab, &pod)?, serve(lab, &far_pod)?];
        let (endpoint, far) = (pod.address(), far_pod.address());
        let endpoints = [(endpoint, node.name()), (far, far_node.name())];
        let service = services(plane, leg, index as u16, endpoints)?;
        let mut station = Self {
            leg,
            node,
            client,
            outside,
            endpoint,
            far,
            service,
            index: index as u16,
            logs: lab.logs(),
            _servers: servers,
            proxy: None,
            _hooks: Vec::new(),
            failure: None,
        };
        if let Err(error) = station.start(plane) {
            station.give_up(&format!("{error:#}"));
        }
        Ok(station)
    }

    fn start(&mut self, plane: &ControlPlane) -> Result<()> {
        match self.leg {
            Leg::Direct | Leg::DirectAgain => Ok(()),
            Leg::EmptyHooks => {
                self._hooks = hooks::attach_empty(&self.node)?;
                Ok(())
            }
            Leg::PortolanSocket => self.start_agent(plane, &["--socket-lb=all"]),
            Leg::PortolanPacket => self.start_agent(plane, &["--socket-lb=off"]),
            Leg::PortolanXdp => self.start_agent(plane, &["--socket-lb=off", "--xdp=native"]),
            Leg::KubeProxyNftables => self.start_kube_proxy(plane, "nftables"),
            Leg::KubeProxyIptables => self.start_kube_proxy(plane, "iptables"),
        }
    }

    fn start_agent(&self, plane: &ControlPlane, arguments: &[&str]) -> Result<()> {
        let source = Source::Kubeconfig(plane.agent_kubeconfig());
        let options = AgentOptions::default().source(source).ready_within(LOAD_TIME).arguments(arguments);
        self.node.start_agent(&options).map(drop)
    }

    fn start_kube_proxy(&mut self, plane: &ControlPlane, mode: &str) -> Result<()> {
        let place = self.node.place();
        let command = plane.kube_proxy(&self.node, mode)?;
        self.proxy = Some(Process::start(&self.logs, self.leg.name(), command)?);
        place.sysctls(CONNTRACK)
    }

    pub(super) fn leg(&self) -> Leg {
        self.leg
    }

    /// Whether there is a Service to wait for.
    pub(super) fn has_proxy(&self) -> bool {
        self.failure.is_none() && !self.leg.is_plain()
    }

    /// The end of a proxy that was not asked to end.
    pub(super) fn failed_proxy(&self) -> Option<String> {
        let proxy = self.proxy.as_ref()?;
        let status = proxy.exit_status()?;
        Some(format!("kube-proxy ended with {status}\n{}", crate::lab::last_lines(&proxy.log(), 5)))
    }

    /// Leaves the leg out from here on.
    pub(super) fn give_up(&mut self, failure: &str) {
        println!("{} cannot run: {failure}", self.leg.name());
        self.failure = Some(failure.to_owned());
        // What still loads would take time from the others.
        self.proxy = None;
    }

    /// The process id of what serves the Services.
    pub(super) fn proxy_pid(&self) -> Option<u32> {
        match self.leg {
            Leg::Direct | Leg::DirectAgain | Leg::EmptyHooks => None,
            Leg::PortolanSocket | Leg::PortolanPacket | Leg::PortolanXdp => {
                self.node.agent().map(|agent| agent.process().pid())
            }
            Leg::KubeProxyNftables | Leg::KubeProxyIptables => self.proxy.as_ref().map(Process::pid),
        }
    }

    /// The node.
    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// The client in a pod.
    pub(super) fn client(&self) -> &Place {
        self.client.place()
    }

    /// The endpoint on the node.
    pub(super) fn endpoint(&self) -> Ipv4Addr {
        self.endpoint
    }

    /// What Portolan dropped so far, and why; empty for the others.
    pub(super) fn drops(&self) -> String {
        match self.leg {
            Leg::PortolanSocket | Leg::PortolanPacket | Leg::PortolanXdp => {
                let table = self.node.portolan(&["drops"]).unwrap_or_default();
                let occurred = |line: &&str| line.split_whitespace().nth(1) != Some("0");
                table.lines().filter(occurred).collect::<Vec<_>>().join("\n")
            }
            Leg::Direct
            | Leg::DirectAgain
            | Leg::EmptyHooks
            | Leg::KubeProxyNftables
            | Leg::KubeProxyIptables => String::new(),
        }
    }

    /// One more Service that leads to the leg's server.
    pub(super) fn last_service(&self, plane: &ControlPlane, size: usize) -> Result<Ipv4Addr> {
        let name = format!("last-{size}-{}", self.leg.name());
        let ports = [("echo", "TCP", PORT, PORT)];
        plane.block_on(load::create(
            plane.client(),
            &name,
            &ports,
            None,
            &[(self.endpoint, self.node.name())],
        ))
    }

    /// Whether a Service answers the leg's client.
    pub(super) fn reaches(&self, service: Ipv4Addr) -> bool {
        let client = Client::at(self.client.place()).timeout(Duration::from_secs(1));
        client.connect(at(service, PORT)).is_ok()
    }

    /// One leg of one round.
    pub(super) fn measure(&self, case: Case, flows: usize, seconds: f64) -> Result<Outcome, String> {
        self.unless_given_up(|| self.load(case, flows, seconds, WARM_UP))
    }

    /// What the leg's programs take of an operation, in a run like that of a round.
    pub(super) fn programs(
        &self,
        case: Case,
        flows: usize,
        seconds: f64,
    ) -> Result<Vec<ProgramShare>, String> {
        self.unless_given_up(|| {
            let count = programs::Count::begin()?;
            // Without a warm-up: all that is counted belongs to an operation that is.
            count.end(self.load(case, flows, seconds, 0.0)?.done)
        })
    }

    fn unless_given_up<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<T, String> {
        match &self.failure {
            Some(failure) => Err(failure.clone()),
            None => run().map_err(|error| format!("{error:#}")),
        }
    }

    fn target(&self, case: Case) -> SocketAddr {
        let port = Ports::from(PORT).of(case.mode);
        let is_plain = self.leg.is_plain();
        match case.way {
            Way::ClusterIp | Way::NodePort if is_plain => at(self.endpoint, port),
            Way::NodePortElsewhere if is_plain => at(self.far, port),
            Way::ClusterIp => at(self.service, port),
            Way::NodePort => at(self.node.address(), NODE_PORT + self.index),
            Way::NodePortElsewhere => at(self.node.address(), FAR_NODE_PORT + self.index),
        }
    }

    fn load(&self, case: Case, flows: usize, seconds: f64, warm_up: f64) -> Result<Outcome> {
        ensure!(
            case.way == Way::ClusterIp || case.mode == Mode::ConnectRequestClose,
            "node ports lead to the port for connect-request-close"
        );
        let place = match case.way {
            Way::ClusterIp => self.client.place(),
            Way::NodePort | Way::NodePortElsewhere => &self.outside,
        };
        let mode = serde_json::to_value(case.mode)?;
        let text = place.run(
            program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?.to_str().context("path")?,
            &[
                "run",
                "--mode",
                mode.as_str().context("mode")?,
                "--to",
                &self.target(case).to_string(),
                "--flows",
                &flows.to_string(),
                "--seconds",
                &seconds.to_string(),
                "--warm-up",
                &warm_up.to_string(),
                "--cpu",
                CLIENT_CPU,
            ],
        )?;
        parse(&text)
    }
}

/// The load tool's server in a pod.
///
/// It closes first, so its kernel would remember each connection for a minute and refuse some of those that come again from
/// one of a node's few translated ports: thousands per second from one address to one endpoint are a benchmark's doing.
fn serve(lab: &Lab, pod: &Pod) -> Result<Process> {
    pod.place().sysctl("net/ipv4/tcp_max_tw_buckets", "0")?;
    let mut command = pod.place().command(program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?)?;
    command.args(["serve", "--port", &PORT.to_string(), "--cpu", SERVER_CPU]);
    let server = Process::start(&lab.logs(), pod.name(), command)?;
    server.wait_for_line(Duration::from_secs(10), |line| line == "serving")?;
    Ok(server)
}

/// The leg's Services; the ClusterIP of the one with the endpoint on the node.
fn services(
    plane: &ControlPlane,
    leg: Leg,
    index: u16,
    [here, elsewhere]: [(Ipv4Addr, &str); 2],
) -> Result<Ipv4Addr> {
    let ports = [
        ("close", "TCP", PORT + 1, PORT + 1),
        ("echo", "TCP", PORT, PORT),
        ("datagrams", "UDP", PORT, PORT),
        ("discard", "TCP", PORT + 2, PORT + 2),
    ];
    let (client, far_name) = (plane.client(), format!("far-{}", leg.name()));
    plane.block_on(async {
        load::create(client, &far_name, &ports[..1], Some(FAR_NODE_PORT + index), &[elsewhere]).await?;
        load::create(client, leg.name(), &ports, Some(NODE_PORT + index), &[here]).await
    })
}
