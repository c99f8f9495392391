//! `portolan-bench`: what `cargo xtask bench` becomes.

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use dataplane_tests::bench_net::{self, BenchNetArgs, Verdict};
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
    /// Cold start (B9) and one endpoint's change (B10), in time and in `bpf()` calls.
    Sync(BenchSyncArgs),
}

fn main() -> Result<()> {
    match Cli::parse().bench {
        Bench::Net(args) => {
            let record = bench_net::run(&args)?;
            if !record.void.is_empty() {
                bail!("the run is void: the two direct legs differ");
            }
            if record.targets.iter().any(|target| target.verdict == Verdict::Missed) {
                bail!("a target is missed");
            }
        }
        Bench::Sync(args) => {
            if !bench_sync::run(&args)?.met {
                bail!("a target is missed");
            }
        }
    }
    Ok(())
}
