//! The tour: raises a lab of three nodes with an agent on each and a web server behind Services, shows with real answers what
//! the dataplane does with them, and leaves the lab to be tried by hand.

mod narration;
mod steps;
mod world;

use crate::kind::{self, KindOptions};
use crate::lab::{self, Lab, Options, PodNetwork, portolan};
use anyhow::{Context, Result};
pub(crate) use narration::{Narration, Tally};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use steps::{CLUSTER_STEPS, STEPS, Tour};
use world::{LOCAL_PORT, NODE_PORT, PORT, SHELL, WEB, World};

/// Names are asked before a pod leaves.
const STEPS_BEFORE_NAMES: usize = 7;

/// `portolan-lab run`.
#[derive(Clone, Debug, clap::Args)]
pub struct TourOptions {
    /// End after the tour; exit status 0 only if every step was as it should be.
    #[arg(long)]
    once: bool,
    /// Have a real API server say what the Services are, instead of manifests.
    #[arg(long)]
    cluster: bool,
    /// How pods are joined to their node.
    #[arg(long, value_enum, default_value_t = PodNetwork::HostRoutes)]
    pod_network: PodNetwork,
    /// Each node on a subnet of its own, behind a router.
    #[arg(long)]
    routed: bool,
    /// A strict rp_filter on every interface of the nodes.
    #[arg(long)]
    strict_rp_filter: bool,
    /// Senders compute their checksums themselves instead of leaving them to the veth.
    #[arg(long)]
    no_tx_checksums: bool,
    /// Native XDP on the nodes' uplinks.
    #[arg(long)]
    xdp: bool,
    /// Seconds for which a pod goes on serving after SIGTERM; a slow machine needs more.
    #[arg(long, default_value_t = 4)]
    drain: u8,
    /// Seconds within which each agent must be ready; a slow machine needs more.
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// More arguments for the agents, after `--`.
    #[arg(last = true)]
    agent_arguments: Vec<String>,
    #[command(flatten)]
    kind: KindOptions,
}

/// Runs the tour and, unless it is to end at once, stays up until a signal.
pub fn run(options: &TourOptions) -> Result<ExitCode> {
    if options.kind.is_asked_for() {
        return kind::run(&options.kind, options.once, &options.agent_arguments);
    }
    let removed = lab::sweep()?;
    if !removed.is_empty() {
        println!("removed what a killed lab left behind: {}", removed.join(" "));
    }
    portolan()?;
    let begun = Instant::now();
    println!("raising a lab of three nodes …");
    let lab = Options::default()
        .pods(options.pod_network)
        .routed(options.routed)
        .strict_rp_filter(options.strict_rp_filter)
        .tx_checksums(!options.no_tx_checksums)
        .xdp(options.xdp)
        .create()?;
    let tell = |text: &str| println!("  {text}");
    let world = if options.cluster {
        World::from_cluster(&lab, options.drain, &tell).context("the control plane")?
    } else {
        World::from_manifests(&lab, options.drain)?
    };
    println!("starting an agent on each node …");
    let xdp = if options.xdp { ["--xdp", "native"].as_slice() } else { &[] };
    let arguments = options.agent_arguments.iter().map(String::as_str);
    let arguments: Vec<_> = xdp.iter().copied().chain(arguments).collect();
    let patience = Duration::from_secs(options.patience);
    lab.start_agents(&world.agents().arguments(&arguments).ready_within(patience))?;
    println!("lab {} is up after {:.1} s", lab.id(), begun.elapsed().as_secs_f32());
    introduce(&lab);
    let mut narration = Narration::default();
    let tour = Tour { lab, world };
    let of_cluster = if options.cluster { CLUSTER_STEPS.as_slice() } else { &[] };
    let (before, after) = STEPS.split_at(STEPS_BEFORE_NAMES);
    for (title, step) in before.iter().chain(of_cluster).chain(after) {
        narration.step(title);
        if let Err(error) = step(&tour, &mut narration) {
            narration.failed(&error);
        }
    }
    let right = narration.finish();
    if !right {
        tour.lab.tell_agent_logs();
    }
    if options.once {
        return Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    tell_how_to_try(&tour.lab, &tour.world);
    lab::on_signal_exit_with(0);
    loop {
        std::thread::park();
    }
}

fn introduce(lab: &Lab) {
    for node in lab.nodes() {
        let pods: Vec<_> =
            node.pods_by_name().iter().map(|pod| format!("{} {}", pod.name(), pod.address())).collect();
        println!("  {} {}   pods: {}", node.name(), node.address(), pods.join(", "));
    }
    println!("  client {} (outside the cluster)", lab.client_address());
}

fn tell_how_to_try(lab: &Lab, world: &World) {
    let node = lab.node(0);
    let portolan = portolan().map(|path| path.display().to_string()).unwrap_or_default();
    println!("\nThe lab stays up until Ctrl-C. In another terminal, as root:\n");
    for line in [
        format!("cargo xtask lab exec client -- curl -s {}:{NODE_PORT}", node.address()),
        format!("cargo xtask lab exec client -- curl -sm2 {}:{LOCAL_PORT}", node.address()),
        format!("cargo xtask lab exec {SHELL} -- curl -s {WEB}:{PORT}"),
        format!("cargo xtask lab exec node-1 -- curl -s 127.0.0.1:{NODE_PORT}"),
        format!("{portolan} backends --bpffs {}", node.bpffs().display()),
        format!("tail -f {}/agent-node-1.log", lab.logs().display()),
    ] {
        println!("  {line}");
    }
    println!();
    for line in world.hints(lab) {
        println!("  {line}");
    }
}
