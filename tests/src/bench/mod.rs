//! What all benchmarks share: records, targets, and the run of all of them one after the other.

mod plot;
pub mod record;
pub mod report;
pub mod target;

use crate::bench_agent::{self, BenchAgentArgs};
use crate::bench_net::{self, BenchNetArgs};
use crate::bench_prog::{self, BenchProgArgs};
use crate::bench_sync::{self, BenchSyncArgs};
use anyhow::Result;
use clap::Parser;
use record::{RECORDS, Record};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Instant;
use target::Judgement;

/// The kinds of records that one run of all measures, in that order.
pub const KINDS: [&str; 4] = [bench_prog::KIND, bench_sync::KIND, bench_agent::KIND, bench_net::KIND];

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchAllArgs {
    /// Fewer and shorter rounds than the method asks for.
    #[arg(long)]
    pub quick: bool,
    /// Leave out what this commit has been measured for, and go on with a run that was cut short.
    #[arg(long)]
    pub resume: bool,
    /// The folder that records are written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// Runs all benchmarks. One that fails does not keep the next from running.
///
/// # Errors
/// If records cannot be read. Whether all ran, none is void and no target is missed is in the answer.
pub fn run(args: &BenchAllArgs) -> Result<bool> {
    let begun = Instant::now();
    let mut good = true;
    for kind in KINDS {
        println!("\n=== {kind} ===");
        if args.resume && is_measured(args, kind)? {
            println!("measured before, of this commit");
            continue;
        }
        let part = Instant::now();
        match run_one(args, kind) {
            Ok(is_good) => good &= is_good,
            Err(error) => {
                println!("{kind} FAILED: {error:#}");
                good = false;
            }
        }
        println!("=== {kind}: {:.0} s ===", part.elapsed().as_secs_f64());
    }
    println!("\nall benchmarks: {:.0} s. The targets:", begun.elapsed().as_secs_f64());
    targets(&args.records)?;
    Ok(good)
}

fn run_one(args: &BenchAllArgs, kind: &str) -> Result<bool> {
    match kind {
        bench_prog::KIND => Ok(bench_prog::run(&with::<BenchProgArgs>(args, &[]))?.is_good()),
        bench_sync::KIND => Ok(bench_sync::run(&with::<BenchSyncArgs>(args, &[]))?.is_good()),
        bench_agent::KIND => Ok(bench_agent::run(&with::<BenchAgentArgs>(args, &[]))?.is_good()),
        _ => {
            let resume: &[&str] = if args.resume { &["--resume"] } else { &[] };
            Ok(bench_net::run(&with::<BenchNetArgs>(args, resume))?.is_good())
        }
    }
}

/// The arguments of one benchmark: its defaults, and what was said for all.
fn with<A: clap::Args>(args: &BenchAllArgs, more: &[&str]) -> A {
    #[derive(Parser)]
    struct Alone<A: clap::Args> {
        #[command(flatten)]
        args: A,
    }
    let quick: &[&str] = if args.quick { &["--quick"] } else { &[] };
    let records = args.records.to_string_lossy();
    let words = ["bench", "--records", &records].into_iter().chain(quick.iter().copied());
    Alone::<A>::parse_from(words.chain(more.iter().copied())).args
}

/// Whether there is a complete record of this commit and of this much.
fn is_measured(args: &BenchAllArgs, kind: &str) -> Result<bool> {
    let newest: Option<Record<Value>> = record::newest(&args.records, kind)?;
    let is_enough = |record: Record<Value>| {
        record.complete && record.quick <= args.quick && record.machine.commit == record::commit()
    };
    Ok(newest.is_some_and(is_enough))
}

/// What the newest records say of the targets; nothing is met by a run that is void.
///
/// # Errors
/// If a record cannot be read.
pub fn judgements(records: &Path) -> Result<Vec<Judgement>> {
    let mut all = Vec::new();
    for kind in KINDS {
        let Some(record) = newest::<Value>(records, kind)? else { continue };
        let void = !record.void.is_empty();
        all.extend(record.targets.into_iter().map(|part| if void { part.voided() } else { part }));
    }
    Ok(all)
}

fn newest<T: DeserializeOwned>(records: &Path, kind: &str) -> Result<Option<Record<T>>> {
    record::newest(records, kind)
}

/// Prints one line for each target, from the newest records.
///
/// # Errors
/// If a record cannot be read.
pub fn targets(records: &Path) -> Result<()> {
    target::lines(&judgements(records)?).iter().for_each(|line| println!("{line}"));
    Ok(())
}
