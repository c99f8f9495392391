//! What this machine has. Only looks: a few files, and the versions of programs that are there.

use super::Needs;
use super::plan::{BENCH_PACKAGES, CHECK_PACKAGES, KIND_PACKAGES, PACKAGES, Probe, VM_PACKAGES};
use crate::command::{find_program, home, workspace};
use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Go that `setup` fetches where none is new enough.
pub(super) const GO_VERSION: &str = "1.26.8";
/// The oldest Go that compiles the control plane (`go` line of `tests/controlplane/go.mod`).
const GO_NEEDED: (u32, u32) = (1, 26);
/// The first Go that fetches a newer one by itself, if `GOTOOLCHAIN` lets it.
const GO_SWITCHES: (u32, u32) = (1, 21);
/// LLVM of Debian's `rustc-web`.
const DEBIAN_LLVM: u32 = 22;

/// The target of cargo for 64-bit ARM.
pub(crate) const ARM_TARGET: &str = "aarch64-unknown-linux-gnu";

/// What was found; only that decides what `setup` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Machine {
    /// The user is root.
    pub(super) root: bool,
    /// Packages come by `apt-get`.
    pub(super) apt: bool,
    /// Rust comes by rustup.
    pub(super) rustup: bool,
    /// apt has lists of what it could install.
    pub(super) apt_lists: bool,
    /// Names of entries of the lists of packages in [`super::plan`] that are there already.
    pub(super) packages: BTreeSet<&'static str>,
    /// Components of the stable toolchain that are missing.
    pub(super) components: Vec<&'static str>,
    /// Rust's standard library for 64-bit ARM is there.
    pub(super) arm: bool,
    /// Something compiles for the BPF target.
    pub(super) bpf_compiler: bool,
    /// LLVM's major version in that compiler: the linker must be able to read its bitcode.
    pub(super) llvm: u32,
    /// The files to build `bpf-linker` with are there.
    pub(super) llvm_dev: bool,
    /// `bpf-linker` is there and starts.
    pub(super) bpf_linker: bool,
    /// `cargo deny` is there.
    pub(super) cargo_deny: bool,
    /// Any Go is there: it can fetch another.
    pub(super) go: bool,
    /// A Go is there that compiles the control plane.
    pub(super) new_go: bool,
    /// A Docker answers.
    pub(super) docker: bool,
}

impl Machine {
    /// Looks at everything that is needed.
    pub(super) fn observe(needs: Needs) -> Self {
        let nightly = nightly_with_source();
        let llvm = if nightly { nightly_llvm().unwrap_or(DEBIAN_LLVM) } else { DEBIAN_LLVM };
        let (go, new_go) =
            if (needs.cluster && !has_control_plane()) || needs.kind { observe_go() } else { (true, true) };
        Self {
            root: is_root(),
            apt: find_program("apt-get").is_some(),
            apt_lists: has_apt_lists(),
            rustup: find_program("rustup").is_some(),
            packages: PACKAGES
                .iter()
                .chain(BENCH_PACKAGES)
                .chain(VM_PACKAGES)
                .chain(CHECK_PACKAGES)
                .chain(KIND_PACKAGES)
                .filter(|p| is_there(p.probe))
                .map(|p| p.name)
                .collect(),
            components: missing_components(),
            arm: compiles_for_arm(),
            bpf_compiler: nightly || debian_bpf_compiler(),
            llvm,
            llvm_dev: Path::new(&format!("/usr/lib/llvm-{llvm}/bin/llvm-config")).is_file(),
            bpf_linker: output_of("bpf-linker", &["--version"]).is_some(),
            cargo_deny: find_program("cargo-deny").is_some(),
            go,
            new_go,
            docker: needs.kind
                && output_of("docker", &["version", "--format", "{{.Server.Version}}"]).is_some(),
        }
    }
}

fn is_there(probe: Probe) -> bool {
    match probe {
        Probe::Program(name) => find_program(name).is_some(),
        Probe::File(path) => Path::new(path).exists(),
    }
}

/// Images of containers come without.
fn has_apt_lists() -> bool {
    let mut lists = std::fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten();
    lists.any(|list| list.file_name().to_string_lossy().contains("_Packages"))
}

/// Whether the effective user is root: `/proc/self` belongs to it.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Standard output of a program that is there and ends well.
fn output_of(name: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(find_program(name)?).current_dir(workspace()).args(args).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether cargo can compile for 64-bit ARM.
pub(crate) fn compiles_for_arm() -> bool {
    let sysroot = output_of("rustc", &["--print", "sysroot"]);
    sysroot.is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib").join(ARM_TARGET).is_dir())
}

/// rustup leaves its stand-ins for `cargo-fmt` and `cargo-clippy` in PATH in any case: the toolchain itself is asked.
fn missing_components() -> Vec<&'static str> {
    let Some(sysroot) = output_of("rustc", &["--print", "sysroot"]) else { return Vec::new() };
    let programs = [("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")];
    let missing =
        programs.iter().filter(|(_, program)| !Path::new(&sysroot).join("bin").join(program).is_file());
    missing.map(|(component, _)| *component).collect()
}

/// The first choice of the agent's build script.
fn nightly_with_source() -> bool {
    let rustup_home = env::var_os("RUSTUP_HOME").map_or_else(|| home().join(".rustup"), PathBuf::from);
    let name = format!("nightly-{}-unknown-linux-gnu", env::consts::ARCH);
    let source = "lib/rustlib/src/rust/library/core";
    ["nightly", &name].iter().any(|name| rustup_home.join("toolchains").join(name).join(source).is_dir())
}

fn nightly_llvm() -> Option<u32> {
    let version = output_of("rustup", &["run", "nightly", "rustc", "-vV"])?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    llvm.split('.').next()?.parse().ok()
}

/// The build script's second choice: Debian's compiler with its ready-made `core`.
fn debian_bpf_compiler() -> bool {
    ["/usr/bin/rustc", "/usr/bin/cargo", "/usr/lib/rustlib/bpfel-unknown-none"]
        .iter()
        .all(|path| Path::new(path).exists())
}

/// A control plane that was built elsewhere: in the folder that a variable names, or in PATH.
fn has_control_plane() -> bool {
    let mut programs = ["etcd", "kube-apiserver", "kube-controller-manager", "kubectl"].iter();
    env::var_os("PORTOLAN_CONTROLPLANE_BIN").is_some() || programs.all(|name| find_program(name).is_some())
}

/// Whether there is a Go, and whether one that is new enough is there or would be fetched by itself.
fn observe_go() -> (bool, bool) {
    if fetched_go().is_some() {
        return (true, true);
    }
    let Some(version) = output_of("go", &["env", "GOVERSION"]).as_deref().and_then(go_version) else {
        return (false, false);
    };
    let switches = version >= GO_SWITCHES
        && output_of("go", &["env", "GOTOOLCHAIN"]).is_some_and(|value| value.starts_with("auto"));
    (true, version >= GO_NEEDED || switches)
}

/// `(1, 26)` of `go1.26.8`.
fn go_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("go")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Where Go keeps what it downloads.
pub(super) fn go_module_cache() -> PathBuf {
    let of_path = || env::var_os("GOPATH").map_or_else(|| home().join("go"), PathBuf::from).join("pkg/mod");
    env::var_os("GOMODCACHE").map_or_else(of_path, PathBuf::from)
}

/// The folder of the Go that `setup` fetches, as the Go module proxy names it.
pub(super) fn go_toolchain() -> PathBuf {
    go_module_cache().join(format!("golang.org/toolchain@{}", go_toolchain_version()))
}

/// Its version as a module.
pub(super) fn go_toolchain_version() -> String {
    let arch = match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("v0.0.1-go{GO_VERSION}.linux-{arch}")
}

/// The folder with the `go` that `setup` fetched, if it did.
pub(crate) fn fetched_go() -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = go_toolchain().join("bin");
    // Before the last command of that step it is a file like any other.
    let is_program = folder.join("go").metadata().is_ok_and(|file| file.permissions().mode() & 0o100 != 0);
    is_program.then_some(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_compared_as_numbers() {
        assert_eq!(go_version("go1.26.8"), Some((1, 26)));
        assert!(go_version("go1.9") < go_version("go1.21"));
        assert_eq!(go_version("devel"), None);
    }

    #[test]
    fn the_go_that_is_fetched_compiles_the_control_plane() {
        let module = std::fs::read_to_string(workspace().join("tests/controlplane/go.mod")).unwrap();
        let needed = module.lines().find_map(|line| line.strip_prefix("go ")).unwrap();
        assert_eq!(go_version(&format!("go{needed}")), Some(GO_NEEDED));
        assert_eq!(go_version(&format!("go{GO_VERSION}")), Some(GO_NEEDED));
    }
}
