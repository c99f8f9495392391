//! Measures the path beside plain routing and beside the real kube-proxy (B1 to B5), all from one control plane in one lab.
//!
//! Each leg has a node, a client, an endpoint and a Service of its own, so that no rival's tables or connection tracking
//! see another's flows. Legs are measured in turn, round by round, and each figure is a ratio within a round.

mod load;
mod record;
mod station;
mod targets;

pub use record::{Loaded, Machine, Record, Series};
pub use targets::{Judgement, Ratio, Verdict};

use crate::controlplane::ControlPlane;
use crate::lab::Options;
use crate::load::Mode;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use station::Station;
use std::path::PathBuf;
use std::time::Instant;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchNetArgs {
    /// The main ratios in 10 minutes: fewer and shorter rounds than the method asks for, and no 30,000 Services.
    #[arg(long)]
    pub quick: bool,
    /// Numbers of Services, ascending (10, 1,000, 10,000 and 30,000; quick: without the last).
    #[arg(long, value_delimiter = ',')]
    pub sizes: Vec<usize>,
    /// Rounds of each case (11; quick: 5).
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Seconds of each leg in a round (2; quick: 1).
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Flows at once.
    #[arg(long, default_value_t = 32)]
    pub flows: usize,
    /// The folder that the record is written to.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/records"))]
    pub records: PathBuf,
}

/// What serves a leg's Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leg {
    /// Nothing: the endpoint's own address, by plain routing.
    Direct,
    /// The same once more.
    DirectAgain,
    /// Portolan as it comes: TCP at connect time.
    PortolanSocket,
    /// Portolan by packet, at tc.
    PortolanPacket,
    /// kube-proxy in its nftables mode.
    KubeProxyNftables,
    /// kube-proxy in its iptables mode.
    KubeProxyIptables,
}

impl Leg {
    /// In the order in which a round goes through them.
    pub const ALL: [Self; 6] = [
        Self::Direct,
        Self::PortolanSocket,
        Self::KubeProxyNftables,
        Self::DirectAgain,
        Self::PortolanPacket,
        Self::KubeProxyIptables,
    ];

    /// Its name in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectAgain => "direct-again",
            Self::PortolanSocket => "portolan-socket",
            Self::PortolanPacket => "portolan-packet",
            Self::KubeProxyNftables => "kube-proxy-nftables",
            Self::KubeProxyIptables => "kube-proxy-iptables",
        }
    }
}

/// From where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// From a pod to a ClusterIP whose endpoint is on the same node.
    ClusterIp,
    /// From outside to a node port whose endpoint is on that node.
    NodePort,
}

/// What is measured of each leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Case {
    /// From where to where.
    pub way: Way,
    /// What the flows do.
    pub mode: Mode,
    /// How many Services there are.
    pub services: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let way = match self.way {
            Way::ClusterIp => "ClusterIP",
            Way::NodePort => "node port",
        };
        let mode = match self.mode {
            Mode::ConnectRequestClose => "TCP connect-request-close",
            Mode::TcpRequestResponse => "TCP request-response",
            Mode::UdpRequestResponse => "UDP request-response",
            Mode::Bulk => "bulk TCP",
        };
        write!(f, "{way}, {mode}, {} Services", self.services)
    }
}

/// The size at which all cases are measured; at the others, connections to a ClusterIP only.
const MAIN_SIZE: usize = 1_000;
/// Bulk streams at once: more only take turns.
const BULK_FLOWS: usize = 4;

/// Sizes, rounds and seconds as they will be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Whether it is less than the method asks for.
    pub quick: bool,
    /// Numbers of Services.
    pub sizes: Vec<usize>,
    /// Rounds of each case.
    pub rounds: usize,
    /// Seconds of each leg in a round.
    pub seconds: f64,
    /// Flows at once (bulk streams: four).
    pub flows: usize,
}

impl Plan {
    fn new(args: &BenchNetArgs) -> Result<Self> {
        let sizes = match (args.sizes.as_slice(), args.quick) {
            ([], true) => vec![10, 1_000, 10_000],
            ([], false) => vec![10, 1_000, 10_000, 30_000],
            (given, _) => given.to_vec(),
        };
        let (rounds, seconds) = if args.quick { (5, 1.0) } else { (11, 2.0) };
        let (rounds, seconds) = (args.rounds.unwrap_or(rounds), args.seconds.unwrap_or(seconds));
        ensure!(
            sizes.is_sorted() && sizes.iter().all(|&size| size >= Leg::ALL.len()),
            "--sizes must ascend from 6"
        );
        ensure!(rounds > 0, "--rounds must be above 0");
        let quick = args.quick || rounds < 11 || seconds < 2.0;
        Ok(Self { quick, sizes, rounds, seconds, flows: args.flows })
    }

    fn cases(&self, services: usize) -> Vec<Case> {
        let main = self.sizes.iter().copied().find(|&size| size >= MAIN_SIZE).or(self.sizes.last().copied());
        let case = |way, mode| Case { way, mode, services };
        let mut cases = vec![case(Way::ClusterIp, Mode::ConnectRequestClose)];
        if Some(services) == main {
            cases.extend(
                [Mode::TcpRequestResponse, Mode::UdpRequestResponse, Mode::Bulk]
                    .map(|mode| case(Way::ClusterIp, mode)),
            );
            cases.push(case(Way::NodePort, Mode::ConnectRequestClose));
        }
        cases
    }
}

/// Measures all, prints it and writes the record.
///
/// # Errors
/// If the laboratory cannot be raised. A leg that cannot run is entered as that.
pub fn run(args: &BenchNetArgs) -> Result<Record> {
    let plan = Plan::new(args)?;
    if plan.quick {
        println!("quick: {} rounds of {} s, where the method asks for 11 of 2 s", plan.rounds, plan.seconds);
    }
    let lab = Options::default().nodes(Leg::ALL.len() as u8).create()?;
    crate::lab::on_signal_exit_with(130);
    let plane = ControlPlane::start_telling(&lab, &|step| println!("{step}"))?;
    let mut stations = Leg::ALL
        .iter()
        .enumerate()
        .map(|(index, leg)| Station::new(&lab, &plane, index, *leg).with_context(|| leg.name()))
        .collect::<Result<Vec<_>>>()?;
    let mut record = Record::new(plan.clone(), Machine::of(&plane));
    let mut fillers = 0;
    for &size in &plan.sizes {
        let begun = Instant::now();
        let wanted = size - Leg::ALL.len();
        plane.block_on(load::fill(plane.client(), fillers..wanted))?;
        fillers = fillers.max(wanted);
        println!("{size} Services are in the API server after {:.1} s", begun.elapsed().as_secs_f64());
        record.loads.extend(load::wait_for_all(&plane, &mut stations, size)?);
        for case in plan.cases(size) {
            measure(&plan, case, &mut stations, &mut record);
        }
    }
    record.judge();
    record.print();
    let file = record.write(&args.records)?;
    println!("record: {}", file.display());
    Ok(record)
}

/// All rounds of one case.
fn measure(plan: &Plan, case: Case, stations: &mut [Station], record: &mut Record) {
    let mut all: Vec<Series> = stations.iter().map(|station| Series::new(case, station.leg())).collect();
    for _ in 0..plan.rounds {
        for (station, series) in stations.iter_mut().zip(&mut all) {
            let flows = if case.mode == Mode::Bulk { BULK_FLOWS } else { plan.flows };
            series.enter(station.measure(case, flows, plan.seconds));
        }
    }
    println!("{case}");
    for (series, station) in all.iter_mut().zip(stations.iter()) {
        if series.failed() > 0 {
            series.drops = station.drops();
        }
    }
    for series in &all {
        println!("  {}", series.line(&all));
        series.drops.lines().for_each(|line| println!("      {line}"));
    }
    record.series.extend(all);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_is_quick_unless_it_does_what_the_method_asks() {
        let args = |quick, rounds, sizes: &[usize]| BenchNetArgs {
            quick,
            sizes: sizes.to_vec(),
            rounds,
            seconds: None,
            flows: 32,
            records: PathBuf::new(),
        };
        let full = Plan::new(&args(false, None, &[])).unwrap();
        assert!(!full.quick && full.sizes.last() == Some(&30_000) && full.rounds == 11);
        assert!(Plan::new(&args(false, Some(5), &[])).unwrap().quick);
        let quick = Plan::new(&args(true, None, &[])).unwrap();
        assert!(quick.quick && quick.sizes.last() == Some(&10_000));
        assert_eq!(quick.cases(1_000).len(), 5);
        assert_eq!(quick.cases(10).len(), 1);
        assert_eq!(Plan::new(&args(true, None, &[10, 50])).unwrap().cases(50).len(), 5);
        assert!(Plan::new(&args(true, None, &[50, 10])).is_err());
    }
}
