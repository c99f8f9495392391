//! `portolan-bench`: what `cargo xtask bench` becomes.

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use dataplane_tests::bench_net::{self, BenchNetArgs, Verdict};
use dataplane_tests::bench_prog::{self, BenchProgArgs};
use dataplane_tests::bench_sync::{self, BenchSyncArgs};

/// Measures Portolan on this machine. Needs root.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// The path beside plain routing and beside kube-proxy (B1 to B5), from a real control plane.
    Net(BenchNetArgs),
    /// Packets of an established flow (B6) and of nobody (B7), and verified instructions (B8), for each program.
    Prog(BenchProgArgs),
    /// Cold start (B9) and one endpoint's change (B10), in time and in `bpf()` calls.
    Sync(BenchSyncArgs),
}

fn main() -> Result<()> {
    let met = match Cli::parse().bench {
        Bench::Net(args) => {
            let record = bench_net::run(&args)?;
            if !record.void.is_empty() {
                bail!("the run is void: the two direct legs differ");
            }
            !record.targets.iter().any(|target| target.verdict == Verdict::Missed)
        }
        Bench::Prog(args) => bench_prog::run(&args)?,
        Bench::Sync(args) => bench_sync::run(&args)?.met,
    };
    if !met {
        bail!("a target is missed");
    }
    Ok(())
}
