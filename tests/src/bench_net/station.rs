//! A leg's part of the lab: a node, a client and an endpoint on it, a client outside, and what serves the Service.

use super::load::{self, LOAD_TIME};
use super::{Case, Leg, Way};
use crate::controlplane::ControlPlane;
use crate::lab::{AgentOptions, Client, Lab, Node, Place, Pod, PodOptions, Process, Source, at, program};
use crate::load::{Mode, Outcome, Ports, parse};
use anyhow::{Context, Result, ensure};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The first port of a leg's server; also that of its Service.
const PORT: u16 = 7000;
/// The node port for connect-request-close; each leg has its own.
const NODE_PORT: u16 = 31_000;
/// The host number of the first outside client.
const OUTSIDE: u8 = 210;
/// Where clients run, and where servers.
const CLIENT_CPU: &str = "0";
const SERVER_CPU: &str = "1";

/// Seconds that a rival's connection tracking keeps what has ended; the default of two minutes fills its table here.
const CONNTRACK: &[(&str, &str)] = &[
    ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1"),
    ("net/netfilter/nf_conntrack_tcp_timeout_close", "1"),
    ("net/netfilter/nf_conntrack_tcp_timeout_last_ack", "1"),
];

/// A leg in the lab.
pub(super) struct Station {
    leg: Leg,
    node: Arc<Node>,
    client: Arc<Pod>,
    outside: Place,
    endpoint: Ipv4Addr,
    service: Ipv4Addr,
    node_port: u16,
    logs: PathBuf,
    _server: Process,
    proxy: Option<Process>,
    failure: Option<String>,
}

impl Station {
    /// Makes it, and starts what serves it.
    pub(super) fn new(lab: &Lab, plane: &ControlPlane, index: usize, leg: Leg) -> Result<Self> {
        let node = lab.nodes()[index].clone();
        let client = node.add_pod(&format!("client-{}", index + 1), &PodOptions::client())?;
        let pod = node.add_pod(&format!("server-{}", index + 1), &PodOptions::client())?;
        let outside = lab.add_outside(&format!("outside-{}", index + 1), OUTSIDE + index as u8)?;
        for place in [client.place(), &outside] {
            place.sysctl("net/ipv4/ip_local_port_range", "10000 65535")?;
        }
        // Only the legs without a Service go to the pod's own address.
        outside.ip(&[format!("route add {} via {}", node.pod_range(), node.address())])?;
        let mut command = pod.place().command(program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?)?;
        command.args(["serve", "--port", &PORT.to_string(), "--cpu", SERVER_CPU]);
        let server = Process::start(&lab.logs(), &format!("server-{}", leg.name()), command)?;
        server.wait_for_line(Duration::from_secs(10), |line| line == "serving")?;
        let ports = [
            ("close", "TCP", PORT + 1, PORT + 1),
            ("echo", "TCP", PORT, PORT),
            ("datagrams", "UDP", PORT, PORT),
            ("discard", "TCP", PORT + 2, PORT + 2),
        ];
        let (endpoint, node_port) = (pod.address(), NODE_PORT + index as u16);
        let endpoints = [endpoint];
        let created = load::create(plane.client(), leg.name(), &ports, Some(node_port), &endpoints);
        let service = plane.block_on(created)?;
        let (logs, proxy, failure) = (lab.logs(), None, None);
        let mut station = Self {
            leg,
            node,
            client,
            outside,
            endpoint,
            service,
            node_port,
            logs,
            _server: server,
            proxy,
            failure,
        };
        if let Err(error) = station.start(plane) {
            station.give_up(&format!("{error:#}"));
        }
        Ok(station)
    }

    fn start(&mut self, plane: &ControlPlane) -> Result<()> {
        match self.leg {
            Leg::Direct | Leg::DirectAgain => Ok(()),
            Leg::PortolanSocket => self.start_agent(plane, &[]),
            Leg::PortolanPacket => self.start_agent(plane, &["--socket-lb=off"]),
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
        let mut command = place.command(kube_proxy(plane))?;
        command.arg("--kubeconfig").arg(plane.agent_kubeconfig());
        command.arg(format!("--hostname-override={}", self.node.name()));
        command.arg(format!("--proxy-mode={mode}"));
        command.arg(format!("--cluster-cidr={}", crate::lab::POD_RANGES));
        command.args([
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
            "--healthz-bind-address=127.0.0.1:10256",
            "--metrics-bind-address=127.0.0.1:10249",
        ]);
        self.proxy = Some(Process::start(&self.logs, self.leg.name(), command)?);
        place.sysctls(CONNTRACK)
    }

    pub(super) fn leg(&self) -> Leg {
        self.leg
    }

    /// Whether there is a Service to wait for.
    pub(super) fn has_proxy(&self) -> bool {
        self.failure.is_none() && !matches!(self.leg, Leg::Direct | Leg::DirectAgain)
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

    /// What Portolan dropped so far, and why; empty for the others.
    pub(super) fn drops(&self) -> String {
        match self.leg {
            Leg::PortolanSocket | Leg::PortolanPacket => {
                let table = self.node.portolan(&["drops"]).unwrap_or_default();
                let occurred = |line: &&str| line.split_whitespace().nth(1) != Some("0");
                table.lines().filter(occurred).collect::<Vec<_>>().join("\n")
            }
            Leg::Direct | Leg::DirectAgain | Leg::KubeProxyNftables | Leg::KubeProxyIptables => String::new(),
        }
    }

    /// One more Service that leads to the leg's server.
    pub(super) fn last_service(&self, plane: &ControlPlane, size: usize) -> Result<Ipv4Addr> {
        let name = format!("last-{size}-{}", self.leg.name());
        let ports = [("echo", "TCP", PORT, PORT)];
        plane.block_on(load::create(plane.client(), &name, &ports, None, &[self.endpoint]))
    }

    /// Whether a Service answers the leg's client.
    pub(super) fn reaches(&self, service: Ipv4Addr) -> bool {
        let client = Client::at(self.client.place()).timeout(Duration::from_secs(1));
        client.connect(at(service, PORT)).is_ok()
    }

    /// One leg of one round.
    pub(super) fn measure(&mut self, case: Case, flows: usize, seconds: f64) -> Result<Outcome, String> {
        match &self.failure {
            Some(failure) => Err(failure.clone()),
            None => self.load(case, flows, seconds).map_err(|error| format!("{error:#}")),
        }
    }

    fn target(&self, case: Case) -> SocketAddr {
        let port = Ports::from(PORT).of(case.mode);
        match (self.leg, case.way) {
            (Leg::Direct | Leg::DirectAgain, _) => at(self.endpoint, port),
            (_, Way::ClusterIp) => at(self.service, port),
            (_, Way::NodePort) => at(self.node.address(), self.node_port),
        }
    }

    fn load(&self, case: Case, flows: usize, seconds: f64) -> Result<Outcome> {
        ensure!(
            case.way == Way::ClusterIp || case.mode == Mode::ConnectRequestClose,
            "the node port leads to the port for connect-request-close"
        );
        let place = match case.way {
            Way::ClusterIp => self.client.place(),
            Way::NodePort => &self.outside,
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
                "--cpu",
                CLIENT_CPU,
            ],
        )?;
        parse(&text)
    }
}

/// Where `kube-proxy` is: beside the control plane's programs, or in PATH as they are.
pub(super) fn kube_proxy(plane: &ControlPlane) -> PathBuf {
    plane.kubectl_program().with_file_name("kube-proxy")
}
