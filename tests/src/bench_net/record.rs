//! What a run leaves behind: everything that was measured, and on what.

use super::programs::ProgramShare;
use super::proxies::ProxyCost;
use super::targets;
use super::{Case, KIND, Leg, Plan};
use crate::bench::record::{Machine, Record, output};
use crate::bench::target::Ratio;
use crate::controlplane::ControlPlane;
use crate::load::Outcome;
use anyhow::Result;
use serde::{Deserialize, Serialize};

/// One leg of one case, round by round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    /// What was measured.
    pub case: Case,
    /// Of which leg.
    pub leg: Leg,
    /// The rounds; one that could not run is missing.
    pub rounds: Vec<Option<Outcome>>,
    /// Why the last one that could not run could not.
    pub failure: Option<String>,
    /// If operations failed: what Portolan says that it dropped until then.
    pub drops: String,
    /// What Portolan's programs take of an operation, counted in a run of its own; nothing of other legs, and of bulk
    /// streams, whose operations are bytes.
    #[serde(default)]
    pub programs: Vec<ProgramShare>,
}

impl Series {
    pub(super) fn new(case: Case, leg: Leg) -> Self {
        Self { case, leg, rounds: Vec::new(), failure: None, drops: String::new(), programs: Vec::new() }
    }

    pub(super) fn enter(&mut self, round: Result<Outcome, String>) {
        match round {
            Ok(outcome) => self.rounds.push(Some(outcome)),
            Err(failure) => {
                self.rounds.push(None);
                self.failure = Some(failure);
            }
        }
    }

    /// One whose rounds had these operations per second, for tests of what is made of it.
    #[cfg(test)]
    pub(crate) fn of_rates(case: Case, leg: Leg, rates: &[f64]) -> Self {
        let mut series = Self::new(case, leg);
        for rate in rates {
            series.enter(Ok(Outcome {
                mode: case.mode,
                flows: 1,
                seconds: 1.0,
                done: *rate as u64,
                per_second: *rate,
                failed: 0,
                latency: None,
            }));
        }
        series
    }

    /// Operations that failed, in all rounds.
    pub(crate) fn failed(&self) -> u64 {
        self.rounds.iter().flatten().map(|outcome| outcome.failed).sum()
    }

    /// Operations per second in each round.
    pub(crate) fn rates(&self) -> Vec<Option<f64>> {
        self.rounds.iter().map(|round| round.as_ref().map(|outcome| outcome.per_second)).collect()
    }

    /// Microseconds that 99 of 100 operations were shorter than, over the rounds.
    pub(crate) fn p99(&self) -> Option<Ratio> {
        let rounds = self.rounds.iter().flatten();
        Ratio::among(rounds.filter_map(|round| round.latency.map(|latency| latency.p99)))
    }

    /// Microseconds of an operation in Portolan's programs, if that was counted.
    pub(crate) fn in_programs(&self) -> Option<f64> {
        let nanoseconds: f64 = self.programs.iter().map(ProgramShare::per_operation).sum();
        (!self.programs.is_empty()).then_some(nanoseconds / 1e3)
    }

    /// For people: the median rate, and its ratio to direct.
    pub(super) fn line(&self, all: &[Self]) -> String {
        let direct = all.iter().find(|series| series.leg == Leg::Direct).map(Self::rates).unwrap_or_default();
        let ones: Vec<_> = self.rounds.iter().map(|_| Some(1.0)).collect();
        let name = self.leg.name();
        match (Ratio::of(&self.rates(), &ones), Ratio::of(&self.rates(), &direct)) {
            (Some(rate), Some(ratio)) => {
                let failed = self.failed();
                let p99 = self.p99().map(|p99| format!("  p99 {:.0} us", p99.median));
                let failed = if failed > 0 { format!("  {failed} failed") } else { String::new() };
                let programs = self.in_programs().map(|us| format!("  {us:.1} us in its programs"));
                let [p99, programs] = [p99, programs].map(Option::unwrap_or_default);
                format!("{name:<20} {:>14.0}/s  {ratio}{p99}{programs}{failed}", rate.median)
            }
            (Some(_) | None, _) => {
                format!(
                    "{name:<20} did not run: {}",
                    self.failure.as_deref().unwrap_or("nothing was measured")
                )
            }
        }
    }
}

/// How long a leg took to serve a number of Services.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Loaded {
    /// Which leg.
    pub leg: Leg,
    /// How many Services.
    pub services: usize,
    /// Seconds from the last of them in the API server.
    pub seconds: f64,
    /// Why it does not serve them.
    pub failure: Option<String>,
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// How much.
    pub plan: Plan,
    /// How long the legs took to load.
    pub loads: Vec<Loaded>,
    /// What was measured.
    pub series: Vec<Series>,
    /// What the proxies took, at each size.
    pub proxies: Vec<ProxyCost>,
}

/// A run.
pub type NetRecord = Record<Measured>;

/// A record that begins now.
pub(super) fn begin(plan: Plan, plane: &ControlPlane) -> NetRecord {
    let machine = Machine::here([
        ("kube-proxy", output(plane.kube_proxy_program(), &["--version"])),
        ("iptables", output("iptables", &["--version"])),
        ("nft", output("nft", &["--version"])),
    ]);
    let quick = plan.quick;
    let measured = Measured { plan, loads: Vec::new(), series: Vec::new(), proxies: Vec::new() };
    let mut record = Record::new(KIND, machine, quick, measured);
    record.notes = [
        "The rivals' connection tracking keeps what has ended for 1 s instead of 120 s, in their namespaces only.",
        "Endpoints keep no TIME_WAIT: thousands of connections per second from one address through a node's translated ports come back to the same port within a second.",
        "Client and server have a CPU each; the network between them is veth, so there is no NIC.",
        "XDP on veth needs checksums from senders and a program at the peer: the leg portolan-xdp has both, the others have not.",
        "Each round begins one leg later than the one before it, so that no leg always has the same place.",
        "The leg empty-hooks is plain routing through programs that do nothing at the hooks of Portolan's tc programs.",
    ]
    .map(str::to_owned)
    .into();
    record
}

/// Says of the targets what was measured until now.
pub(super) fn judge(record: &mut NetRecord) {
    record.targets = targets::judge(&record.measured);
    record.void = targets::void(&record.measured.series);
}
