//! `setup`: from stable Rust on Debian to where everything builds and runs.
//!
//! What is missing is observed ([`machine`]), what to do about it is decided without touching anything ([`plan`]), and
//! then shown and done here. Where nothing is missing nothing is run, not even `apt-get update`.

mod machine;
mod plan;

pub(crate) use machine::{ARM_TARGET, compiles_for_arm, fetched_go, is_root};

use anyhow::{Result, bail};
use machine::Machine;
use plan::Step;
use std::process::ExitCode;

/// What the machine is to be good for, beside building everything and raising a laboratory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// The real control plane, which is compiled from Go modules.
    pub(crate) cluster: bool,
    /// A kind cluster.
    pub(crate) kind: bool,
    /// What benchmarks compare with: kube-proxy's iptables, and another load tool.
    pub(crate) bench: bool,
    /// Emulated machines with other kernels.
    pub(crate) vm: bool,
    /// All checks.
    pub(crate) checks: bool,
}

impl Needs {
    /// What the verb `setup` brings: what the other verbs need unless they are asked for benchmarks or the tier `vm`.
    pub(crate) const EVERYTHING: Self =
        Self { cluster: true, kind: false, bench: false, vm: false, checks: true };
}

/// The verb: says what is there and what is missing, and installs it unless `check_only`.
pub(crate) fn setup(needs: Needs, check_only: bool) -> Result<ExitCode> {
    let machine = Machine::observe(needs);
    let steps = plan::plan(&machine, needs);
    if steps.is_empty() {
        println!("setup: nothing is missing");
        return Ok(ExitCode::SUCCESS);
    }
    println!("setup: this machine lacks");
    for missing in steps.iter().flat_map(|step| &step.missing) {
        println!("  {:<24} {}", missing.name, missing.why);
    }
    if check_only {
        print_commands(&machine, &steps);
        return Ok(ExitCode::FAILURE);
    }
    install(&machine, &steps)?;
    let left = plan::plan(&Machine::observe(needs), needs);
    if let Some(missing) = left.iter().flat_map(|step| &step.missing).next() {
        bail!("everything was installed, and yet `{}` is not found: is its folder in PATH?", missing.name);
    }
    println!("setup: done");
    Ok(ExitCode::SUCCESS)
}

/// What the other verbs call: silent where nothing is missing.
pub(crate) fn ensure(needs: Needs) -> Result<()> {
    if !plan::plan(&Machine::observe(needs), needs).is_empty() {
        setup(needs, false)?;
    }
    Ok(())
}

fn install(machine: &Machine, steps: &[Step]) -> Result<()> {
    if !machine.apt && steps.iter().any(|step| step.needs_root) {
        print_commands(machine, steps);
        bail!("this system has no apt-get: install the above, then call this again");
    }
    if !machine.root && steps.iter().any(|step| step.needs_root) {
        print_commands(machine, steps);
        bail!("installing packages needs root: run the above, or call this as root");
    }
    for (number, step) in (1..).zip(steps) {
        for command in &step.commands {
            println!("setup, {number} of {}: {command}", steps.len());
            command.run().map_err(|error| error.context(step.advice))?;
        }
    }
    Ok(())
}

/// The commands as the one who calls would have to type them.
fn print_commands(machine: &Machine, steps: &[Step]) {
    println!("setup: to be done");
    for step in steps {
        if step.needs_root && !machine.apt {
            println!("  {}", step.without_apt());
            continue;
        }
        for command in &step.commands {
            let sudo = step.needs_root && !machine.root;
            println!("  {}", if sudo { command.with_sudo() } else { command.to_string() });
        }
    }
}
