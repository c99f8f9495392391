//! Second tries (L5): clients of Services some of whose endpoints refuse them or are silent, and of one all of whose endpoints refuse.
//! Portolan by packet and the real kube-proxy on two nodes of one laboratory, with the same endpoints.

pub(crate) mod drive;
pub(crate) mod servers;

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::{Judgement, Limit, Ratio};
use crate::deaf::Deaf;
use crate::lab::layout::{Proxy, Serving, kube_proxy_on};
use crate::lab::{self, AgentOptions, Lab, Options, Place, Pod, PodOptions, Service, at};
use anyhow::{Context as _, Result};
use drive::{Clients, Driven, End, Met, drive};
use serde::{Deserialize, Serialize};
use servers::Servers;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The kind of its records.
pub const KIND: &str = "tries";

/// The rule that the targets are of.
const RULE: &str = "L5";
/// Milliseconds that refusals may add to the time within which 99 of 100 clients are served.
const REFUSALS_LIMIT: f64 = 1.0;
/// The same of silence: a SYN is repeated after a second.
const SILENCE_LIMIT: f64 = 1_100.0;
/// Packets to endpoints for each packet of a client of the Service that is dead: three tries beside the first. Neighbours' questions
/// after each other are counted as well.
const PACKETS_LIMIT: f64 = 4.01;
/// CPU time of a connection that all endpoints refuse, over that of one to a Service without endpoints: four ways there and back, and one
/// that ends where it begins.
const CPU_LIMIT: f64 = 8.0;

/// How long what serves may take to do so.
const READY: Duration = Duration::from_secs(120);
/// How long a client waits for its connection, or its answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Where tries are made, where rules of netfilter are, and where the endpoints are.
const OWN: usize = 0;
const RIVAL: usize = 1;
const ENDPOINTS: usize = 2;
/// The endpoints of each Service. The first two serve always.
const PODS: [&str; 5] = ["serves-1", "serves-2", "refuses-1", "refuses-2", "silent"];
const PORT: u16 = 80;

/// How much is measured, and beside whom.
#[derive(Clone, Debug, clap::Args)]
pub struct TriesArgs {
    /// Connections from each kind of client to each Service some of whose endpoints fail.
    #[arg(long, default_value_t = CONNECTS)]
    pub connects: u32,
    /// How many come in a second, to all of these Services together.
    #[arg(long, default_value_t = 2_400.0)]
    pub rate: f64,
    /// Connections in a second to the Service whose endpoints all refuse.
    #[arg(long, default_value_t = 10_000.0)]
    pub dead_rate: f64,
    /// Seconds of it.
    #[arg(long, default_value_t = 10.0)]
    pub dead_seconds: f64,
    /// Portolan alone, without kube-proxy.
    #[arg(long)]
    pub alone: bool,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// A record of fewer is a short one.
const CONNECTS: u32 = 50_000;
/// Of so many connections of the own clients the rival gets one, and there is one question by UDP.
const LESS: u32 = 10;

/// A Service, and the port of its endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// All five endpoints serve.
    Healthy,
    /// Two of five refuse.
    Refusing,
    /// Two of five refuse and one is silent.
    Silent,
    /// All five refuse.
    Dead,
    /// There are no endpoints.
    None,
}

impl Health {
    const ALL: [Self; 5] = [Self::Healthy, Self::Refusing, Self::Silent, Self::Dead, Self::None];

    const fn about(self) -> &'static str {
        match self {
            Self::Healthy => "5 endpoints serve",
            Self::Refusing => "2 of 5 refuse",
            Self::Silent => "2 of 5 refuse, 1 is silent",
            Self::Dead => "5 of 5 refuse",
            Self::None => "no endpoints",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Healthy => 1,
            Self::Refusing => 2,
            Self::Silent => 3,
            Self::Dead => 4,
            Self::None => 5,
        }
    }

    const fn cluster_ip(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 96, 0, 40 + self.number())
    }

    const fn node_port(self) -> u16 {
        30_100 + self.number() as u16
    }

    const fn target(self) -> u16 {
        8_100 + self.number() as u16
    }

    /// Whether a pod serves it.
    fn serves(self, pod: &str) -> bool {
        match self {
            Self::Healthy => true,
            Self::Refusing => !pod.starts_with("refuses"),
            Self::Silent => pod.starts_with("serves"),
            Self::Dead | Self::None => false,
        }
    }

    fn service(self, pods: &[Arc<Pod>]) -> Service {
        let name = format!("{self:?}").to_lowercase();
        let service = Service::new(&name, self.cluster_ip())
            .tcp_node_port(PORT, self.target(), self.node_port())
            .udp_node_port(PORT, self.target(), self.node_port());
        match self {
            Self::None => service,
            Self::Healthy | Self::Refusing | Self::Silent | Self::Dead => {
                service.endpoints(pods.iter().map(|pod| pod.endpoint()))
            }
        }
    }
}

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Caller {
    /// A pod, by ClusterIP.
    Pod,
    /// A client outside, by node port.
    Outside,
}

impl Caller {
    /// In words.
    pub const fn about(self) -> &'static str {
        match self {
            Self::Pod => "a pod by ClusterIP",
            Self::Outside => "a client outside by node port",
        }
    }
}

/// What became of the clients of one Service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Leg {
    /// Who served.
    pub proxy: Proxy,
    /// Who called.
    pub caller: Caller,
    /// What.
    pub service: Health,
    /// By UDP, and not by TCP.
    pub by_udp: bool,
    /// Those that were served.
    pub served: u32,
    /// Those that were refused.
    pub refused: u32,
    /// Those that heard nothing in three seconds.
    pub silent: u32,
    /// Those that failed otherwise.
    pub other: u32,
    /// Milliseconds within which half of those who were served were served.
    pub p50_ms: f64,
    /// The same of 99 in 100.
    pub p99_ms: f64,
    /// The same of all.
    pub max_ms: f64,
}

impl Leg {
    /// Those that were not served.
    pub fn failed(&self) -> u32 {
        self.refused + self.silent + self.other
    }

    /// By which protocol.
    pub fn protocol(&self) -> &'static str {
        if self.by_udp { "UDP" } else { "TCP" }
    }

    /// The Service and its clients, in words.
    pub fn about(&self) -> String {
        format!("{}, {}, {}", self.protocol(), self.caller.about(), self.service.about())
    }
}

impl fmt::Display for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { served, refused, silent, other, p50_ms, p99_ms, max_ms, .. } = self;
        let what = format!("{}: {}", self.proxy.name(), self.about());
        write!(
            f,
            "{what:<88} {served:>6} served, {refused:>5} refused, {silent:>5} silent, {other} otherwise; p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms, \
             longest {max_ms:.0} ms"
        )
    }
}

/// What became of the clients of a Service whose endpoints all refuse, beside one without any.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dead {
    /// Who served.
    pub proxy: Proxy,
    /// Who called.
    pub caller: Caller,
    /// Connections.
    pub connects: u32,
    /// In how many seconds.
    pub seconds: f64,
    /// Those that were refused.
    pub refused: u32,
    /// Packets that its endpoints were sent, for each that a client has sent.
    pub packets: f64,
    /// Microseconds of CPU time for each connection, of the client's thread and of the kernel's work in it.
    pub cpu_us: f64,
    /// The same of one to a Service without endpoints.
    pub none_cpu_us: f64,
}

impl fmt::Display for Dead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connects, seconds, refused, packets, cpu_us, none_cpu_us, .. } = self;
        let what = format!("{}: TCP, {}, {}", self.proxy.name(), self.caller.about(), Health::Dead.about());
        let rate = f64::from(*connects) / seconds;
        write!(
            f,
            "{what:<88} {refused:>6} of {connects} refused, {rate:.0}/s, {packets:.2} packets out for one in, {cpu_us:.0} us of CPU time each \
             ({none_cpu_us:.0} us without endpoints)"
        )
    }
}

/// All that was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Services some of whose endpoints serve.
    pub legs: Vec<Leg>,
    /// The one of which none does.
    pub dead: Vec<Dead>,
}

impl Measured {
    /// One leg.
    pub fn leg(&self, proxy: Proxy, caller: Caller, service: Health, by_udp: bool) -> Option<&Leg> {
        self.legs
            .iter()
            .find(|leg| (leg.proxy, leg.caller, leg.service, leg.by_udp) == (proxy, caller, service, by_udp))
    }
}

/// Measures, prints, and writes the record.
///
/// # Errors
/// If the laboratory or a proxy fails. What becomes of clients is in the record.
pub fn run(args: &TriesArgs) -> Result<Record<Measured>> {
    lab::on_signal_exit_with(130);
    let measured = measure(args, |line| println!("{line}"))?;
    let mut record = Record::new(KIND, Machine::here([]), args.connects < CONNECTS || args.alone, measured);
    record.targets = judge(&record.measured);
    record.notes = vec![
        format!("A client has failed that was refused, or heard nothing for {} s.", PATIENCE.as_secs()),
        "Clients come to the Services by turns, so that all meet the same machine; they, the endpoints and the kernel's work for all share \
         its CPUs."
            .into(),
        "For the questions by UDP the pods' kernels send as many ICMP errors as are due (icmp_ratelimit 0). By default Linux sends one \
         address six at once and one in a second: the questions beyond that hear nothing, from whatever dataplane."
            .into(),
        "CPU time is that of the thread that connects: what the kernel does about a packet between namespaces it does there, as long as it keeps up."
            .into(),
    ];
    record.finish(&args.records)
}

/// A laboratory with the Services, and what serves them.
struct World {
    lab: Lab,
    pods: Vec<Arc<Pod>>,
    _servers: Servers,
    _deaf: Deaf,
    _rules: Option<Serving>,
}

/// Measures each proxy.
///
/// # Errors
/// As [`run`].
pub fn measure(args: &TriesArgs, tell: impl Fn(&str)) -> Result<Measured> {
    let world = World::raise(args.alone)?;
    let mut measured = Measured::default();
    let proxies: &[Proxy] = if args.alone { &[Proxy::Portolan] } else { &[Proxy::Portolan, Proxy::Nftables] };
    for proxy in proxies {
        for caller in [Caller::Pod, Caller::Outside] {
            for by_udp in [false, true] {
                let legs = world.some_serve(args, *proxy, caller, by_udp)?;
                legs.iter().for_each(|leg| tell(&leg.to_string()));
                measured.legs.extend(legs);
            }
            let dead = world.none_serves(args, *proxy, caller)?;
            tell(&dead.to_string());
            measured.dead.push(dead);
        }
    }
    Ok(measured)
}

impl World {
    fn raise(alone: bool) -> Result<Self> {
        let lab = Options::default().create()?;
        let pods = PODS.map(|name| lab.add_pod(name, ENDPOINTS, &PodOptions::client()));
        let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
        for pod in &pods {
            pod.place().sysctl("net/ipv4/icmp_ratelimit", "0")?;
        }
        for node in [OWN, RIVAL] {
            lab.add_pod(caller_pod(node), node, &PodOptions::client())?;
        }
        let ports = |pod: &Pod| -> Vec<u16> {
            Health::ALL
                .iter()
                .filter(|health| health.serves(pod.name()))
                .map(|health| health.target())
                .collect()
        };
        let ports: Vec<_> = pods.iter().map(|pod| (&**pod, ports(pod))).collect();
        let ports: Vec<_> = ports.iter().map(|(pod, ports)| (*pod, &ports[..])).collect();
        let servers = Servers::start(&ports)?;
        let silent = pods.last().context("no pod")?;
        let deaf = Deaf::listen(silent.place(), at(silent.address(), Health::Silent.target()))?;
        let services = Health::ALL.map(|health| health.service(&pods));
        services.iter().try_for_each(|service| lab.manifests().apply(service))?;
        lab.node(OWN).start_agent(&AgentOptions::default().ready_within(READY))?;
        let rules = (!alone).then(|| kube_proxy_on(&lab, RIVAL, &services, "nftables", READY)).transpose()?;
        Ok(Self { lab, pods, _servers: servers, _deaf: deaf, _rules: rules })
    }

    /// Where a caller is, and what it calls a Service by.
    fn caller(&self, proxy: Proxy, caller: Caller) -> Result<(Place, impl Fn(Health) -> SocketAddr)> {
        let node = if proxy == Proxy::Portolan { OWN } else { RIVAL };
        let place = match caller {
            Caller::Pod => self.lab.pod(caller_pod(node)).context("no pod to call from")?.place().clone(),
            Caller::Outside => self.lab.client().clone(),
        };
        let address = self.lab.node(node).address();
        let target = move |health: Health| match caller {
            Caller::Pod => at(health.cluster_ip(), PORT),
            Caller::Outside => at(address, health.node_port()),
        };
        Ok((place, target))
    }

    fn some_serve(&self, args: &TriesArgs, proxy: Proxy, caller: Caller, by_udp: bool) -> Result<Vec<Leg>> {
        // Silence by UDP is nothing that anybody notices but the client.
        let all: &[Health] = if by_udp {
            &[Health::Healthy, Health::Refusing]
        } else {
            &[Health::Healthy, Health::Refusing, Health::Silent]
        };
        let less = if by_udp || proxy != Proxy::Portolan { LESS } else { 1 };
        let clients = Clients {
            by_udp,
            count: args.connects.div_ceil(less),
            rate: args.rate,
            patience: PATIENCE,
            end: End::Reset,
            asked: 0,
        };
        let (place, target) = self.caller(proxy, caller)?;
        let targets: Vec<_> = all.iter().map(|health| target(*health)).collect();
        let driven = drive(&place, &targets, clients)?;
        let leg = |(service, met): (&Health, Met)| Leg {
            proxy,
            caller,
            service: *service,
            by_udp,
            served: met.times.len() as u32,
            refused: met.refused,
            silent: met.silent,
            other: met.other,
            p50_ms: met.quantile(500),
            p99_ms: met.quantile(990),
            max_ms: met.quantile(1_000),
        };
        Ok(all.iter().zip(driven.met).map(leg).collect())
    }

    fn none_serves(&self, args: &TriesArgs, proxy: Proxy, caller: Caller) -> Result<Dead> {
        let (place, target) = self.caller(proxy, caller)?;
        let connects = (args.dead_rate * args.dead_seconds) as u32;
        let clients = Clients {
            by_udp: false,
            count: connects,
            rate: args.dead_rate,
            patience: PATIENCE,
            end: End::Reset,
            asked: 0,
        };
        let each = |driven: &Driven| driven.cpu / f64::from(connects) * 1e6;
        let none = drive(&place, &[target(Health::None)], clients)?;
        let (sent, received) = (packets(&place, SENT)?, self.received()?);
        let driven = drive(&place, &[target(Health::Dead)], clients)?;
        let (sent, received) = (packets(&place, SENT)? - sent, self.received()? - received);
        Ok(Dead {
            proxy,
            caller,
            connects,
            seconds: driven.seconds,
            refused: driven.met.iter().map(|met| met.refused).sum(),
            packets: received as f64 / sent as f64,
            cpu_us: each(&driven),
            none_cpu_us: each(&none),
        })
    }

    /// Packets that all endpoints were sent.
    fn received(&self) -> Result<u64> {
        self.pods.iter().map(|pod| packets(pod.place(), RECEIVED)).sum()
    }
}

/// The name of the pod of a node that calls.
fn caller_pod(node: usize) -> &'static str {
    if node == OWN { "by-packet" } else { "by-rules" }
}

/// Columns of `/proc/net/dev` behind the name.
const RECEIVED: usize = 1;
const SENT: usize = 9;

/// Packets at the only interface of a place.
fn packets(place: &Place, column: usize) -> Result<u64> {
    let text = place.enter(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:"));
    let number = line.and_then(|line| line.split_whitespace().nth(column)?.parse().ok());
    number.with_context(|| format!("{} has no eth0", place.name()))
}

fn judge(measured: &Measured) -> Vec<Judgement> {
    let mut all = Vec::new();
    let own = |proxy: &Proxy| *proxy == Proxy::Portolan;
    for leg in measured.legs.iter().filter(|leg| own(&leg.proxy)) {
        let failed = Some(Ratio::exactly(leg.failed().into()));
        let what = format!("clients that failed: {}", leg.about());
        all.push(Judgement::new(RULE, what, failed, Limit::at_most(0.0, "")));
        let limit = match leg.service {
            Health::Refusing => REFUSALS_LIMIT,
            Health::Silent => SILENCE_LIMIT,
            Health::Healthy | Health::Dead | Health::None => continue,
        };
        let healthy = measured.leg(leg.proxy, leg.caller, Health::Healthy, leg.by_udp);
        let added = healthy.map(|healthy| Ratio::exactly(leg.p99_ms - healthy.p99_ms));
        let what = format!("added to the p99 of healthy endpoints: {}", leg.about());
        all.push(Judgement::new(RULE, what, added, Limit::at_most(limit, "ms")));
        let rival = measured.leg(Proxy::Nftables, leg.caller, leg.service, leg.by_udp);
        let served = |leg: &Leg| f64::from(leg.served) / f64::from(leg.served + leg.failed());
        let ratio = rival.map(|rival| Ratio::exactly(served(leg) / served(rival)));
        let what = format!("clients served: {}", leg.about());
        all.push(Judgement::new(RULE, what, ratio, Limit::at_least(1.0, "x kube-proxy nftables")));
    }
    for dead in measured.dead.iter().filter(|dead| own(&dead.proxy)) {
        let about = format!("TCP, {}, {}", dead.caller.about(), Health::Dead.about());
        let missed = Ratio::exactly((dead.connects - dead.refused).into());
        let mut judge = |what: &str, value: Ratio, limit: Limit| {
            all.push(Judgement::new(RULE, format!("{what}: {about}"), Some(value), limit));
        };
        judge("clients that were not refused", missed, Limit::at_most(0.0, ""));
        let limit = Limit::at_most(PACKETS_LIMIT, "packets");
        judge("packets to endpoints for each of clients", Ratio::exactly(dead.packets), limit);
        let cpu = Ratio::exactly(dead.cpu_us / dead.none_cpu_us);
        let limit = Limit::at_most(CPU_LIMIT, "x a Service without endpoints");
        judge("CPU time of a connection", cpu, limit);
    }
    all
}
