//! `portolan-bench`: what `cargo xtask bench` becomes.

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
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
    /// Cold start (B9) and one endpoint's change (B10), in time and in `bpf()` calls.
    Sync(BenchSyncArgs),
}

fn main() -> Result<()> {
    match Cli::parse().bench {
        Bench::Sync(args) => {
            if !bench_sync::run(&args)?.met {
                bail!("a target is missed");
            }
        }
    }
    Ok(())
}
