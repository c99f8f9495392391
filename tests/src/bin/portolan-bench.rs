//! `portolan-bench`: what `cargo xtask bench` becomes.

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use dataplane_tests::bench::record::RECORDS;
use dataplane_tests::bench::{self, BenchAllArgs, report};
use dataplane_tests::bench_agent::{self, BenchAgentArgs};
use dataplane_tests::bench_choose::{self, BenchChooseArgs};
use dataplane_tests::bench_counts::{self, CountsArgs};
use dataplane_tests::bench_flood::{self, FloodArgs};
use dataplane_tests::bench_load::{self, BenchLoadArgs};
use dataplane_tests::bench_net::{self, BenchNetArgs};
use dataplane_tests::bench_prog::{self, BenchProgArgs};
use dataplane_tests::bench_sync::{self, BenchSyncArgs};
use dataplane_tests::bench_tries::{self, TriesArgs};
use dataplane_tests::soak::{self, SoakArgs};
use std::path::PathBuf;

/// Measures Portolan on this machine. Needs root. Every run leaves a record.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// All of the following, one after the other.
    All(BenchAllArgs),
    /// Packets of an established flow (B6) and of nobody (B7), verified instructions (B8), map memory (B13), connect(2), XDP.
    Prog(BenchProgArgs),
    /// Tables into maps: cold start (B9) and one endpoint's change (B10), in time and in `bpf()` calls.
    Sync(BenchSyncArgs),
    /// The agent fed with recorded events: cold start (B9), 10,000 updates per second (B11).
    Agent(BenchAgentArgs),
    /// The path beside plain routing and beside kube-proxy (B1 to B5), and the proxies themselves (B10, B12), from a real
    /// control plane.
    Net(BenchNetArgs),
    /// The load tool beside wrk, on the same connections to the same server: do both measure the same?
    Load(BenchLoadArgs),
    /// Which endpoint: how long clients wait where one of two takes ten times as long, by each algorithm and beside kube-proxy. Not among
    /// `all`.
    Choose(BenchChooseArgs),
    /// Honest clients and established connections under a flood of SYNs (B16), and 10,000 questions by UDP in a second (B17), beside
    /// kube-proxy. Not among `all`.
    Flood(FloodArgs),
    /// Second tries: who is served where endpoints refuse or are silent, how long that takes, and what a Service costs all of whose endpoints
    /// refuse, beside kube-proxy. Not among `all`.
    Tries(TriesArgs),
    /// The counts of what is open beside the flows and sockets that there are, after a million flows that end in every way. Not among `all`.
    Counts(CountsArgs),
    /// Drift: an agent under churn for two hours, and what it holds meanwhile. Not among `all`.
    Soak(SoakArgs),
    /// One line for each target, from the newest records.
    Targets {
        /// The folder of the records.
        #[arg(long, default_value = RECORDS)]
        records: PathBuf,
    },
    /// Write `docs/benchmarks.md` and its plots from the newest records.
    Report {
        /// The folder of the records.
        #[arg(long, default_value = RECORDS)]
        records: PathBuf,
        /// The folder of the page.
        #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs"))]
        docs: PathBuf,
    },
}

fn main() -> Result<()> {
    let good = match Cli::parse().bench {
        Bench::All(args) => bench::run(&args)?,
        Bench::Prog(args) if args.watch => bench_prog::price_of_watching(&args)?,
        Bench::Prog(args) => bench_prog::run(&args)?.is_good(),
        Bench::Sync(args) => bench_sync::run(&args)?.is_good(),
        Bench::Agent(args) => bench_agent::run(&args)?.is_good(),
        Bench::Net(args) => bench_net::run(&args)?.is_good(),
        Bench::Load(args) => bench_load::run(&args)?.is_good(),
        Bench::Choose(args) => bench_choose::run(&args)?.is_good(),
        Bench::Flood(args) => bench_flood::run(&args)?.is_good(),
        Bench::Tries(args) => bench_tries::run(&args)?.is_good(),
        Bench::Counts(args) => bench_counts::run(&args)?.is_good(),
        Bench::Soak(args) => soak::run(&args)?.is_good(),
        Bench::Targets { records } => {
            bench::targets(&records)?;
            true
        }
        Bench::Report { records, docs } => {
            println!("{}", report::write(&records, &docs)?.display());
            true
        }
    };
    if !good {
        bail!("a run is void, or a target is missed");
    }
    Ok(())
}
