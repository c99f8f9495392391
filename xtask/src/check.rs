//! All that is checked without running the programs. Every check runs, whatever the others found.

use crate::command::CommandLine;
use crate::rules;
use crate::setup::{ARM_TARGET, compiles_for_arm};
use anyhow::Result;
use std::path::Path;
use std::process::ExitCode;

/// The verb.
pub(crate) fn check() -> Result<ExitCode> {
    let failed = failed_checks()?;
    if failed.is_empty() {
        println!("check: all is well");
        return Ok(ExitCode::SUCCESS);
    }
    println!("check: failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// Runs all checks and names those that found something.
pub(crate) fn failed_checks() -> Result<Vec<&'static str>> {
    let deny_warnings = "-Dwarnings";
    let checks = [
        ("format", CommandLine::new("cargo fmt --all --check")),
        ("lints", CommandLine::new("cargo clippy --workspace --all-targets --locked -- -D warnings")),
        ("warnings for the BPF target", ebpf_warnings()),
        ("dependencies", CommandLine::new("cargo deny --workspace check bans licenses sources")),
        (
            "documentation",
            CommandLine::new("cargo doc --workspace --no-deps --locked")
                .variable("RUSTDOCFLAGS", deny_warnings),
        ),
    ];
    let arm = if compiles_for_arm() {
        Some(("64-bit ARM", arm()))
    } else {
        println!("=== 64-bit ARM === not checked: this machine's Rust has no {ARM_TARGET}");
        None
    };
    let advisories = crate::advisories::as_check()?.map(|command| ("advisories", command));
    let mut failed = Vec::new();
    for (name, command) in checks.into_iter().chain(arm).chain(advisories) {
        println!("=== {name} ===\n$ {command}");
        if let Err(error) = command.run() {
            println!("{error:#}");
            failed.push(name);
        }
    }
    println!("=== rules of the contract, and the tests that cite them ===");
    if !rules::check()? {
        failed.push("rules of the contract");
    }
    Ok(failed)
}

/// Whether the agent compiles for the other processor that it runs on.
fn arm() -> CommandLine {
    let words = "cargo check --locked --package dataplane-user --all-targets --target";
    let command = CommandLine::new(words).arg(ARM_TARGET);
    // A machine of that kind has a compiler of its own.
    if cfg!(target_arch = "aarch64") {
        return command;
    }
    command.variable("CC_aarch64_unknown_linux_gnu", "aarch64-linux-gnu-gcc")
}

/// What the compiler itself says of the programs as the kernel gets them. Clippy is not there for Debian's compiler; it
/// sees the same code on the host, but for what is compiled for the BPF target only.
fn ebpf_warnings() -> CommandLine {
    let words = "check --package dataplane-ebpf --bin portolan-ebpf --locked --target bpfel-unknown-none";
    let debian = Path::new("/usr/lib/rustlib/bpfel-unknown-none").is_dir();
    let command = if debian {
        CommandLine::new(&format!("/usr/bin/cargo {words}"))
            .variable("RUSTC", "/usr/bin/rustc")
            .variable("RUSTC_BOOTSTRAP", "1")
    } else {
        CommandLine::new(&format!("rustup run nightly cargo -Zbuild-std=core {words}"))
    };
    // A folder of its own: two compilers in one folder would each throw away what the other made.
    let flags = format!("--cfg=bpf_target_arch=\"{}\" -Dwarnings", std::env::consts::ARCH);
    command.variable("RUSTFLAGS", flags).variable("CARGO_TARGET_DIR", "target/ebpf-check")
}
