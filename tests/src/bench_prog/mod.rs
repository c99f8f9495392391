//! Measures the programs themselves: one packet at a time beside a program that does nothing (B6, B7), what the verifier
//! walks (B8), what the maps take (B13), `connect(2)` with and without the socket hooks, and XDP with live frames.

mod cases;
mod frames;
mod sockets;
mod stack;
mod tables;

pub use cases::{CaseCost, WatchCost};
pub use frames::LiveFrames;
pub use sockets::Connects;
pub use tables::{
    ProgramCost, beside_flows, deepest_stacks, kernel_memory_beside_flows, loaded, map_memory,
    memory_of_frontends, verified_instructions,
};

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::{Judgement, Limit, Ratio, Verdict};
use crate::bench_agent::cpu_seconds;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The kind of its records.
pub const KIND: &str = "prog";

/// B6: times the empty program, in XDP and in tc, and in both for IPv6.
const ESTABLISHED_XDP_LIMIT: f64 = 5.0;
const ESTABLISHED_TC_LIMIT: f64 = 5.4;
const ESTABLISHED_IPV6_LIMIT: f64 = 6.0;
/// B7: times the empty program.
const NOT_OURS_LIMIT: f64 = 1.6;
/// B6: times the same new flow that nobody watches.
const WATCHED_LIMIT: f64 = 1.03;
/// B8: bytes of stack on the deepest chain of calls; the verifier lets a program have 512.
pub const STACK_LIMIT: u64 = 448;
/// B8: seconds of CPU until every program is loaded.
const LOADING_LIMIT: f64 = 2.0;
/// Instructions that the verifier walks of one program; the kernel's limit is 1,000,000. No target, but more than this wants a
/// reason: each of them is time at an agent's start.
pub const VERIFIED_LIMIT: u32 = 80_000;
/// B13: bytes of all maps but `flows` at their default sizes, on two CPUs.
pub const MAP_MEMORY_LIMIT: u64 = 32 << 20;

/// What the method asks for.
const REPEATS: u32 = 1_000_000;
const SAMPLES: usize = 15;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchProgArgs {
    /// A third of the samples, and shorter ones.
    #[arg(long)]
    pub quick: bool,
    /// Runs of a program whose mean is one sample (1,000,000; quick: 300,000).
    #[arg(long)]
    pub repeats: Option<u32>,
    /// Samples; the median counts (15; quick: 7).
    #[arg(long)]
    pub samples: Option<usize>,
    /// What it costs a new flow that somebody watches, and nothing else: printed, no record is written.
    #[arg(long)]
    pub watch: bool,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// Numbers of repeats and samples as they will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effort {
    /// Runs of a program whose mean is one sample.
    pub repeats: u32,
    /// Samples.
    pub samples: usize,
}

impl BenchProgArgs {
    fn effort(&self) -> Effort {
        let (repeats, samples) = if self.quick { (300_000, 7) } else { (REPEATS, SAMPLES) };
        let samples = self.samples.unwrap_or(samples).max(1);
        Effort { repeats: self.repeats.unwrap_or(repeats).max(1), samples }
    }
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// How much.
    pub effort: Effort,
    /// Each packet program on the packets of B6 and B7.
    pub programs: Vec<ProgramCost>,
    /// The same packets in IPv6; nothing in records of old.
    #[serde(default)]
    pub programs_ipv6: Vec<ProgramCost>,
    /// Each packet program on other packets, one run at a time.
    pub cases: Vec<CaseCost>,
    /// New flows while somebody watches; nothing in records of old.
    #[serde(default)]
    pub watched: Vec<WatchCost>,
    /// Instructions that the verifier walks, of every program.
    pub verified: BTreeMap<String, u32>,
    /// Bytes of machine code, of every program.
    pub jited: BTreeMap<String, u32>,
    /// Bytes of the deepest stack, of every program.
    #[serde(default)]
    pub stacks: BTreeMap<String, u64>,
    /// Seconds of CPU until every program is loaded; nothing in records of old.
    #[serde(default)]
    pub loading: Option<f64>,
    /// Bytes that each map takes at its default size.
    pub map_memory: BTreeMap<String, u64>,
    /// Calls of `connect(2)`.
    pub connects: Vec<Connects>,
    /// XDP with frames that leave.
    pub live_frames: Vec<LiveFrames>,
}

/// Measures, prints, and writes the record.
///
/// # Errors
/// If a program does not load, or does something else than what is to be measured.
pub fn run(args: &BenchProgArgs) -> Result<Record<Measured>> {
    let effort = args.effort();
    let quick = effort.repeats < REPEATS || effort.samples < SAMPLES;
    let before = cpu_seconds(std::process::id())?;
    let object = loaded()?;
    let loading = cpu_seconds(std::process::id())? - before;
    let (verified, jited) = verified_instructions(&object)?;
    let stacks = deepest_stacks(&object)?;
    drop(object);
    let measured = Measured {
        effort,
        programs: tables::measure(effort, tables::IPV4)?,
        programs_ipv6: tables::measure(effort, tables::IPV6)?,
        cases: cases::measure(effort)?,
        watched: cases::measure_watched(effort)?,
        verified,
        jited,
        stacks,
        loading: Some(loading),
        map_memory: map_memory()?,
        live_frames: frames::measure(effort)?,
        connects: sockets::measure(effort)?,
    };
    let mut record = Record::new(KIND, Machine::here([]), quick, measured);
    record.targets = judge(&record.measured);
    record.notes = vec![
        format!(
            "Maps are measured when they are made. `frontends` takes its memory by entry: {:.1} MiB more with the 60,000 addresses \
             of 30,000 Services.",
            memory_of_frontends()? as f64 / f64::from(1 << 20)
        ),
        "Packets of a known flow and of nobody: the same packet at every repeat, among 60,000 other flows.".into(),
        "The other cases: one run at a time on a new packet, so with a cold processor, as the empty program beside them.".into(),
    ];
    print(&record.measured);
    record.finish(&args.records)
}

/// Measures and prints what it costs new flows that somebody watches; whether it is met.
///
/// # Errors
/// As [`run`].
pub fn price_of_watching(args: &BenchProgArgs) -> Result<bool> {
    let watched = cases::measure_watched(args.effort())?;
    print_watched(&watched);
    let judgements = judge_watched(&watched);
    judgements.iter().for_each(|judgement| println!("{judgement}"));
    Ok(judgements.iter().all(|judgement| judgement.verdict == Verdict::Met))
}

fn judge_watched(watched: &[WatchCost]) -> Vec<Judgement> {
    let limit = Limit::at_most(WATCHED_LIMIT, "x unwatched");
    let judged = watched.iter().map(|cost| {
        let what = format!("{}, {}, while somebody watches", cost.program, cost.case);
        let ratio = (cost.alone > 0.0).then(|| Ratio::exactly(cost.watched / cost.alone));
        Judgement::new("B6", what, ratio, limit.clone())
    });
    judged.collect()
}

fn judge(measured: &Measured) -> Vec<Judgement> {
    let mut all = judge_watched(&measured.watched);
    for (family, programs) in [("", &measured.programs), ("IPv6, ", &measured.programs_ipv6)] {
        for program in programs {
            let of = |what: &str| format!("{}, {family}{what}", program.program);
            let established = match (family, program.program.as_str()) {
                ("", "xdp_uplink") => ESTABLISHED_XDP_LIMIT,
                ("", _) => ESTABLISHED_TC_LIMIT,
                _ => ESTABLISHED_IPV6_LIMIT,
            };
            let limit = Limit::at_most(established, "x empty");
            all.push(Judgement::new(
                "B6",
                of("packet of an established flow"),
                program.established_ratio,
                limit,
            ));
            let limit = Limit::at_most(NOT_OURS_LIMIT, "x empty");
            all.push(Judgement::new("B7", of("packet that is not ours"), program.not_ours_ratio, limit));
        }
    }
    for (program, bytes) in &measured.stacks {
        let limit = Limit::at_most(STACK_LIMIT as f64, "bytes of stack");
        all.push(Judgement::new("B8", program, Some(Ratio::exactly(*bytes as f64)), limit));
    }
    let limit = Limit::at_most(LOADING_LIMIT, "s of CPU");
    all.push(Judgement::new("B8", "loading every program", measured.loading.map(Ratio::exactly), limit));
    let mebibytes = beside_flows(&measured.map_memory) as f64 / f64::from(1 << 20);
    let limit = Limit::at_most((MAP_MEMORY_LIMIT >> 20) as f64, "MiB");
    let what = "all maps but flows at their default sizes";
    all.push(Judgement::new("B13", what, Some(Ratio::exactly(mebibytes)), limit));
    all
}

fn print(measured: &Measured) {
    let Effort { repeats, samples } = measured.effort;
    println!("nanoseconds per packet, median of {samples} x {repeats} runs");
    print_programs("program", &measured.programs);
    print_programs("IPv6", &measured.programs_ipv6);
    println!("\nother cases, one run at a time: nanoseconds, and those of the empty program");
    for case in &measured.cases {
        println!("{:<14} {:<51} {:>5.0} {:>5.0}", case.program, case.case, case.nanoseconds, case.empty);
    }
    print_watched(&measured.watched);
    println!("\nverified instructions, bytes of machine code, and of stack on the deepest chain");
    for (program, count) in &measured.verified {
        let jited = measured.jited.get(program).copied().unwrap_or_default();
        let stack = measured.stacks.get(program).copied().unwrap_or_default();
        println!("{program:<14} {count:>7} {jited:>7} {stack:>4}");
    }
    println!("\nconnect(2) per second");
    for connects in &measured.connects {
        println!("{:<56} {:>9.0}/s  {}", connects.what, connects.per_second.median, connects.ratio_text());
    }
    println!("\nXDP on veth, live frames per second");
    for frames in &measured.live_frames {
        println!("{:<64} {:>9.0}/s", frames.what, frames.per_second.median);
    }
}

fn print_watched(watched: &[WatchCost]) {
    println!("\nnew flows: nanoseconds while nobody watches, and while somebody does");
    for cost in watched {
        let more = (cost.watched / cost.alone.max(1.0) - 1.0) * 100.0;
        let (program, case) = (&cost.program, &cost.case);
        println!("{program:<14} {case:<51} {:>5.0} {:>5.0} {more:>+5.1} %", cost.alone, cost.watched);
    }
}

fn print_programs(title: &str, costs: &[ProgramCost]) {
    println!("{title:<14} empty   established          not ours");
    for cost in costs {
        let ratio =
            |ratio: Option<Ratio>| ratio.map_or_else(String::new, |ratio| format!("{:.2} x", ratio.median));
        println!(
            "{:<14} {:>5.0}   {:>5.0} {:>8}      {:>5.0} {:>8}",
            cost.program,
            cost.empty,
            cost.established,
            ratio(cost.established_ratio),
            cost.not_ours,
            ratio(cost.not_ours_ratio)
        );
    }
}
