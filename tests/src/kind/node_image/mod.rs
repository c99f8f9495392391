//! A node image for kind, made on this machine: for machines that can pull none.
//!
//! The steps are those of kind's own build. Its base image is made as the Dockerfile in kind's module describes it, of Debian's
//! packages and the files of that module ([`base`]); then `kind build node-image` adds Kubernetes from a release archive. What that
//! archive would bring from outside is built here from Go modules ([`release`]).

mod archive;
mod base;
mod release;

use super::docker::{Docker, is_in_path};
use super::programs::{CNI, CONTAINERD, CRICTL, KIND, KUBERNETES};
use super::undo;
use crate::controlplane::{COREDNS, Extra, go, version};
use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The name before its version.
const NAME: &str = "portolan/node";
/// What decides, beside the programs, what is in the image.
const SOURCES: [&str; 4] = [
    include_str!("archive.rs"),
    include_str!("base.rs"),
    include_str!("release.rs"),
    include_str!("entrypoint"),
];

/// Folders of what the image is made of.
struct Parts {
    kubernetes: PathBuf,
    containerd: PathBuf,
    crictl: PathBuf,
    cni: PathBuf,
    coredns: PathBuf,
    kind: PathBuf,
    /// Of kind's Go module.
    kind_module: PathBuf,
    /// Where it is made.
    work: PathBuf,
}

/// The image's name, once it is there.
pub(super) fn find_or_make(docker: &Docker, folder: &Path) -> Result<String> {
    let version = version(&KUBERNETES.module())?;
    let name = format!("{NAME}:{version}-{}", contents()?);
    if docker.has_image(&name)? {
        return Ok(name);
    }
    ensure!(
        Path::new("/etc/debian_version").is_file(),
        "a node image is made from Debian's packages, and this is not Debian: name one with --node-image"
    );
    for program in ["apt-get", "cc", "debootstrap", "tar"] {
        ensure!(is_in_path(program), "a node image is made with `{program}`, which is not in PATH");
    }
    println!(
        "  making the node image {name} once, from Debian's packages and Go modules (up to half an hour)"
    );
    let parts = Parts {
        kubernetes: KUBERNETES.built()?,
        containerd: CONTAINERD.built()?,
        crictl: CRICTL.built()?,
        cni: CNI.built()?,
        coredns: COREDNS.built()?,
        kind: KIND.find_or_build()?,
        kind_module: module_folder(KIND, "sigs.k8s.io/kind")?,
        work: folder.join("node-image"),
    };
    let _ = fs::remove_dir_all(&parts.work);
    fs::create_dir_all(&parts.work)?;
    let base = base::make(docker, &parts)?;
    println!("  the base image is made");
    release::add(docker, &parts, &base, &version, &name)?;
    fs::remove_dir_all(&parts.work)?;
    remove_old(docker, &name)?;
    Ok(name)
}

/// Those that were made of something else, and what they were made by way of.
fn remove_old(docker: &Docker, kept: &str) -> Result<()> {
    let names = docker.docker(&["images", "--format", "{{.Repository}}:{{.Tag}}", NAME])?;
    for name in names.lines().filter(|name| *name != kept) {
        docker.docker(&["rmi", name])?;
    }
    docker.docker(&["image", "prune", "--force"]).map(drop)
}

/// A word for what the image is made of.
fn contents() -> Result<String> {
    let mut hash = Sha256::new();
    for source in SOURCES {
        hash.update(source);
    }
    for extra in [KUBERNETES, CONTAINERD, CRICTL, CNI, COREDNS] {
        hash.update(fs::read(extra.module().join("go.sum"))?);
    }
    Ok(hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}

/// Where Go has the source of a module.
fn module_folder(extra: Extra, module: &str) -> Result<PathBuf> {
    let mut list = go(&extra.module());
    let text = undo::output(list.args(["list", "-mod=readonly", "-m", "-f", "{{.Dir}}", module]), "")?;
    let folder = text.trim();
    ensure!(!folder.is_empty(), "Go has no source of {module}");
    Ok(folder.into())
}

/// `docker build` of a Dockerfile without a context.
fn build(docker: &Docker, name: &str, lines: &[String]) -> Result<()> {
    let mut command = docker.command("docker");
    // The builder that every Docker has.
    command.env("DOCKER_BUILDKIT", "0").args(["build", "--quiet", "--tag", name, "-"]);
    undo::output(&mut command, &lines.join("\n")).map(drop)
}

/// A command in namespaces of its own: what it mounts or starts ends with it.
fn contained(program: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        program,
    ]);
    command
}

/// Copies a program to where it is to be.
fn install(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file without a folder")?)?;
    crate::lab::install(from, to)
}
