//! Which endpoint a connection gets where one of two takes ten times as long (L2): Portolan's algorithms, by packet and by socket, beside the
//! real kube-proxy, in one laboratory and at one rate of clients. What counts is how long clients wait, and how many go to each.

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::{Judgement, Limit, Ratio};
use crate::lab::layout::kube_proxy_on;
use crate::lab::{AgentOptions, Endpoint, Family, Options, PodOptions, Service, at};
use crate::serial::{self, Met};
use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// The kind of its records.
pub const KIND: &str = "choose";

/// Clients of each leg.
const CLIENTS: u32 = 1_200;
const QUICK_CLIENTS: u32 = 240;
/// The port of the Services, and that of the servers.
const PORT: u16 = 80;
const TARGET: u16 = 8_090;
/// How long what serves may take to do so.
const READY: Duration = Duration::from_secs(120);
/// Against random: the time within which 99 of 100 clients are served.
const LIMIT: f64 = 0.5;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchChooseArgs {
    /// A fifth of the clients.
    #[arg(long)]
    pub quick: bool,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// One way to an endpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Leg {
    /// Who chooses, and how.
    pub name: String,
    /// Milliseconds within which half of the clients were served.
    pub p50_ms: f64,
    /// The same of 99 in 100.
    pub p99_ms: f64,
    /// How many each server served.
    pub answered: BTreeMap<String, usize>,
    /// How many were not served.
    pub failed: usize,
}

impl Leg {
    fn new(name: String, met: Met) -> Self {
        let ms = |thousandths| met.quantile(thousandths).as_secs_f64() * 1e3;
        Self { name, p50_ms: ms(500), p99_ms: ms(990), answered: met.answered.clone(), failed: met.failed }
    }

    /// How many each server served, in words.
    pub fn shares(&self) -> String {
        let shares: Vec<_> = self.answered.iter().map(|(name, count)| format!("{name} {count}")).collect();
        shares.join(", ")
    }
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Clients of each leg.
    pub clients: u32,
    /// How many came in a second.
    pub rate: f64,
    /// Milliseconds that the two servers take for a connection.
    pub work_ms: [u64; 2],
    /// Each leg.
    pub legs: Vec<Leg>,
}

/// Measures, prints, and writes the record.
///
/// # Errors
/// If the laboratory does not stand, or a leg serves nobody.
pub fn run(args: &BenchChooseArgs) -> Result<Record<Measured>> {
    let clients = if args.quick { QUICK_CLIENTS } else { CLIENTS };
    let measured = Measured {
        clients,
        rate: serial::RATE,
        work_ms: [serial::QUICK, serial::SLOW].map(|work| work.as_millis() as u64),
        legs: measure(clients)?,
    };
    let mut record = Record::new(KIND, Machine::here([]), args.quick, measured);
    record.targets = judge(&record.measured.legs);
    record.void = record
        .measured
        .legs
        .iter()
        .filter(|leg| leg.failed > 0)
        .map(|leg| format!("{}: {} clients were not served", leg.name, leg.failed))
        .collect();
    record.finish(&args.records)
}

/// The algorithms that are measured, and the ClusterIPs of their Services.
const ALGORITHMS: [(&str, Ipv4Addr); 3] = [
    ("random", Ipv4Addr::new(10, 96, 0, 31)),
    ("round-robin", Ipv4Addr::new(10, 96, 0, 32)),
    ("least-connections", Ipv4Addr::new(10, 96, 0, 33)),
];

/// Clients on three nodes: of one the sockets choose, of one the packets, of one kube-proxy's rules.
fn measure(clients: u32) -> Result<Vec<Leg>> {
    let lab = Options::default().create()?;
    let pods = [("quick", 0), ("slow", 1)].map(|(name, node)| lab.add_pod(name, node, &PodOptions::client()));
    let [quick, slow] = pods;
    let (quick, slow) = (quick?, slow?);
    let place = |pod: &'static str| lab.pod(pod).with_context(|| format!("no pod {pod}"));
    for (number, name) in ["by-socket", "by-packet", "by-rules"].into_iter().enumerate() {
        lab.add_pod(name, number, &PodOptions::client())?;
    }
    let servers = [&quick, &slow].map(|pod| (pod.place(), pod.ip(Family::V4), pod.name()));
    let _servers = serial::unequal(servers, TARGET)?;
    let services = services(&[quick.endpoint(), slow.endpoint()]);
    services.iter().try_for_each(|service| lab.manifests().apply(service))?;
    for (node, sockets) in [(0, "--socket-lb=all"), (1, "--socket-lb=off")] {
        let options = AgentOptions::default().arguments(&[sockets]).ready_within(READY);
        lab.node(node).start_agent(&options)?;
    }
    let _rules = kube_proxy_on(&lab, 2, &services, "nftables", READY)?;
    let mut legs = Vec::new();
    for (algorithm, address) in ALGORITHMS {
        for (pod, how) in [("by-packet", "by packet"), ("by-socket", "by socket")] {
            let met = serial::clients(place(pod)?.place(), at(address, PORT), clients, serial::RATE)?;
            legs.push(told(Leg::new(format!("Portolan {algorithm}, {how}"), met)));
        }
    }
    let (_, address) = ALGORITHMS[0];
    let met = serial::clients(place("by-rules")?.place(), at(address, PORT), clients, serial::RATE)?;
    legs.push(told(Leg::new("kube-proxy nftables".to_owned(), met)));
    Ok(legs)
}

fn services(endpoints: &[Endpoint]) -> Vec<Service> {
    let service = |(algorithm, address): (&str, Ipv4Addr)| {
        Service::new(algorithm, address)
            .tcp(PORT, TARGET)
            .annotation("service.portolan.dev/lb-algorithm", algorithm)
            .endpoints(endpoints.iter().cloned())
    };
    ALGORITHMS.map(service).into()
}

fn told(leg: Leg) -> Leg {
    println!("{:<40} p50 {:>6.0} ms, p99 {:>6.0} ms; {}", leg.name, leg.p50_ms, leg.p99_ms, leg.shares());
    leg
}

fn judge(legs: &[Leg]) -> Vec<Judgement> {
    let p99 = |name: String| legs.iter().find(|leg| leg.name == name).map(|leg| leg.p99_ms);
    let against = |how: &str| {
        let ratio = p99(format!("Portolan least-connections, {how}"))
            .zip(p99(format!("Portolan random, {how}")))
            .map(|(least, random)| Ratio::exactly(least / random));
        let what = format!("p99 of least-connections over that of random, {how}");
        Judgement::new("L2", what, ratio, Limit::at_most(LIMIT, "x"))
    };
    vec![against("by packet"), against("by socket")]
}
