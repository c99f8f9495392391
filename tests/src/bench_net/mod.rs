//! Measures the path beside plain routing and beside the real kube-proxy (B1 to B5), all from one control plane in one lab.
//!
//! Each leg has a node, a client, an endpoint and a Service of its own, so that no rival's tables or connection tracking
//! see another's flows. Legs are measured in turn, round by round, each round beginning with another leg, and each figure is a
//! ratio within a round.

mod hooks;
mod load;
mod programs;
mod proxies;
mod record;
mod station;
mod targets;

pub use programs::ProgramShare;
pub(crate) use proxies::resident_kib;
pub use proxies::{AgentChanges, ProxyCost};
pub use record::{Loaded, Measured, NetRecord, Series};

use crate::bench::record::{self as records, RECORDS};
use crate::controlplane::ControlPlane;
use crate::lab::{Lab, Options};
use crate::load::Mode;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use station::Station;
use std::path::PathBuf;
use std::time::Instant;

/// The kind of its records.
pub const KIND: &str = "net";

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchNetArgs {
    /// The main ratios in some 10 minutes: fewer and shorter rounds than the method asks for, up to 10,000 Services, and no
    /// rivals above that if more are asked for.
    #[arg(long)]
    pub quick: bool,
    /// Go on with the newest run that was cut short, if it was of this plan and this commit.
    #[arg(long)]
    pub resume: bool,
    /// Only the cases whose names contain this, and no proxies: for a closer look. The record stays incomplete.
    #[arg(long)]
    pub only: Option<String>,
    /// Numbers of Services, ascending (10, 1,000, 10,000 and, unless quick, 30,000).
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
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

impl BenchNetArgs {
    fn concerns(&self, case: &Case) -> bool {
        self.only.as_ref().is_none_or(|text| case.to_string().contains(text))
    }
}

/// What serves a leg's Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leg {
    /// Nothing: the endpoint's own address, by plain routing.
    Direct,
    /// The same once more.
    DirectAgain,
    /// The same again, through programs that do nothing at the hooks of Portolan's tc programs.
    EmptyHooks,
    /// Portolan as it comes: TCP at connect time.
    PortolanSocket,
    /// Portolan by packet, at tc.
    PortolanPacket,
    /// Portolan with XDP on the uplink.
    PortolanXdp,
    /// kube-proxy in its nftables mode.
    KubeProxyNftables,
    /// kube-proxy in its iptables mode.
    KubeProxyIptables,
}

impl Leg {
    /// In the order in which a round goes through them, and round again, wherever it begins.
    pub const ALL: [Self; 8] = [
        Self::Direct,
        Self::PortolanSocket,
        Self::KubeProxyNftables,
        Self::PortolanXdp,
        Self::DirectAgain,
        Self::PortolanPacket,
        Self::KubeProxyIptables,
        Self::EmptyHooks,
    ];

    /// Whether it is plain routing to the endpoint's own address: no Service, and nothing that serves one.
    pub fn is_plain(self) -> bool {
        matches!(self, Self::Direct | Self::DirectAgain | Self::EmptyHooks)
    }

    /// Whether it is Portolan.
    pub fn is_portolan(self) -> bool {
        matches!(self, Self::PortolanSocket | Self::PortolanPacket | Self::PortolanXdp)
    }

    /// Whether it is kube-proxy.
    pub fn is_rival(self) -> bool {
        matches!(self, Self::KubeProxyNftables | Self::KubeProxyIptables)
    }

    /// Its name in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectAgain => "direct-again",
            Self::EmptyHooks => "empty-hooks",
            Self::PortolanSocket => "portolan-socket",
            Self::PortolanPacket => "portolan-packet",
            Self::PortolanXdp => "portolan-xdp",
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
    /// From outside to a node port whose endpoint is on another node.
    NodePortElsewhere,
}

impl Way {
    /// Whether a leg differs from the others on this way: socket hooks do not see what comes from outside, XDP on the
    /// uplink does not see pods.
    pub fn concerns(self, leg: Leg) -> bool {
        match self {
            Self::ClusterIp => leg != Leg::PortolanXdp,
            Self::NodePort | Self::NodePortElsewhere => leg != Leg::PortolanSocket,
        }
    }
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
            Way::NodePort => "node port, endpoint here",
            Way::NodePortElsewhere => "node port, endpoint elsewhere",
        };
        let mode = match self.mode {
            Mode::ConnectRequestClose => "TCP connect-request-close",
            Mode::TcpRequestResponse => "TCP request-response",
            Mode::UdpRequestResponse => "UDP request-response",
            Mode::Packets => "UDP packets, many under way",
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// The largest size at which the rivals take part.
    pub rivals_up_to: usize,
    /// Changes of one endpoint that are timed, of each leg at each size.
    pub changes: usize,
}

impl Plan {
    fn new(args: &BenchNetArgs) -> Result<Self> {
        let sizes = match (args.sizes.as_slice(), args.quick) {
            ([], false) => vec![10, 1_000, 10_000, 30_000],
            // The rivals take longer to load the last size than all else together.
            ([], true) => vec![10, 1_000, 10_000],
            (sizes, _) => sizes.to_vec(),
        };
        let (rounds, seconds) = if args.quick { (5, 1.0) } else { (11, 2.0) };
        let (rounds, seconds) = (args.rounds.unwrap_or(rounds), args.seconds.unwrap_or(seconds));
        ensure!(
            sizes.is_sorted() && sizes.iter().all(|&size| size >= Leg::ALL.len()),
            "--sizes must ascend from {}",
            Leg::ALL.len()
        );
        ensure!(rounds > 0, "--rounds must be above 0");
        let quick = args.quick || rounds < 11 || seconds < 2.0;
        let (rivals_up_to, changes) = if args.quick { (10_000, 30) } else { (usize::MAX, 200) };
        Ok(Self { quick, sizes, rounds, seconds, flows: args.flows, rivals_up_to, changes })
    }

    /// The size at which all cases are measured.
    fn main_size(&self) -> Option<usize> {
        self.sizes.iter().copied().find(|&size| size >= MAIN_SIZE).or(self.sizes.last().copied())
    }

    fn cases(&self, services: usize) -> Vec<Case> {
        let case = |way, mode| Case { way, mode, services };
        let mut cases = vec![case(Way::ClusterIp, Mode::ConnectRequestClose)];
        if Some(services) == self.main_size() {
            cases.extend(
                [Mode::TcpRequestResponse, Mode::UdpRequestResponse, Mode::Bulk]
                    .map(|mode| case(Way::ClusterIp, mode)),
            );
            // No target asks for it.
            if !self.quick {
                cases.push(case(Way::ClusterIp, Mode::Packets));
            }
            let outside = [Way::NodePort, Way::NodePortElsewhere];
            cases.extend(outside.map(|way| case(way, Mode::ConnectRequestClose)));
        }
        cases
    }
}

/// Measures all, prints it and writes the record, after each case anew.
///
/// # Errors
/// If the laboratory cannot be raised. A leg that cannot run is entered as that.
pub fn run(args: &BenchNetArgs) -> Result<NetRecord> {
    let plan = Plan::new(args)?;
    if plan.quick {
        println!("quick: {} rounds of {} s, where the method asks for 11 of 2 s", plan.rounds, plan.seconds);
    }
    let unfinished = if args.resume { unfinished(args, &plan)? } else { None };
    let mut lab = Options::default().nodes(Leg::ALL.len() as u8 + 1).create()?;
    crate::lab::on_signal_exit_with(130);
    let plane = ControlPlane::start_telling(&lab, &|step| println!("{step}"))?;
    let stations = stations(&mut lab, &plane)?;
    let record = unfinished.unwrap_or_else(|| record::begin(plan.clone(), &plane));
    let mut bench = Bench { args, plan, plane: &plane, stations, record, fillers: 0 };
    for size in bench.plan.sizes.clone() {
        bench.size(size)?;
    }
    bench.record.complete = args.only.is_none();
    bench.save()?;
    bench.record.print();
    Ok(bench.record)
}

/// The newest run that was cut short, if it is of this plan and this commit.
fn unfinished(args: &BenchNetArgs, plan: &Plan) -> Result<Option<NetRecord>> {
    let commit = records::commit();
    let newest = records::read::<Measured>(&args.records, KIND)?.into_iter().next();
    Ok(newest.filter(|record| {
        !record.complete && record.machine.commit == commit && record.measured.plan == *plan
    }))
}

fn stations(lab: &mut Lab, plane: &ControlPlane) -> Result<Vec<Station>> {
    let mut stations = Vec::new();
    for (index, leg) in Leg::ALL.into_iter().enumerate() {
        if leg == Leg::PortolanXdp {
            lab.prepare_for_xdp(index)?;
        }
        stations.push(Station::new(lab, plane, index, leg).with_context(|| leg.name())?);
    }
    Ok(stations)
}

/// A benchmark under way.
struct Bench<'a> {
    args: &'a BenchNetArgs,
    plan: Plan,
    plane: &'a ControlPlane,
    stations: Vec<Station>,
    record: NetRecord,
    /// Services that nobody calls.
    fillers: usize,
}

impl Bench<'_> {
    /// Loads a size, unless all is measured of it, and measures what is not.
    fn size(&mut self, size: usize) -> Result<()> {
        let measured = &self.record.measured;
        let is_measured = |case: &Case| measured.series.iter().any(|series| series.case == *case);
        let cases: Vec<_> = self.plan.cases(size).into_iter().filter(|case| !is_measured(case)).collect();
        let cases: Vec<_> = cases.into_iter().filter(|case| self.args.concerns(case)).collect();
        let is_known = measured.proxies.iter().any(|cost| cost.services == size);
        let proxies = self.args.only.is_none() && !is_known;
        if cases.is_empty() && !proxies {
            println!("{size} Services: measured before");
            return Ok(());
        }
        self.load(size)?;
        for case in cases {
            self.measure(case);
            self.save()?;
        }
        if proxies {
            let costs = proxies::measure(self.plane, &self.stations, size, self.plan.changes);
            self.record.measured.proxies.extend(costs);
            self.save()?;
        }
        Ok(())
    }

    fn load(&mut self, size: usize) -> Result<()> {
        if size > self.plan.rivals_up_to {
            let rivals = self.stations.iter_mut().filter(|station| station.leg().is_rival());
            rivals.for_each(|rival| rival.give_up("left out of a quick run above 10,000 Services"));
        }
        let begun = Instant::now();
        let wanted = size - Leg::ALL.len();
        self.plane.block_on(load::fill(self.plane, self.fillers..wanted))?;
        self.fillers = self.fillers.max(wanted);
        println!("{size} Services are in the API server after {:.1} s", begun.elapsed().as_secs_f64());
        let loads = load::wait_for_all(self.plane, &mut self.stations, size)?;
        println!("  the machine works {:.0} % of its time before the first round", 100.0 * load::settle()?);
        let known = &mut self.record.measured.loads;
        known.retain(|load| load.services != size);
        known.extend(loads);
        Ok(())
    }

    /// All rounds of one case.
    fn measure(&mut self, case: Case) {
        let Plan { rounds, flows, seconds, .. } = self.plan;
        let flows = if case.mode == Mode::Bulk { BULK_FLOWS } else { flows };
        let mut all = Vec::new();
        let legs: Vec<_> = self.stations.iter().filter(|station| case.way.concerns(station.leg())).collect();
        all.extend(legs.iter().map(|station| Series::new(case, station.leg())));
        for round in 0..rounds {
            for leg in turns(round, legs.len()) {
                all[leg].enter(legs[leg].measure(case, flows, seconds));
            }
        }
        println!("{case}");
        for (series, station) in all.iter_mut().zip(legs) {
            // The count costs time, so it is none of the rounds.
            if series.leg.is_portolan() && case.mode != Mode::Bulk {
                series.programs = station.programs(case, flows, seconds).unwrap_or_else(|error| {
                    println!("  the programs of {} were not counted: {error}", series.leg.name());
                    Vec::new()
                });
            }
            if series.failed() > 0 || series.rates().contains(&Some(0.0)) {
                series.drops = station.drops();
            }
        }
        for series in &all {
            println!("  {}", series.line(&all));
            series.drops.lines().for_each(|line| println!("      {line}"));
        }
        self.record.measured.series.extend(all);
    }

    fn save(&mut self) -> Result<()> {
        record::judge(&mut self.record);
        let file = self.record.write(&self.args.records)?;
        println!("record: {}{}", file.display(), if self.record.complete { "" } else { " (so far)" });
        Ok(())
    }
}

/// The legs of a round, by their numbers from 0: each round begins one leg later, so that no leg always has the same place.
fn turns(round: usize, legs: usize) -> impl Iterator<Item = usize> {
    (0..legs).map(move |turn| (round + turn) % legs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_goes_through_all_legs_and_begins_with_another() {
        let rounds: Vec<Vec<_>> = (0..4).map(|round| turns(round, 3).collect()).collect();
        assert_eq!(rounds, [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]);
        assert_eq!(turns(5, 0).count(), 0);
    }

    #[test]
    fn each_leg_is_in_records_by_its_name() {
        for leg in Leg::ALL {
            assert_eq!(serde_json::to_value(leg).unwrap(), leg.name());
        }
    }

    #[test]
    fn the_plan_is_quick_unless_it_does_what_the_method_asks() {
        let args = |quick, rounds, sizes: &[usize]| BenchNetArgs {
            quick,
            sizes: sizes.to_vec(),
            rounds,
            seconds: None,
            flows: 32,
            resume: false,
            only: None,
            records: PathBuf::new(),
        };
        let full = Plan::new(&args(false, None, &[])).unwrap();
        assert!(!full.quick && full.sizes.last() == Some(&30_000) && full.rounds == 11);
        assert!(Plan::new(&args(false, Some(5), &[])).unwrap().quick);
        let quick = Plan::new(&args(true, None, &[])).unwrap();
        assert!(quick.quick && quick.rivals_up_to == 10_000 && full.rivals_up_to > 30_000);
        assert_eq!(quick.sizes, [10, 1_000, 10_000]);
        assert_eq!((quick.cases(1_000).len(), full.cases(1_000).len()), (6, 7));
        assert_eq!(quick.cases(10).len(), 1);
        assert_eq!(Plan::new(&args(true, None, &[10, 50])).unwrap().cases(50).len(), 6);
        assert!(Plan::new(&args(true, None, &[50, 10])).is_err());
    }
}
