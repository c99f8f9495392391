//! Measures what it takes to bring tables into real maps: a cold start (B9), one endpoint's change (B10), a restart.
//!
//! The maps are of the default sizes and belong to this process alone; no program reads them.

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::{Judgement, Limit, Ratio};
use anyhow::{Context as _, Result, ensure};
use dataplane_common::backend::BackendStatus;
use dataplane_common::frontend::{FrontendKey, FrontendKind};
use dataplane_common::node::NodeAddress;
use dataplane_common::service::Policy;
use dataplane_common::{Addr, Port};
use dataplane_user::compile::{Endpoint, NodeTables, PortTables, ServicePortName, ServiceTables};
use dataplane_user::kernel::bpf;
use dataplane_user::kernel::maps::KernelMaps;
use dataplane_user::model::ObjectName;
use dataplane_user::sync::{Mirror, REST};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The kind of its records.
pub const KIND: &str = "sync";

/// TCP.
const PROTO: u8 = 6;

/// B9: milliseconds from the snapshot in memory to the kernel.
const COLD_START_LIMIT_MS: f64 = 150.0;

/// B10: `bpf()` calls for one endpoint of one Service.
const CHANGE_CALLS_LIMIT: u64 = 8;

/// B10: milliseconds from the event to packets, of which writing is a part.
const CHANGE_LIMIT_MS: f64 = 5.0;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchSyncArgs {
    /// Fewer rounds than the method asks for.
    #[arg(long)]
    pub quick: bool,
    /// Services of the cold start and of the first run of changes.
    #[arg(long, default_value_t = 10_000)]
    pub services: u32,
    /// Services of the second run of changes: its number of calls must be the same.
    #[arg(long, default_value_t = 30_000)]
    pub many_services: u32,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 2)]
    pub endpoints: u32,
    /// Cold starts; the median counts (11; quick: 5).
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Changes of one endpoint in each run.
    #[arg(long, default_value_t = 1_000)]
    pub changes: u32,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// Durations of one kind in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Durations {
    /// The middle one.
    pub median: f64,
    /// 99 of 100 are shorter.
    pub p99: f64,
    /// The shortest.
    pub min: f64,
    /// The longest.
    pub max: f64,
}

impl Durations {
    /// Of these; an error if there are none.
    pub(crate) fn of(mut samples: Vec<Duration>) -> Result<Self> {
        samples.sort_unstable();
        let at = |part: f64| {
            let index = ((samples.len() as f64 - 1.0) * part).round() as usize;
            samples.get(index).map(|sample| sample.as_secs_f64() * 1e3).context("nothing was measured")
        };
        Ok(Self { median: at(0.5)?, p99: at(0.99)?, min: at(0.0)?, max: at(1.0)? })
    }
}

/// One run of changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Changes {
    /// How many Services there were.
    pub services: u32,
    /// How long one change took.
    pub milliseconds: Durations,
    /// The most `bpf()` calls that one change took.
    pub calls: u64,
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// How many Services the cold start had.
    pub services: u32,
    /// Endpoints of each.
    pub endpoints: u32,
    /// B9.
    pub cold_start: Durations,
    /// `bpf()` calls of a cold start.
    pub cold_start_calls: u64,
    /// A new agent that finds everything as it should be.
    pub restart: Durations,
    /// B10, with few and with many Services.
    pub changes: Vec<Changes>,
}

/// Service number `n` at its ClusterIP, with these endpoints.
pub fn service(n: u32, endpoints: impl IntoIterator<Item = u32>) -> (ObjectName, ServiceTables) {
    let name = ObjectName::new("bench", format!("service-{n}"));
    let [_, a, b, c] = n.to_be_bytes();
    let cluster_ip = Addr::from_v4([172, 16 | a, b, c]);
    let endpoint = |e: u32| {
        let [_, a, b, c] = e.to_be_bytes();
        Endpoint { addr: Addr::from_v4([10, a, b, c]), port: Port::new(8080) }
    };
    let endpoints: Vec<_> = endpoints.into_iter().map(endpoint).collect();
    let tables = PortTables {
        policy: Policy::new(Policy::HAS_ENDPOINTS, 0),
        backends: endpoints.iter().map(|endpoint| (*endpoint, BackendStatus::SERVING)).collect(),
        cluster: endpoints.iter().copied().collect(),
        local: [].into(),
        ranges: [].into(),
        frontends: [(FrontendKey::new(cluster_ip, Port::new(80), PROTO), FrontendKind::ClusterIp)].into(),
        ..PortTables::default()
    };
    let port = ServicePortName { service: name.clone(), port: "http".into(), proto: PROTO, ipv6: false };
    (name, ServiceTables { ports: [(port, tables)].into(), closed: [cluster_ip].into() })
}

/// `count` Services with `endpoints` endpoints each.
pub fn cluster(count: u32, endpoints: u32) -> BTreeMap<ObjectName, ServiceTables> {
    (0..count).map(|n| service(n, (0..endpoints).map(|e| n * endpoints + e))).collect()
}

/// A node with one address and zeroed settings.
pub fn node() -> NodeTables {
    let address = (Addr::from_v4([192, 0, 2, 1]), NodeAddress::new(NodeAddress::NODE_PORTS));
    NodeTables { node: bytemuck::Zeroable::zeroed(), addresses: [address].into(), ranges: Default::default() }
}

/// Reads empty or filled maps and brings the Services in; how long that took, and the mirror.
fn start(maps: &KernelMaps, services: &BTreeMap<ObjectName, ServiceTables>) -> Result<(Duration, Mirror)> {
    let begin = Instant::now();
    let mut mirror = Mirror::open(maps, begin)?;
    mirror.set_node(maps, &node(), begin)?;
    let outcome = mirror.replace(maps, services, begin)?;
    let took = begin.elapsed();
    ensure!(outcome.refused.is_empty(), "the default sizes hold no {} Services", services.len());
    Ok((took, mirror))
}

/// Replaces one endpoint of one Service, again and again: `count` changes among `services` Services.
///
/// # Errors
/// Without the right to make maps, or if a map refuses what it must hold.
pub fn change(services: u32, endpoints: u32, count: u32) -> Result<Changes> {
    let maps = KernelMaps::create(&[])?;
    let (_, mut mirror) = start(&maps, &cluster(services, endpoints))?;
    let (mut samples, mut calls) = (Vec::new(), 0);
    // The changes lie a little apart, so that ids and runs have their rest.
    let mut now = Instant::now();
    for round in 0..count {
        now += REST / 100;
        let n = round * 7_919 % services;
        let kept = (1..endpoints).map(|e| n * endpoints + e);
        let (name, tables) = service(n, kept.chain([0x80_0000 + round]));
        let (before, begin) = (bpf::calls(), Instant::now());
        mirror.change(&maps, [(&name, Some(&tables))], now)?;
        samples.push(begin.elapsed());
        calls = calls.max(bpf::calls() - before);
    }
    Ok(Changes { services, milliseconds: Durations::of(samples)?, calls })
}

/// Measures all, prints it and writes the record.
///
/// # Errors
/// Without the right to make maps, or if a map refuses what it must hold.
pub fn run(args: &BenchSyncArgs) -> Result<Record<Measured>> {
    ensure!(args.services > 0 && args.many_services > 0 && args.endpoints > 0, "there is nothing to measure");
    let rounds = args.rounds.unwrap_or(if args.quick { 5 } else { 11 }).max(1);
    let services = cluster(args.services, args.endpoints);
    let (mut cold, mut restart, mut cold_start_calls) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        let maps = KernelMaps::create(&[]).context("cannot make maps: is this root?")?;
        let before = bpf::calls();
        cold.push(start(&maps, &services)?.0);
        cold_start_calls = bpf::calls() - before;
        restart.push(start(&maps, &services)?.0);
    }
    let changes =
        [args.services, args.many_services].map(|count| change(count, args.endpoints, args.changes));
    let changes = changes.into_iter().collect::<Result<Vec<_>>>()?;
    let (cold_start, restart) = (Durations::of(cold)?, Durations::of(restart)?);
    let (services, endpoints) = (args.services, args.endpoints);
    let measured = Measured { services, endpoints, cold_start, cold_start_calls, restart, changes };
    print(&measured);
    let mut record = Record::new(KIND, Machine::here([]), rounds < 11, measured);
    record.targets = judge(&record.measured);
    record.notes.push("The tables are compiled already; what is measured is their way into the maps.".into());
    record.finish(&args.records)
}

fn judge(measured: &Measured) -> Vec<Judgement> {
    let ratio = |d: &Durations, median: f64| Some(Ratio { median, min: d.min, max: d.max });
    let cold = &measured.cold_start;
    let what = format!("cold start from tables, {} Services x {}", measured.services, measured.endpoints);
    let limit = Limit::at_most(COLD_START_LIMIT_MS, "ms");
    let mut all = vec![Judgement::new("B9", what, ratio(cold, cold.median), limit)];
    for run in &measured.changes {
        let what = format!("one endpoint's change written, p99, {} Services", run.services);
        let time = ratio(&run.milliseconds, run.milliseconds.p99);
        all.push(Judgement::new("B10", what, time, Limit::at_most(CHANGE_LIMIT_MS, "ms")));
        let what = format!("calls of one endpoint's change, {} Services", run.services);
        let calls = Some(Ratio::exactly(run.calls as f64));
        all.push(Judgement::new(
            "B10",
            what,
            calls,
            Limit::at_most(CHANGE_CALLS_LIMIT as f64, "bpf() calls"),
        ));
    }
    if let [few, many] = measured.changes.as_slice() {
        let what = format!("calls at {} Services over those at {}", many.services, few.services);
        let growth = Ratio::exactly(many.calls as f64 / few.calls.max(1) as f64);
        all.push(Judgement::new("B10", what, Some(growth), Limit::at_most(1.0, "x")));
    }
    all
}

fn print(measured: &Measured) {
    let line = |what: &str, d: &Durations, rest: &str| {
        let Durations { median, p99, min, max } = d;
        println!("{what:<44} median {median:8.3} ms  p99 {p99:8.3}  min {min:8.3}  max {max:8.3}  {rest}");
    };
    let size = format!("{} services x {} endpoints", measured.services, measured.endpoints);
    line(
        &format!("cold start, {size}"),
        &measured.cold_start,
        &format!("{} calls", measured.cold_start_calls),
    );
    line(&format!("restart, {size}"), &measured.restart, "");
    for run in &measured.changes {
        let what = format!("one endpoint of {} services", run.services);
        line(&what, &run.milliseconds, &format!("{} calls", run.calls));
    }
}
