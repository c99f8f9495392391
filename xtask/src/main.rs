//! The workshop: everything that is more than `cargo build` and `cargo test`, as `cargo xtask VERB`.
//!
//! It needs stable Rust and nothing else, builds in seconds, and never does what a verb was not asked for: only `setup`
//! (and the verbs that say they call it) changes the machine.

mod advisories;
mod busy;
mod check;
mod command;
mod ground;
mod image;
mod programs;
mod rules;
mod sbom;
mod setup;
mod steps;
mod summary;
mod test;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use ground::Ground;
use image::Profile;
use setup::Needs;
use std::ffi::OsString;
use std::process::ExitCode;
use steps::Steps;

/// Portolan's workshop.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what building and running need and this machine lacks.
    Setup {
        /// Say what is missing and what would be done, and do nothing; exit status 1 if something is missing.
        #[arg(long)]
        check: bool,
    },
    /// Build everything, raise a laboratory and show the dataplane at work (`--once`, `--cluster`; `--kind` in a kind cluster; needs root).
    #[command(disable_help_flag = true)]
    Run {
        /// Handed to `portolan-lab run`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Work with a laboratory that is up, such as `lab exec client -- curl 10.96.0.10`.
    #[command(disable_help_flag = true)]
    Lab {
        /// Handed to `portolan-lab`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Raise nodes as people have them with Portolan, and with the real kube-proxy in its place (`--peer nftables`, `--peer
    /// iptables`), and ask who is served (needs root).
    #[command(disable_help_flag = true)]
    Layouts {
        /// Handed to `portolan-lab layouts`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run the tests, tier by tier (the tiers above golden need root).
    Test {
        /// The tiers to run; if none is named, all but `kind`, of `vm` a short form.
        tiers: Vec<test::Tier>,
        /// Run only the tests whose names contain this.
        #[arg(long)]
        filter: Option<String>,
        /// Do first what `check` does; what fails there counts as failed here.
        #[arg(long)]
        check: bool,
        /// Run each tier so many times; in the second half something else keeps all CPUs busy.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
        repeat: u32,
        /// The node image of the tier `kind`; without it, the one that kind pulls by itself, or one that is made.
        #[arg(long, value_name = "IMAGE")]
        node_image: Option<String>,
    },
    /// Check format, lints, dependencies and documentation, and list which tests cite which rule of the contract.
    Check,
    /// Check whether a dependency is known to be unsafe, by the database of advisories: a clone that the variable
    /// `PORTOLAN_ADVISORY_DB` names, else that of GitHub.
    Advisories,
    /// Rewrite what tests expect: the tables of the golden tests, or the recorded numbers of the tier `exact` (needs root).
    Bless {
        /// Which.
        #[arg(value_enum, default_value_t = programs::Blessed::Golden)]
        what: programs::Blessed,
    },
    /// Measure everything (`bench`, `bench --quick`), or one part: `prog`, `sync`, `agent`, `net` (needs root).
    /// `bench targets` says what is met; `bench --help` has the rest.
    #[command(disable_help_flag = true)]
    Bench {
        /// Handed to `portolan-bench`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Build the agent for use: optimized, with the eBPF programs inside.
    Build,
    /// Build the agent as an OCI image, `target/image/portolan.tar`, for `deploy/`.
    Image {
        /// What the image is called, such as `registry.example/portolan:1.0`.
        #[arg(long)]
        name: Option<String>,
        /// Build it a second time, from a copy in another folder, and compare the digests.
        #[arg(long)]
        twice: bool,
    },
    /// Run a command where tests run, and say what it leaves there.
    #[command(hide = true)]
    Alone {
        /// What its folder and its cgroup are called.
        #[arg(long)]
        name: String,
        /// What is there before.
        #[arg(long, value_enum, default_value_t = Ground::Fresh)]
        ground: Ground,
        /// In the machine's own network.
        #[arg(long)]
        network: bool,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

fn main() -> Result<ExitCode> {
    match Cli::parse().verb {
        Verb::Setup { check } => return setup::setup(Needs::EVERYTHING, check),
        Verb::Run { args } => run(args)?,
        Verb::Lab { args } => {
            need_root(&args)?;
            programs::lab(args)?;
        }
        Verb::Layouts { args } => {
            need_root(&args)?;
            let peers = args.iter().any(|arg| arg.to_string_lossy().starts_with("--peer"));
            setup::ensure(Needs { cluster: peers, bench: peers, ..Needs::default() })?;
            programs::build_programs()?;
            programs::become_lab(["layouts".into()].into_iter().chain(args))?;
        }
        Verb::Test { tiers, filter, check, repeat, node_image } => {
            let node_image = node_image.as_deref();
            let order = test::Order { tiers: &tiers, filter: filter.as_deref(), repeat, node_image };
            return Ok(test_after_checks(&order, check).unwrap_or_else(|error| {
                println!("{error:#}\n{}", summary::Summary::ONE_FAILURE);
                ExitCode::FAILURE
            }));
        }
        Verb::Check => {
            setup::ensure(Needs { checks: true, ..Needs::default() })?;
            return check::check();
        }
        Verb::Advisories => {
            setup::ensure(Needs { checks: true, ..Needs::default() })?;
            advisories::check()?;
        }
        Verb::Bless { what } => {
            if what == programs::Blessed::Exact {
                need_root(&[])?;
            }
            programs::bless(what)?;
        }
        Verb::Bench { args } => {
            let args = bench_of(args);
            if measures(&args) {
                need_root(&args)?;
                setup::ensure(Needs { cluster: true, bench: true, ..Needs::default() })?;
            }
            programs::bench(args)?;
        }
        Verb::Build => programs::build()?,
        Verb::Image { name, twice: false } => drop(image::image(name.as_deref(), Profile::Release)?),
        Verb::Image { name, twice: true } => image::image_twice(name.as_deref())?,
        Verb::Alone { name, ground, network, command } => {
            return ground::alone(&name, ground, network, &command);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(args: Vec<OsString>) -> Result<()> {
    need_root(&args)?;
    let asked = |flag: &str| args.iter().take_while(|arg| *arg != "--").any(|arg| arg == flag);
    let kind = asked("--kind") && !asked("--help") && !asked("-h");
    let mut steps = Steps::new(if kind { 4 } else { 3 });
    steps.begin("what this machine lacks");
    setup::ensure(Needs { cluster: asked("--cluster"), kind, ..Needs::default() })?;
    steps.begin("building the programs");
    programs::build_programs()?;
    if kind {
        steps.begin("the images");
        image::image(None, Profile::Debug)?;
        image::lab_image()?;
    }
    steps.begin(if kind { "the cluster" } else { "the laboratory" });
    programs::become_lab(["run".into()].into_iter().chain(args))
}

fn test_after_checks(order: &test::Order<'_>, check: bool) -> Result<ExitCode> {
    let mut steps = Steps::new(1 + usize::from(check) + order.steps());
    steps.begin("what this machine lacks");
    let has = |tier| test::chosen(order.tiers).contains(&tier);
    let (cluster, vm) = (has(test::Tier::Cluster), has(test::Tier::Vm));
    let kind = has(test::Tier::Kind);
    setup::ensure(Needs { cluster, vm, kind, checks: check, ..Needs::default() })?;
    let mut failed_checks = Vec::new();
    if check {
        steps.begin("checks");
        failed_checks = check::failed_checks()?;
    }
    test::test(order, &failed_checks, &mut steps)
}

/// Whether a benchmark runs, or records are only read.
fn measures(args: &[OsString]) -> bool {
    let reads = ["targets", "report", "help", "--help", "-h"];
    !args.iter().any(|arg| reads.iter().any(|word| arg == word))
}

/// Without the name of a benchmark, all of them.
fn bench_of(mut args: Vec<OsString>) -> Vec<OsString> {
    let text = |arg: &OsString| arg.to_string_lossy().into_owned();
    let asks_for_help = args.iter().any(|arg| arg == "--help" || arg == "-h");
    if !asks_for_help && args.first().map(text).is_none_or(|first| first.starts_with('-')) {
        args.insert(0, "all".into());
    }
    args
}

/// Says so before minutes of building, not after.
fn need_root(args: &[OsString]) -> Result<()> {
    let asks_for_help = args.iter().any(|arg| arg == "--help" || arg == "-h");
    if !setup::is_root() && !asks_for_help {
        bail!("this needs root, for network namespaces and eBPF: call it as root, with cargo in PATH");
    }
    Ok(())
}
