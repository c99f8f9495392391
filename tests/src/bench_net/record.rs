//! What a run leaves behind: everything that was measured, and on what.

use super::station::kube_proxy;
use super::targets::{self, Judgement, Ratio};
use super::{Case, Leg, MAIN_SIZE, Plan};
use crate::controlplane::ControlPlane;
use crate::load::Outcome;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

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
}

impl Series {
    pub(super) fn new(case: Case, leg: Leg) -> Self {
        Self { case, leg, rounds: Vec::new(), failure: None, drops: String::new() }
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

    /// Operations that failed, in all rounds.
    pub(super) fn failed(&self) -> u64 {
        self.rounds.iter().flatten().map(|outcome| outcome.failed).sum()
    }

    /// Operations per second in each round.
    pub(super) fn rates(&self) -> Vec<Option<f64>> {
        self.rounds.iter().map(|round| round.as_ref().map(|outcome| outcome.per_second)).collect()
    }

    /// For people: the median rate, and its ratio to direct.
    pub(super) fn line(&self, all: &[Self]) -> String {
        let direct = all.iter().find(|series| series.leg == Leg::Direct).map(Self::rates).unwrap_or_default();
        let ones: Vec<_> = self.rounds.iter().map(|_| Some(1.0)).collect();
        let name = self.leg.name();
        match (Ratio::of(&self.rates(), &ones), Ratio::of(&self.rates(), &direct)) {
            (Some(rate), Some(ratio)) => {
                let failed = self.failed();
                let p99s: Vec<_> = self
                    .rounds
                    .iter()
                    .map(|round| round.as_ref()?.latency.map(|latency| latency.p99))
                    .collect();
                let p99 = Ratio::of(&p99s, &ones).map(|p99| format!("  p99 {:.0} us", p99.median));
                let failed = if failed > 0 { format!("  {failed} failed") } else { String::new() };
                format!("{name:<20} {:>14.0}/s  {ratio}{}{failed}", rate.median, p99.unwrap_or_default())
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

/// Where it was measured, and what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// The CPU's name.
    pub cpu: String,
    /// How many there are.
    pub cpus: usize,
    /// The commit that was built, with `+` if there was more.
    pub commit: String,
    /// Versions of the programs.
    pub versions: BTreeMap<String, String>,
}

fn output(program: impl AsRef<Path>, arguments: &[&str]) -> String {
    let output = Command::new(program.as_ref()).args(arguments).output();
    output
        .map_or_else(|_| "missing".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Machine {
    pub(super) fn of(plane: &ControlPlane) -> Self {
        let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let git = |arguments: &[&str]| output("git", &[&["-C", workspace], arguments].concat());
        let changed =
            if git(&["status", "--porcelain", "--untracked-files=no"]).is_empty() { "" } else { "+" };
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            kernel: kernel.trim().to_owned(),
            cpu: cpu.map_or_else(|| "unknown".into(), |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            commit: git(&["rev-parse", "HEAD"]) + changed,
            versions: BTreeMap::from([
                ("portolan".into(), env!("CARGO_PKG_VERSION").into()),
                ("kube-proxy".into(), output(kube_proxy(plane), &["--version"])),
                ("iptables".into(), output("iptables", &["--version"])),
                ("nft".into(), output("nft", &["--version"])),
            ]),
        }
    }
}

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What kind of record it is.
    pub kind: String,
    /// Seconds since 1970.
    pub time: u64,
    /// Where.
    pub machine: Machine,
    /// How much.
    pub plan: Plan,
    /// Whether the programs were built with optimization.
    pub optimized: bool,
    /// What a reader has to know.
    pub notes: Vec<String>,
    /// How long the legs took to load.
    pub loads: Vec<Loaded>,
    /// What was measured.
    pub series: Vec<Series>,
    /// The targets.
    pub targets: Vec<Judgement>,
    /// Why the run proves nothing; empty if it does.
    pub void: Vec<String>,
}

impl Record {
    pub(super) fn new(plan: Plan, machine: Machine) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let notes = [
            "The rivals' connection tracking keeps what has ended for 1 s instead of 120 s, in their namespaces only.",
            "Client and server have a CPU each; the network between them is veth, so there is no NIC.",
            "XDP, and node ports whose endpoint is on another node, are not measured.",
        ];
        Self {
            kind: "net".into(),
            time: now.as_secs(),
            machine,
            plan,
            optimized: !cfg!(debug_assertions),
            notes: notes.map(str::to_owned).into(),
            loads: Vec::new(),
            series: Vec::new(),
            targets: Vec::new(),
            void: Vec::new(),
        }
    }

    pub(super) fn judge(&mut self) {
        let sizes = &self.plan.sizes;
        let (smallest, largest) =
            (sizes.first().copied().unwrap_or_default(), sizes.last().copied().unwrap_or_default());
        let main = sizes.iter().copied().find(|&size| size >= MAIN_SIZE).unwrap_or(largest);
        self.targets = targets::judge(&self.series, smallest, main, largest);
        self.void = targets::void(&self.series);
    }

    pub(super) fn print(&self) {
        println!();
        self.targets.iter().for_each(|target| println!("{target}"));
        self.void.iter().for_each(|reason| println!("VOID: {reason}"));
        if self.plan.quick {
            println!("quick: fewer or shorter rounds than the method asks for");
        }
        if !self.optimized {
            println!("built without optimization: the rates are too low");
        }
    }

    pub(super) fn write(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let file = folder.join(format!("net-{}.json", self.time));
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(&file, text).with_context(|| file.display().to_string())?;
        Ok(file)
    }
}
