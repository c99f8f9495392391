//! The agent fed with recorded watch events: cold start from a snapshot in memory (B9), 10,000 endpoint updates per second
//! (B11), and its memory meanwhile.
//!
//! A laboratory of one node; its agent watches a server that tells recorded objects ([`recorded`], `replay`).

pub mod recorded;
mod replay;

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::{Judgement, Limit, Ratio};
use crate::bench_net::resident_kib;
use crate::bench_sync::Durations;
use crate::lab::{
    self, AgentOptions, Client, Lab, Node, Options, Place, PodOptions, Process, Source, at, program,
};
use crate::load::parse;
use anyhow::{Context, Result, ensure};
use dataplane_common::frontend::FrontendKey;
use dataplane_common::tables::{Frontends, LAYOUT, Services};
use dataplane_common::{Addr, Port};
use dataplane_user::kernel::maps::Map;
use recorded::Recorded;
use replay::{Listed, Replay};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The kind of its records.
pub const KIND: &str = "agent";

/// B9: milliseconds from the snapshot in memory to the kernel.
const COLD_START_LIMIT_MS: f64 = 150.0;
/// B11: milliseconds from an event to the kernel, of 99 in 100, while many come.
const LAG_LIMIT_MS: f64 = 50.0;
/// B11: connections meanwhile, over those while nothing changes.
const BUSY_LIMIT: f64 = 0.95;

/// Updates are written in bursts this far apart.
const BURST: Duration = Duration::from_millis(1);
/// Updates between two whose way is timed.
const BETWEEN_PROBES: u32 = 200;
/// How long one of those may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The load tool's port for connect-request-close, and the first of its ports.
const PORTS: [u16; 2] = [7001, 7000];
/// The Service that is loaded, and the one whose way is timed: numbers after all others.
const LOADED: u32 = 0;
const TIMED: u32 = 1;
/// TCP.
const PROTO: u8 = 6;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchAgentArgs {
    /// Fewer and shorter rounds than the method asks for.
    #[arg(long)]
    pub quick: bool,
    /// Services.
    #[arg(long, default_value_t = 10_000)]
    pub services: u32,
    /// Endpoints of each.
    #[arg(long, default_value_t = 2)]
    pub endpoints: u32,
    /// Endpoint updates per second.
    #[arg(long, default_value_t = 10_000)]
    pub updates: u32,
    /// Cold starts, and then rounds of quiet and of updates (11; quick: 5).
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Seconds of each (3; quick: 2).
    #[arg(long)]
    pub seconds: Option<f64>,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// What became of the updates.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Churn {
    /// How many were written.
    pub updates: u64,
    /// In how many seconds.
    pub seconds: f64,
    /// Milliseconds from an event to the kernel, of the ones that were timed.
    pub lag_ms: Option<Durations>,
    /// How many were timed.
    pub timed: usize,
    /// Seconds of CPU that the agent took.
    pub agent_cpu_seconds: f64,
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// How many Services there are.
    pub services: u32,
    /// Endpoints of each.
    pub endpoints: u32,
    /// Updates per second that were asked for.
    pub updates_per_second: u32,
    /// Milliseconds of cold starts from the snapshot in memory to the kernel, as the agent tells.
    pub cold_start_ms: Durations,
    /// Milliseconds from the start of the process to its line `ready`.
    pub ready_ms: Durations,
    /// The updates.
    pub churn: Churn,
    /// Connections per second to a Service, round by round, while nothing changes.
    pub quiet: Vec<Option<f64>>,
    /// The same while updates come.
    pub busy: Vec<Option<f64>>,
    /// Resident memory of the agent in KiB, before the first round and after each.
    pub resident_kib: Vec<u64>,
}

/// Measures all, prints it and writes the record.
///
/// # Errors
/// If the laboratory cannot be raised, or the agent does not do what it should.
pub fn run(args: &BenchAgentArgs) -> Result<Record<Measured>> {
    let (rounds, seconds) = if args.quick { (5, 2.0) } else { (11, 3.0) };
    let (rounds, seconds) = (args.rounds.unwrap_or(rounds).max(1), args.seconds.unwrap_or(seconds));
    let lab = Options::default().nodes(1).create()?;
    lab::on_signal_exit_with(130);
    let bench = Bench::new(&lab, args)?;
    let (cold_start_ms, ready_ms) = bench.cold_starts(rounds)?;
    println!(
        "cold start, {} Services x {}: {:.1} ms in the agent, {:.0} ms from the start of the process",
        args.services, args.endpoints, cold_start_ms.median, ready_ms.median
    );
    let mut measured = Measured {
        services: args.services,
        endpoints: args.endpoints,
        updates_per_second: args.updates,
        cold_start_ms,
        ready_ms,
        churn: Churn::default(),
        quiet: Vec::new(),
        busy: Vec::new(),
        resident_kib: Vec::new(),
    };
    bench.churn(&mut measured, rounds, seconds)?;
    print(&measured);
    let quick = rounds < 11 || seconds * rounds as f64 <= 30.0;
    let mut record = Record::new(KIND, Machine::here([]), quick, measured);
    record.notes.push(
        "The agent, the sender of the updates, the client and the server share the CPUs: what the first two take, \
         connections lose."
            .into(),
    );
    record.targets = judge(&record.measured);
    record.finish(&args.records)
}

fn judge(measured: &Measured) -> Vec<Judgement> {
    let ratio = |ms: &Durations, median: f64| Ratio { median, min: ms.min, max: ms.max };
    let cold = &measured.cold_start_ms;
    let lag = measured.churn.lag_ms.as_ref().map(|ms| ratio(ms, ms.p99));
    let busy = Ratio::of(&measured.busy, &measured.quiet);
    let size = format!("{} Services x {}", measured.services, measured.endpoints);
    let rate = measured.updates_per_second;
    vec![
        Judgement::new(
            "B9",
            format!("cold start of the agent from recorded events, {size}"),
            Some(ratio(cold, cold.median)),
            Limit::at_most(COLD_START_LIMIT_MS, "ms"),
        ),
        Judgement::new(
            "B11",
            format!("event to kernel, p99, at {rate} updates/s"),
            lag,
            Limit::at_most(LAG_LIMIT_MS, "ms"),
        ),
        Judgement::new(
            "B11",
            format!("connections at {rate} updates/s over those at none"),
            busy,
            Limit::at_least(BUSY_LIMIT, "x quiet"),
        ),
    ]
}

fn print(measured: &Measured) {
    let Churn { updates, seconds, timed, agent_cpu_seconds, .. } = &measured.churn;
    println!(
        "{updates} updates in {seconds:.1} s, {timed} of them timed; the agent took {agent_cpu_seconds:.1} s of CPU"
    );
    let memory = |kib: Option<&u64>| kib.map_or(0.0, |kib| *kib as f64 / 1024.0);
    let (first, last) = (measured.resident_kib.first(), measured.resident_kib.last());
    println!("resident memory: {:.1} MiB before, {:.1} MiB after", memory(first), memory(last));
}

/// The laboratory with a server of recorded objects.
struct Bench<'a> {
    args: &'a BenchAgentArgs,
    lab: &'a Lab,
    recorded: Recorded,
    replay: Replay,
    client: Place,
    server: Ipv4Addr,
    kubeconfig: PathBuf,
    _server: Process,
}

impl<'a> Bench<'a> {
    fn new(lab: &'a Lab, args: &'a BenchAgentArgs) -> Result<Self> {
        let node = lab.node(0);
        let client = lab.add_pod("caller", 0, &PodOptions::client())?.place().clone();
        client.sysctl("net/ipv4/ip_local_port_range", "10000 65535")?;
        let server = lab.add_pod("callee", 0, &PodOptions::client())?;
        let mut command = server.place().command(program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?)?;
        command.args(["serve", "--port", &PORTS[1].to_string(), "--cpu", "1"]);
        let process = Process::start(&lab.logs(), "load-server", command)?;
        process.wait_for_line(PATIENCE, |line| line == "serving")?;
        let recorded = Recorded::read()?;
        let listener = node.place().enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
        let replay = replay::serve(listener, listed(args, &recorded, node, server.address()))?;
        let kubeconfig = lab.folder().join("replay.kubeconfig");
        fs::write(
            &kubeconfig,
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: replay\n\
                 clusters: [{{name: replay, cluster: {{server: \"http://{}\"}}}}]\n\
                 users: [{{name: replay, user: {{}}}}]\n\
                 contexts: [{{name: replay, context: {{cluster: replay, user: replay}}}}]\n",
                replay.address()
            ),
        )?;
        let server = server.address();
        Ok(Self { args, lab, recorded, replay, client, server, kubeconfig, _server: process })
    }

    fn node(&self) -> &Node {
        self.lab.node(0)
    }

    /// Starts the agent on an empty node again and again; it runs after the last time. Durations in the agent, and of all.
    fn cold_starts(&self, rounds: usize) -> Result<(Durations, Durations)> {
        let source = Source::Kubeconfig(self.kubeconfig.clone());
        let options = AgentOptions::default().source(source).arguments(&["--socket-lb=off"]);
        let (mut inside, mut all) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let begun = Instant::now();
            let agent = self.node().start_agent(&options)?;
            all.push(begun.elapsed());
            let log = agent.process().log();
            let milliseconds = log.lines().filter_map(first_write).next_back();
            inside.push(milliseconds.context("the agent does not tell how long its first tables took")?);
            if round + 1 < rounds {
                agent.stop()?;
                self.node().portolan(&["cleanup", "--keep-state"])?;
                fs::remove_dir_all(self.node().state_folder())?;
                fs::create_dir_all(self.node().state_folder())?;
            }
        }
        Ok((Durations::of(inside)?, Durations::of(all)?))
    }

    /// Rounds of quiet and of updates in turn, with connections to a Service in both.
    fn churn(&self, measured: &mut Measured, rounds: usize, seconds: f64) -> Result<()> {
        let client = Client::at(&self.client).timeout(PATIENCE);
        let answered = client.connect(at(recorded::cluster_ip(self.args.services + LOADED), PORTS[0]));
        answered.map_err(|failure| anyhow::anyhow!("the Service does not answer: {failure}"))?;
        let pid = self.node().agent().context("the agent is gone")?.process().pid();
        let memory = || resident_kib(pid).context("the agent is gone");
        let mut updates = Updates::new(self.args, &self.recorded, self.replay.watch(PATIENCE)?, self.node())?;
        measured.resident_kib.push(memory()?);
        for _ in 0..rounds {
            measured.quiet.push(Some(self.load(seconds)?));
            let (stop, cpu) = (AtomicBool::new(false), cpu_seconds(pid)?);
            let rate = std::thread::scope(|scope| {
                let sending = scope.spawn(|| updates.send(&stop));
                let rate = self.load(seconds);
                stop.store(true, Ordering::Relaxed);
                sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                rate
            });
            measured.busy.push(Some(rate?));
            measured.churn.agent_cpu_seconds += cpu_seconds(pid)? - cpu;
            measured.resident_kib.push(memory()?);
        }
        let Updates { sent, seconds, lags, .. } = updates;
        (measured.churn.updates, measured.churn.seconds) = (sent, seconds);
        measured.churn.timed = lags.len();
        measured.churn.lag_ms = Some(Durations::of(lags)?);
        Ok(())
    }

    /// Connections per second from a pod to the loaded Service.
    fn load(&self, seconds: f64) -> Result<f64> {
        let to = at(recorded::cluster_ip(self.args.services + LOADED), PORTS[0]).to_string();
        let load = program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?;
        let text = self.client.run(
            load.to_str().context("path")?,
            &[
                "run",
                "--mode",
                "connect-request-close",
                "--to",
                &to,
                "--flows",
                "32",
                "--seconds",
                &seconds.to_string(),
                "--cpu",
                "0",
            ],
        )?;
        let _ = self.server;
        Ok(parse(&text)?.per_second)
    }
}

/// What a line of the agent's log says of the first tables: milliseconds from the snapshot in memory to the kernel.
fn first_write(line: &str) -> Option<Duration> {
    let (_, end) = line.split_once(" frontends in ")?;
    let milliseconds: u64 = end.strip_suffix(" ms")?.parse().ok()?;
    Some(Duration::from_millis(milliseconds))
}

/// Seconds of CPU that a process has taken.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The fields after the name, which is in brackets: state is the first, user and system time are the 12th and 13th.
    let (_, fields) = text.rsplit_once(") ").context("/proc/PID/stat")?;
    let ticks: f64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    // SAFETY: a function without preconditions.
    Ok(ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64)
}

/// What the server tells: the recorded objects under many names, and the node's own.
fn listed(args: &BenchAgentArgs, recorded: &Recorded, node: &Node, server: Ipv4Addr) -> Vec<Listed> {
    let all = args.services + 2;
    let services =
        (0..all).map(|n| recorded.service(n, &recorded::name(n), recorded::cluster_ip(n), port(args, n)));
    let slices = (0..all).map(|n| {
        let endpoints: Vec<_> = if n == args.services + LOADED {
            vec![server]
        } else {
            (0..args.endpoints).map(|e| recorded::endpoint(n * args.endpoints + e)).collect()
        };
        recorded.slice(n, &recorded::name(n), &endpoints, port(args, n))
    });
    let own = lab::manifests::node(node);
    let range = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": { "name": "kubernetes" }, "spec": { "cidrs": ["10.96.0.0/12"] },
    });
    let list = |plural, kind, version, items| Listed { plural, kind, version, items };
    vec![
        list("services", "ServiceList", "v1", services.collect()),
        list("endpointslices", "EndpointSliceList", "discovery.k8s.io/v1", slices.collect()),
        list("nodes", "NodeList", "v1", vec![own.to_string()]),
        list("servicecidrs", "ServiceCIDRList", "networking.k8s.io/v1", vec![range.to_string()]),
    ]
}

/// The port of Service number `n`.
fn port(args: &BenchAgentArgs, n: u32) -> u16 {
    if n == args.services + LOADED { PORTS[0] } else { 80 }
}

/// The updates, and the ones among them whose way is timed.
struct Updates {
    watch: TcpStream,
    /// Two states of each Service's slice, in turn.
    events: Vec<[Vec<u8>; 2]>,
    timed: [Vec<u8>; 2],
    per_burst: u32,
    services: Map<Services>,
    /// The id of the service port that is timed.
    id: u32,
    sent: u64,
    seconds: f64,
    lags: Vec<Duration>,
}

impl Updates {
    fn new(args: &BenchAgentArgs, recorded: &Recorded, watch: TcpStream, node: &Node) -> Result<Self> {
        let states = |n: u32| {
            let endpoints = |other: bool| -> Vec<_> {
                let first = recorded::endpoint(n * args.endpoints + if other { 1 << 20 } else { 0 });
                let rest = (1..args.endpoints).map(|e| recorded::endpoint(n * args.endpoints + e));
                std::iter::once(first).chain(rest).collect()
            };
            [true, false].map(|other| {
                replay::event(&recorded.slice(n, &recorded::name(n), &endpoints(other), port(args, n)))
            })
        };
        let folder = node.bpffs().join(LAYOUT);
        let timed = args.services + TIMED;
        let address = Addr::from(IpAddr::from(recorded::cluster_ip(timed)));
        let key = FrontendKey::new(address, Port::new(port(args, timed)), PROTO);
        let frontend =
            Map::<Frontends>::open(&folder)?.get(&key)?.context("the timed Service is in no table")?;
        Ok(Self {
            watch,
            events: (0..args.services).map(states).collect(),
            timed: states(timed),
            per_burst: (f64::from(args.updates) * BURST.as_secs_f64()).round().max(1.0) as u32,
            services: Map::open(&folder)?,
            id: frontend.service(),
            sent: 0,
            seconds: 0.0,
            lags: Vec::new(),
        })
    }

    /// Sends at its rate until told to stop, and then waits until the last has reached the kernel.
    fn send(&mut self, stop: &AtomicBool) -> Result<()> {
        let (begun, first) = (Instant::now(), self.sent);
        let mut waits: Option<(Instant, dataplane_common::service::Service)> = None;
        let mut since = 0;
        for burst in 1_u32.. {
            if waits.is_none() && since >= BETWEEN_PROBES {
                let before = self.service()?;
                waits = Some((Instant::now(), before));
                let event = &self.timed[self.lags.len() % 2];
                self.watch.write_all(event)?;
                (since, self.sent) = (0, self.sent + 1);
            }
            let mut bytes = Vec::new();
            for _ in 0..self.per_burst {
                let count = self.events.len() as u64;
                let event = &self.events[(self.sent % count) as usize];
                bytes.extend_from_slice(&event[(self.sent / count % 2) as usize]);
                self.sent += 1;
            }
            since += self.per_burst;
            self.watch.write_all(&bytes).context("the agent does not read any more")?;
            let next = begun + BURST * burst;
            loop {
                if let Some((at, before)) = waits
                    && self.service()? != before
                {
                    self.lags.push(at.elapsed());
                    waits = None;
                }
                let now = Instant::now();
                if now >= next {
                    break;
                }
                std::thread::sleep((next - now).min(BURST / 4));
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        self.seconds += begun.elapsed().as_secs_f64();
        ensure!(self.sent > first, "no update was sent");
        if let Some((at, before)) = waits {
            while self.service()? == before {
                ensure!(at.elapsed() < PATIENCE, "an update is not in the kernel after {PATIENCE:?}");
                std::thread::sleep(BURST);
            }
            self.lags.push(at.elapsed());
        }
        Ok(())
    }

    fn service(&self) -> Result<dataplane_common::service::Service> {
        self.services.get(&self.id)?.context("no such service port")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_s_log_tells_how_long_the_first_tables_took() {
        let line =
            "2026-01-01T00:00:00Z  INFO portolan: 3 service ports, 4 backends and 5 frontends in 17 ms";
        assert_eq!(first_write(line), Some(Duration::from_millis(17)));
        assert_eq!(first_write("5 frontends of an earlier agent are in the kernel and served"), None);
    }

    #[test]
    fn recorded_objects_are_read_as_the_agent_reads_them() {
        use dataplane_user::model::{AddressType, Object};
        use dataplane_user::watch::names::Names;
        use dataplane_user::watch::objects::{Written, WrittenEndpointSlice, WrittenService};
        let recorded = Recorded::read().unwrap();
        let mut names = Names::default();
        let address = recorded::cluster_ip(7);
        let text = recorded.service(7, "seven", address, 80);
        let service: WrittenService = serde_json::from_str(&text).unwrap();
        let Object::Service(service) = service.convert(&mut names).unwrap() else { panic!() };
        assert_eq!((&*service.name.name, &service.cluster_ips[..]), ("seven", &[IpAddr::from(address)][..]));
        let text = recorded.slice(7, "seven", &[recorded::endpoint(1), recorded::endpoint(2)], 80);
        let slice: WrittenEndpointSlice = serde_json::from_str(&text).unwrap();
        let Object::EndpointSlice(slice) = slice.convert(&mut names).unwrap() else { panic!() };
        assert_eq!((&*slice.service.name, slice.address_type), ("seven", AddressType::Ipv4));
        assert!(slice.endpoints.len() == 2 && slice.endpoints.iter().all(|endpoint| endpoint.ready));
        assert_eq!(slice.ports[0].name, service.ports[0].name);
    }
}
