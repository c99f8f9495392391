//! `run --kind`: a real Kubernetes cluster by kind, with Portolan in kube-proxy's place.
//!
//! The cluster is made without kube-proxy, or one that is there is taken. Portolan is brought in and installed as docs/install.md says,
//! looked at by the steps of a tour, and left to be tried. At the end everything is as it was: a cluster that was made is gone,
//! and one that was there is restored.

pub mod ask;
mod cluster;
mod docker;
mod install;
mod network;
mod node_image;
mod objects;
mod programs;
pub mod runtime;
mod steps;
mod take_over;
mod undo;

use crate::controlplane::target_folder;
use crate::lab;
use crate::tour::Narration;
use anyhow::{Context as _, Result, ensure};
use cluster::Cluster;
use docker::Docker;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use steps::{STEPS, TAKE_OVER, Tour, UNINSTALL};

/// The images, by the names that the workshop gives them.
const AGENT_IMAGE: &str = concat!("localhost/portolan:", env!("CARGO_PKG_VERSION"));
const LAB_IMAGE: &str = concat!("localhost/portolan-lab:", env!("CARGO_PKG_VERSION"));

/// The flags of `run` that are about kind.
#[derive(Clone, Debug, clap::Args)]
pub struct KindOptions {
    /// In a real cluster, by kind in Docker, instead of a laboratory.
    #[arg(long, conflicts_with_all = ["cluster", "pod_network", "routed", "strict_rp_filter", "no_tx_checksums", "xdp"])]
    kind: bool,
    /// The node image of the cluster; without one, the one that kind pulls by itself.
    #[arg(long, requires = "kind", conflicts_with = "existing")]
    node_image: Option<String>,
    /// A kind cluster that is there and has no kube-proxy; afterwards it is as it was.
    #[arg(long, value_name = "NAME", requires = "kind")]
    existing: Option<String>,
    /// With a Docker of its own that has no network, and a node image that is made here: nothing is pulled. So it is too if
    /// no Docker answers.
    #[arg(long, requires = "kind", conflicts_with = "existing")]
    isolated: bool,
    /// A cluster of IPv4 and IPv6.
    #[arg(long, requires = "kind", conflicts_with = "existing")]
    dual_stack: bool,
}

impl KindOptions {
    /// Whether kind is asked for.
    pub const fn is_asked_for(&self) -> bool {
        self.kind
    }
}

/// Takes away what was made, whatever way the run ends.
struct Undoing;

impl Drop for Undoing {
    fn drop(&mut self) {
        undo::all();
    }
}

/// Runs the tour and, unless it is to end at once, stays up until a signal.
pub fn run(options: &KindOptions, once: bool, agent_arguments: &[String]) -> Result<ExitCode> {
    let begun = Instant::now();
    let undoing = Undoing;
    undo::on_signals();
    let folder = working_folder()?;
    println!("looking for Docker …");
    let docker = Docker::find_or_start(options.isolated, options.existing.is_none())?;
    let cluster = match &options.existing {
        Some(name) => {
            println!("the cluster {name} …");
            Cluster::existing(docker, name, &folder)?
        }
        None => {
            println!("making a cluster …");
            Cluster::create(docker, options.node_image.as_deref(), options.dual_stack, &folder)?
        }
    };
    println!("the cluster `{}` is up after {:.0} s", cluster.name, begun.elapsed().as_secs_f32());
    let right = show(&cluster, options, once, agent_arguments)?;
    if !once {
        tell_how_to_try(&cluster);
        lab::on_signal_exit_with(0);
        loop {
            std::thread::park();
        }
    }
    println!("\ntaking away what was made …");
    let gone = undo::all();
    drop(undoing);
    Ok(if right && gone { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tour; whether everything was as it should be.
fn show(cluster: &Cluster, options: &KindOptions, once: bool, agent_arguments: &[String]) -> Result<bool> {
    let before = install::before(cluster)?;
    if options.existing.is_some() {
        let restored = cluster.clone();
        undo::later(format!("restoring the cluster {}", cluster.name), move || {
            install::restore(&restored, &before)
        });
    }
    println!("bringing the images in …");
    install::bring_images(cluster, &target_folder()?.join("image"))?;
    let mut say = Narration::default();
    attempt(&mut say, "Before the install", |say| install::check_before(cluster, say));
    attempt(&mut say, "Installed by the chart", |say| install::install(cluster, agent_arguments, say));
    if say.is_right() {
        println!("\na web server of three pods, two Services, pods that ask …");
        install::make_objects(cluster)?;
        let tour = Tour { cluster: cluster.clone() };
        let last = once.then_some(&UNINSTALL);
        // Nobody wants kube-proxy in a cluster of their own.
        let after = last.filter(|_| options.existing.is_none()).map(|_| &TAKE_OVER);
        for (title, step) in STEPS.iter().chain(last).chain(after) {
            attempt(&mut say, title, |say| step(&tour, say));
        }
    }
    let right = say.finish();
    if !right {
        steps::tell_logs(cluster);
    }
    Ok(right)
}

fn attempt(say: &mut Narration, title: &str, step: impl FnOnce(&mut Narration) -> Result<()>) {
    say.step(title);
    if let Err(error) = step(say) {
        say.failed(&error);
    }
}

/// Where this run keeps its kubeconfig and the like.
fn working_folder() -> Result<PathBuf> {
    let place = docker::own_folder()?;
    for old in docker::of_killed_runs(&place) {
        fs::remove_dir_all(&old).with_context(|| old.display().to_string())?;
    }
    let folder = place.join(docker::name_of_run());
    ensure!(!folder.exists(), "{} is in the way", folder.display());
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let doomed = folder.clone();
    undo::later(format!("removing {}", folder.display()), move || Ok(fs::remove_dir_all(doomed)?));
    Ok(folder)
}

fn tell_how_to_try(cluster: &Cluster) {
    println!("\nThe cluster stays up until Ctrl-C. In another terminal, as root:\n");
    let kubectl = cluster.kubectl_program().display();
    for line in [
        cluster.prefix(),
        format!("{kubectl} get pods --all-namespaces --output wide"),
        format!("{kubectl} exec --namespace kube-system daemonset/portolan -- portolan status"),
        format!("{kubectl} exec --namespace kube-system daemonset/portolan -- portolan services"),
        format!(
            "{kubectl} exec --namespace {} shell -- /bin/portolan-lab ask web:80 --count 5",
            objects::NAMESPACE
        ),
    ] {
        println!("  {line}");
    }
    println!("\nWhat else it can be asked: docs/operate.md; where it is to run for good: docs/install.md.");
}
