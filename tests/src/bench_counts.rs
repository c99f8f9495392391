//! The counts of what is open (L2), held against the flows and sockets that there are, after very many flows that end in every way: by FIN, by
//! RST, refused, moved to another endpoint, idle, displaced by others; while the agent is killed again and again, and the algorithm changed.

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::{Judgement, Limit, Ratio};
use crate::bench_tries::drive::{Clients, End, drive};
use crate::bench_tries::servers::Servers;
use crate::deaf::Deaf;
use crate::lab::{
    self, AgentOptions, Family, Lab, Node, Options, Place, Pod, PodOptions, Service, Stream, at,
};
use anyhow::{Context as _, Result, bail, ensure};
use dataplane_common::flow::{Flow, Stage};
use dataplane_common::tables::{Backends, Flows, OpenCounts};
use dataplane_user::kernel::maps::Map;
use dataplane_user::kernel::pins::Pins;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The kind of its records.
pub const KIND: &str = "counts";

/// The rule that the targets are of.
const RULE: &str = "L2";
const FLOWS: u32 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(10);
const READY: Duration = Duration::from_secs(120);
/// How long counts and flows may differ: what was under way comes to its end, and the next sweep looks.
const SETTLING: Duration = Duration::from_secs(60);
/// Of so many flows in a round one is by UDP.
const UDP_PART: u32 = 4;
/// Connections by socket that begin in a round and end in it, half of them by a RST; and those that stay until the next.
const BY_SOCKET: usize = 40;
const STAYING: usize = 10;
/// Room for so few flows that questions by UDP are displaced.
const ROOM: [&str; 3] = ["--max-flows=1024", "--map-size=half_open=2048,closing=2048", "--metrics-endpoints"];
const DRIFT: &str = "portolan_open_connections_drift_total ";
/// Algorithms, one after the other.
const ALGORITHMS: [&str; 5] = ["least-connections", "random", "round-robin", "maglev", "source-hash"];
const PORT: u16 = 80;
/// The endpoints: three serve, one refuses, one is silent at the third port.
const PODS: [&str; 5] = ["serves-1", "serves-2", "serves-3", "refuses", "silent"];
/// The Services' ClusterIPs, their endpoints' ports, and how many of the pods they have.
const SERVICES: [(&str, Ipv4Addr, u16, usize); 3] = [
    ("healthy", Ipv4Addr::new(10, 96, 0, 51), 8_201, 3),
    ("refusing", Ipv4Addr::new(10, 96, 0, 52), 8_202, 4),
    ("silent", Ipv4Addr::new(10, 96, 0, 53), 8_203, 5),
];

/// How much is done.
#[derive(Clone, Debug, clap::Args)]
pub struct CountsArgs {
    /// Flows, by packet.
    #[arg(long, default_value_t = FLOWS)]
    pub flows: u32,
    /// How often the agent is killed.
    #[arg(long, default_value_t = 20)]
    pub kills: u32,
    /// How often the algorithm is changed between two of these.
    #[arg(long, default_value_t = 5)]
    pub changes: u32,
    /// Flows in a second.
    #[arg(long, default_value_t = 5_000.0)]
    pub rate: f64,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Flows by packet that began.
    pub flows: u32,
    /// Those of them whose client was refused.
    pub refused: u32,
    /// Those whose client heard nothing in ten seconds: the table has room for few that wait.
    pub silent: u32,
    /// Those that did not begin, as the client had no port left.
    pub other: u32,
    /// Connections by socket.
    pub by_socket: usize,
    /// How often the agent was killed, and the algorithm changed.
    pub kills: u32,
    /// How often the algorithm was changed.
    pub changes: u32,
    /// How often connections were moved to another endpoint.
    pub moved: u64,
    /// By how much counts and what there is differed at the ends of rounds, all together.
    pub differences: u64,
    /// What the agents' own looks put right.
    pub drift: u64,
    /// What was open at the end of a round, the most.
    pub most_open: u64,
    /// Questions by UDP whose flows were idle or displaced at the ends of their rounds, at least.
    pub gone: u64,
}

/// Does it, prints, and writes the record.
///
/// # Errors
/// If the laboratory or the agent fails.
pub fn run(args: &CountsArgs) -> Result<Record<Measured>> {
    lab::on_signal_exit_with(130);
    let measured = measure(args, |line| println!("{line}"))?;
    let mut record = Record::new(KIND, Machine::here([]), args.flows < FLOWS, measured);
    record.targets = judge(&record.measured);
    record.finish(&args.records)
}

fn judge(measured: &Measured) -> Vec<Judgement> {
    let none = |what: String, value: u64| {
        Judgement::new(RULE, what, Some(Ratio::exactly(value as f64)), Limit::at_most(0.0, ""))
    };
    let Measured { flows, by_socket, kills, changes, .. } = measured;
    vec![
        none(
            format!(
                "counts that differ from the flows and sockets that there are, after {flows} flows, {by_socket} sockets, {kills} agents killed, \
                 {changes} changes of algorithm"
            ),
            measured.differences,
        ),
        none("drift that the agents' own looks put right".into(), measured.drift),
        none("clients that were refused".into(), measured.refused.into()),
    ]
}

struct World {
    lab: Lab,
    caller: Arc<Pod>,
    pods: Vec<Arc<Pod>>,
    _deaf: Deaf,
}

/// Does it.
///
/// # Errors
/// As [`run`].
pub fn measure(args: &CountsArgs, tell: impl Fn(&str)) -> Result<Measured> {
    let world = World::raise()?;
    let mut measured = Measured { kills: args.kills, ..Measured::default() };
    let mut staying = Vec::new();
    let in_round = args.flows.div_ceil(args.kills);
    let mut asked = 0;
    for round in 0..args.kills {
        let servers = world.serve()?;
        let (tcp, udp) = (in_round - in_round / UDP_PART, in_round / UDP_PART);
        let clients = |by_udp, all: u32, targets: usize| Clients {
            by_udp,
            count: all.div_ceil(targets as u32),
            rate: args.rate,
            patience: PATIENCE,
            end: End::ByTurns,
            asked,
        };
        let targets: Vec<_> = SERVICES.iter().map(|(_, address, ..)| at(*address, PORT)).collect();
        let place = world.caller.place();
        let clients = [clients(false, tcp, targets.len()), clients(true, udp, 2)];
        let drive_all =
            || anyhow::Ok((drive(place, &targets, clients[0])?, drive(place, &targets[..2], clients[1])?));
        let (by_tcp, by_udp, changed) = std::thread::scope(|scope| {
            let driving = scope.spawn(drive_all);
            let disturbed = world.disturb(args, round, &mut staying, &mut measured);
            let driven = driving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            anyhow::Ok((driven.0, driven.1, disturbed?))
        })?;
        measured.changes += changed;
        asked += udp.div_ceil(2) * 2;
        for met in by_tcp.met.iter().chain(&by_udp.met) {
            measured.refused += met.refused;
            measured.silent += met.silent;
            measured.other += met.other;
            measured.flows += met.times.len() as u32 + met.refused + met.silent;
        }
        // They close what they hold.
        drop(servers);
        let settled = world.settle(staying.len() as u64)?;
        measured.differences += settled.difference;
        measured.most_open = measured.most_open.max(settled.open);
        measured.gone += u64::from(udp).saturating_sub(settled.by_packet);
        measured.drift += world.drift()?;
        measured.moved = world.moved()?;
        tell(&format!(
            "{} of {}: {} flows, {} refused, {} silent, {} without a port; {} open by packet, {} by socket, counted {}; moved {}, drift {}",
            round + 1,
            args.kills,
            measured.flows,
            measured.refused,
            measured.silent,
            measured.other,
            settled.by_packet,
            staying.len(),
            settled.open,
            measured.moved,
            measured.drift,
        ));
    }
    Ok(measured)
}

/// What is counted, and what there is.
struct Settled {
    open: u64,
    by_packet: u64,
    difference: u64,
}

impl World {
    fn raise() -> Result<Self> {
        let lab = Options::default().nodes(2).create()?;
        let caller = lab.add_pod("caller", 0, &PodOptions::client())?;
        // Its own ports last for a minute otherwise.
        caller
            .place()
            .sysctls(&[("net/ipv4/tcp_tw_reuse", "1"), ("net/ipv4/ip_local_port_range", "1024 65000")])?;
        let pods = PODS.map(|name| lab.add_pod(name, 1, &PodOptions::client()));
        let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
        for pod in &pods {
            pod.place().sysctl("net/ipv4/icmp_ratelimit", "0")?;
        }
        let silent = pods.last().context("no pod")?;
        let deaf = Deaf::listen(silent.place(), at(silent.address(), SERVICES[2].2))?;
        let world = Self { lab, caller, pods, _deaf: deaf };
        world.apply(ALGORITHMS[0])?;
        world.start()?;
        Ok(world)
    }

    fn node(&self) -> &Node {
        self.lab.node(0)
    }

    fn start(&self) -> Result<()> {
        let options = AgentOptions::default().arguments(&ROOM).ready_within(READY);
        self.node().start_agent(&options).map(drop)
    }

    fn serve(&self) -> Result<Servers> {
        let ports = SERVICES.map(|(.., port, _)| port);
        let serving: Vec<_> = self.pods[..3].iter().map(|pod| (&**pod, &ports[..])).collect();
        Servers::start(&serving)
    }

    fn apply(&self, algorithm: &str) -> Result<()> {
        SERVICES.iter().try_for_each(|(name, address, target, pods)| {
            let service = Service::new(name, *address)
                .tcp(PORT, *target)
                .udp(PORT, *target)
                .annotation("service.portolan.dev/lb-algorithm", algorithm)
                .endpoints(self.pods[..*pods].iter().map(|pod| pod.endpoint()));
            self.lab.manifests().apply(&service)
        })
    }

    /// Kills the agent while flows begin and end, starts another, changes the algorithm, and has sockets connect and close; how often it was
    /// changed.
    fn disturb(
        &self,
        args: &CountsArgs,
        round: u32,
        staying: &mut Vec<Stream>,
        measured: &mut Measured,
    ) -> Result<u32> {
        let to = at(SERVICES[0].1, PORT);
        let place = self.node().place();
        let before = std::mem::replace(staying, connect(place, to, STAYING)?);
        measured.drift += self.drift()?;
        self.node().agent().context("no agent")?.kill();
        let mut streams = connect(place, to, BY_SOCKET / 2)?;
        drop(before);
        self.start()?;
        for change in 0..args.changes {
            let number = (round * args.changes + change + 1) as usize;
            self.apply(ALGORITHMS[number % ALGORITHMS.len()])?;
            std::thread::sleep(Duration::from_millis(100));
        }
        streams.extend(connect(place, to, BY_SOCKET / 2)?);
        for stream in streams.iter().step_by(2) {
            socket2::SockRef::from(stream.get_ref()).set_linger(Some(Duration::ZERO))?;
        }
        measured.by_socket += streams.len() + staying.len();
        Ok(args.changes)
    }

    /// Waits until what is counted is what there is.
    fn settle(&self, by_socket: u64) -> Result<Settled> {
        let end = Instant::now() + SETTLING;
        loop {
            let settled = self.look(by_socket)?;
            if settled.difference == 0 || Instant::now() > end {
                return Ok(settled);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// By backend; sockets have the Service `healthy`, which of its endpoints is not known.
    fn look(&self, by_socket: u64) -> Result<Settled> {
        let pins = Pins::new(&self.node().bpffs()).maps();
        let mut backends = BTreeMap::new();
        Map::<Backends>::open(&pins)?.visit(|id, values| {
            backends.extend(values.first().map(|backend| (id, backend.status().generation())));
        })?;
        let mut live: BTreeMap<u32, u64> = BTreeMap::new();
        Map::<Flows>::open(&pins)?.visit(|_, values| {
            let Some(flow) = values.first() else { return };
            let counts = !flow.has(Flow::REPLY) && flow.stage() != Stage::Closing;
            if counts && backends.get(&flow.backend) == Some(&flow.generation) {
                *live.entry(flow.backend).or_default() += 1;
            }
        })?;
        let (mut open, mut too_many, mut too_few) = (0, 0, 0);
        let counts = Map::<OpenCounts>::open(&pins)?;
        for id in backends.keys() {
            let counted = u64::from(counts.get(id)?.unwrap_or_default().count());
            let there = live.get(id).copied().unwrap_or_default();
            open += counted;
            too_many += counted.saturating_sub(there);
            too_few += there.saturating_sub(counted);
        }
        let difference = too_few + too_many.abs_diff(by_socket);
        Ok(Settled { open, by_packet: live.values().sum(), difference })
    }

    /// What the agent that runs has put right.
    fn drift(&self) -> Result<u64> {
        self.node().metric(DRIFT).map(|value| value as u64).context("the agent does not tell of drift")
    }

    /// How many connections were given to another endpoint since the Services are there.
    fn moved(&self) -> Result<u64> {
        let text = self.node().portolan(&["services", "-o", "json"])?;
        let rows: Vec<serde_json::Value> = serde_json::from_str(&text)?;
        let of = |row: &serde_json::Value| -> u64 {
            let reasons = ["silent", "refused", "unreachable", "udp"];
            reasons.iter().filter_map(|reason| row["tries"][reason].as_u64()).sum()
        };
        Ok(rows.iter().map(of).sum())
    }
}

/// Connections of the node's own, by socket.
fn connect(place: &Place, to: SocketAddr, count: usize) -> Result<Vec<Stream>> {
    let sockets = place.sockets(Family::V4.domain(), libc::SOCK_STREAM, 0, count)?;
    let mut streams = Vec::with_capacity(count);
    for socket in sockets {
        match Stream::connect(socket, to, PATIENCE) {
            Ok(stream) => streams.push(stream),
            Err(failure) => bail!("a connection of the node's own: {failure}"),
        }
    }
    ensure!(streams.len() == count, "{} of {count} connections", streams.len());
    Ok(streams)
}
