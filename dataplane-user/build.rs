//! Compiles the eBPF programs for `bpfel-unknown-none` and leaves the object where `kernel` embeds it.
//!
//! Two toolchains are tried, in this order: a rustup nightly with `rust-src`, and Debian's `rustc-web` with its
//! ready-made `core` for the BPF target.

use anyhow::{Context as _, Result, bail};
use object::build::elf::{Builder, SectionData};
use object::elf;
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const HELP: &str = "no toolchain can compile the eBPF programs. Run `cargo xtask setup`, or install one of
  - `rustup toolchain install nightly --component rust-src` and `cargo install bpf-linker`
  - Debian: `apt-get install rustc-web cargo-web libstd-rust-web-dev-bpf llvm-22-dev` and `cargo install bpf-linker \
--no-default-features --features llvm-22` with /usr/lib/llvm-22/bin in PATH";

fn main() -> Result<()> {
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().context("the package has no parent folder")?;
    for path in ["dataplane-ebpf", "dataplane-common", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo:rerun-if-env-changed=PATH");

    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    let target_dir = out_dir.join("ebpf");
    let Some((mut command, version)) = toolchain() else { bail!("{HELP}") };
    println!("cargo:rustc-env=PORTOLAN_EBPF_TOOLCHAIN={version}");
    command
        .current_dir(workspace)
        .args(["build", "--package", "dataplane-ebpf", "--bin", "portolan-ebpf", "--release", "--locked"])
        .args(["--target", "bpfel-unknown-none", "--target-dir"])
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(workspace, &target_dir))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "true");
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("compiling the eBPF programs failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let object = target_dir.join("bpfel-unknown-none/release/portolan-ebpf");
    let bytes = std::fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    let stripped = without_dwarf(&bytes).with_context(|| format!("cannot strip {}", object.display()))?;
    std::fs::write(out_dir.join("portolan-ebpf.o"), stripped)?;
    Ok(())
}

/// An object without its DWARF sections, which the linker needed to make BTF of: they are most of it, and would be in every
/// agent's memory.
fn without_dwarf(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        let name = section.name.to_vec();
        let name = name.strip_prefix(b".rel").unwrap_or(&name);
        section.delete = name.starts_with(b".debug_");
    }
    // The linker keeps the names of sections among those of symbols; here they need a place of their own.
    let names = builder.sections.add();
    (names.name, names.sh_type) = (b".shstrtab".as_slice().into(), elf::SHT_STRTAB);
    (names.sh_addralign, names.data) = (1, SectionData::SectionString);
    builder.delete_orphan_symbols();
    builder.delete_orphan_relocations();
    let mut bytes = Vec::new();
    builder.write(&mut bytes)?;
    Ok(bytes)
}

/// Flags of the BPF target; the separator is the one cargo asks for. BTF says from which line of which file each instruction is,
/// and must not say in which folder of this machine that lies.
fn rustflags(workspace: &Path, target_dir: &Path) -> OsString {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let mut flags = vec![format!("--cfg=bpf_target_arch=\"{arch}\"")];
    flags.extend(["-Cdebuginfo=2", "-Ctarget-cpu=v2", "-Clink-arg=--btf"].map(str::to_owned));
    for (folder, name) in
        [(Some(workspace), "portolan"), (cargo_home().as_deref(), "cargo"), (Some(target_dir), "target")]
    {
        flags.extend(folder.map(|folder| format!("--remap-path-prefix={}=/{name}", folder.display())));
    }
    flags.join("\x1f").into()
}

/// Cargo's own folder.
fn cargo_home() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
}

/// What a program prints in one line.
fn line(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `rustc 1.96.0 (…)`: name and number.
    Some(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}

/// A `cargo` that can build `core`, or brings it, for the BPF target, and the versions of compiler and linker.
fn toolchain() -> Option<(Command, String)> {
    let linker = linker()?;
    let version = |rustc: &mut Command| {
        let (rustc, linker) = (line(rustc.arg("--version")), line(Command::new(&linker).arg("--version")));
        [rustc, linker].map(Option::unwrap_or_default).join(", ")
    };
    let with_linker = |mut command: Command| {
        for name in
            ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "RUSTUP_TOOLCHAIN", "CARGO"]
        {
            command.env_remove(name);
        }
        command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker);
        command
    };
    let sysroot = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    if let Ok(output) = sysroot
        && output.status.success()
        && Path::new(String::from_utf8_lossy(&output.stdout).trim())
            .join("lib/rustlib/src/rust/library")
            .is_dir()
    {
        let mut command = with_linker(Command::new("rustup"));
        command.args(["run", "nightly", "cargo", "-Zbuild-std=core"]);
        return Some((command, version(Command::new("rustup").args(["run", "nightly", "rustc"]))));
    }
    let (cargo, rustc) = (Path::new("/usr/bin/cargo"), Path::new("/usr/bin/rustc"));
    let sysroot = Command::new(rustc).args(["--print", "sysroot"]).output().ok()?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim());
    if cargo.exists() && sysroot.join("lib/rustlib/bpfel-unknown-none").is_dir() {
        let mut command = with_linker(Command::new(cargo));
        command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
        return Some((command, version(&mut Command::new(rustc))));
    }
    None
}

/// `bpf-linker` from PATH, else from cargo's own bin folder.
fn linker() -> Option<PathBuf> {
    let candidates =
        [Some(PathBuf::from("bpf-linker")), cargo_home().map(|home| home.join("bin/bpf-linker"))];
    candidates.into_iter().flatten().find(|linker| {
        Command::new(linker)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
}
