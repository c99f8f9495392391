//! Verbs that build a program of the workspace and become it.

use crate::command::{CommandLine, all_targets, program, target_folder};
use anyhow::{Context as _, Result, bail};
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};

/// Builds the agent and the laboratory's program, and becomes the latter.
pub(crate) fn lab(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    build_programs()?;
    become_lab(args)
}

/// Becomes the laboratory's program, which was built.
pub(crate) fn become_lab(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    become_program(&target_folder()?.join("portolan-lab"), args)
}

/// Builds agent and benchmarks with optimization, and becomes the latter.
pub(crate) fn bench(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    CommandLine::new(
        "cargo build --locked --release --package dataplane-user --package dataplane-tests --bins",
    )
    .with_revision()
    .run()?;
    become_program(&release_folder()?.join("portolan-bench"), args)
}

/// Builds the agent with optimization and says where it lies.
pub(crate) fn build() -> Result<()> {
    CommandLine::new("cargo build --locked --release --package dataplane-user --bin portolan")
        .with_revision()
        .run()?;
    println!("{}", release_folder()?.join("portolan").display());
    Ok(())
}

/// What tests expect and a verb rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Blessed {
    /// The tables of the golden tests, and the pages of metrics and of the command line.
    Golden,
    /// `benches/exact.json`: numbers that must not grow.
    Exact,
}

/// Has tests write what they would compare.
pub(crate) fn bless(what: Blessed) -> Result<()> {
    let tests: &[&str] = match what {
        Blessed::Golden => &[
            "cargo test --package dataplane-tests --test golden",
            "cargo test --package dataplane-user --lib metrics::family",
            "cargo test --package dataplane-user --lib admin::reference",
        ],
        Blessed::Exact => &["cargo test --package dataplane-tests --test exact"],
    };
    for tests in tests {
        CommandLine::new(tests).variable("PORTOLAN_BLESS", "1").run()?;
    }
    Ok(())
}

/// The programs that laboratories and tests start, side by side in one folder.
pub(crate) fn build_programs() -> Result<()> {
    CommandLine::new("cargo build --locked --package dataplane-user --package dataplane-tests --bins").run()
}

/// The folder of optimized programs.
fn release_folder() -> Result<PathBuf> {
    Ok(all_targets()?.join("release"))
}

/// Replaces this process, so that signals and the exit status are the program's own.
fn become_program(path: &Path, args: impl IntoIterator<Item = OsString>) -> Result<()> {
    if !path.is_file() {
        bail!("the workspace builds no `{}`", path.file_name().unwrap_or_default().display());
    }
    let error = program(&path.display().to_string()).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", path.display()))
}
