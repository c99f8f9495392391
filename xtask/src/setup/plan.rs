//! What to do about what is missing: pure, so that it can be tested for machines that are not this one.

use super::Needs;
use super::machine::{ARM_TARGET, Machine, go_module_cache, go_toolchain, go_toolchain_version};
use crate::command::CommandLine;

/// `bpf-linker` as it was seen to link the eBPF programs.
const BPF_LINKER_VERSION: &str = "0.13.0";
/// `cargo-deny` as it was seen to build on the Rust of this workspace.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// How to see that a package is there, on any distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probe {
    /// A program that PATH leads to.
    Program(&'static str),
    /// A file or folder.
    File(&'static str),
}

/// A package by its Debian name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Package {
    pub(super) name: &'static str,
    pub(super) probe: Probe,
    pub(super) why: &'static str,
}

/// What everything needs. What depends on more than one file is planned below.
pub(super) const PACKAGES: &[Package] = &[
    Package {
        name: "bind9-dnsutils",
        probe: Probe::Program("dig"),
        why: "asks for names, with `dig` and `nslookup`",
    },
    Package {
        name: "bpftool",
        probe: Probe::Program("bpftool"),
        why: "shows maps and programs in the tour and in tests",
    },
    Package {
        name: "bubblewrap",
        probe: Probe::Program("bwrap"),
        why: "runs the agent's image as a container, in tests",
    },
    Package {
        name: "ca-certificates",
        probe: Probe::File("/etc/ssl/certs"),
        why: "lets cargo, Go and the agent trust TLS servers",
    },
    Package {
        name: "curl",
        probe: Probe::Program("curl"),
        why: "the client of the tour and of `cargo xtask lab exec`",
    },
    Package {
        name: "ethtool",
        probe: Probe::Program("ethtool"),
        why: "turns checksum offload of a laboratory's links on and off",
    },
    Package {
        name: "gcc",
        probe: Probe::Program("cc"),
        why: "links Rust programs and compiles the C parts of TLS",
    },
    Package {
        name: "iproute2",
        probe: Probe::Program("ip"),
        why: "builds the namespaces and links of laboratories",
    },
    Package {
        name: "libc6-dev",
        probe: Probe::File("/usr/include/stdio.h"),
        why: "what every program is linked with",
    },
    Package {
        name: "nftables",
        probe: Probe::Program("nft"),
        why: "the netfilter rules that tests put in the way",
    },
    Package {
        name: "strace",
        probe: Probe::Program("strace"),
        why: "kills the agent at a given system call, in tests",
    },
];

/// What benchmarks need besides.
pub(super) const BENCH_PACKAGES: &[Package] = &[
    Package {
        name: "iptables",
        probe: Probe::Program("iptables"),
        why: "what kube-proxy calls in its iptables mode, beside which is measured",
    },
    Package {
        name: "wrk",
        probe: Probe::Program("wrk"),
        why: "another load tool, against which the project's own is held",
    },
];

/// What the checks need besides: what compiles the C parts of TLS for the other processor that the agent runs on.
pub(super) const CHECK_PACKAGES: &[Package] = &[
    Package {
        name: "gcc-aarch64-linux-gnu",
        probe: Probe::Program("aarch64-linux-gnu-gcc"),
        why: "compiles the C parts of TLS for 64-bit ARM, in checks",
    },
    Package {
        name: "libc6-dev-arm64-cross",
        probe: Probe::File("/usr/aarch64-linux-gnu/include/stdio.h"),
        why: "what those are compiled with",
    },
];

/// What a kind cluster needs besides, where no Docker answers: a daemon, and what a node image is made with.
pub(super) const KIND_PACKAGES: &[Package] = &[
    Package {
        name: "debootstrap",
        probe: Probe::Program("debootstrap"),
        why: "makes a node image where kind can pull none",
    },
    Package { name: "docker.io", probe: Probe::Program("dockerd"), why: "runs the nodes of a kind cluster" },
    Package { name: "runc", probe: Probe::Program("runc"), why: "runs Docker's containers" },
];

/// What the tier `vm` needs besides.
pub(super) const VM_PACKAGES: &[Package] = &[
    Package {
        name: "qemu-system-x86",
        probe: Probe::Program("qemu-system-x86_64"),
        why: "emulates the machines of the tier `vm`",
    },
    Package {
        name: "wireguard-tools",
        probe: Probe::Program("wg"),
        why: "gives the keys to a layout's WireGuard device, in those machines",
    },
    Package { name: "xz-utils", probe: Probe::Program("xz"), why: "unpacks the modules of Debian's kernels" },
];

/// Something that is missing, and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) name: String,
    pub(super) why: &'static str,
}

/// Commands that bring one or more of the missing things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) missing: Vec<Missing>,
    pub(super) commands: Vec<CommandLine>,
    /// It changes the system, not only the user's own folders.
    pub(super) needs_root: bool,
    /// What to look at if it fails.
    pub(super) advice: &'static str,
}

impl Step {
    /// What someone without `apt-get` has to find in their own distribution.
    pub(super) fn without_apt(&self) -> String {
        let names: Vec<_> = self.missing.iter().map(|missing| missing.name.as_str()).collect();
        let mut text = format!("install, by their Debian names: {}", names.join(" "));
        if names.contains(&"rustc-web") {
            text += "\n    (in place of rustc-web, cargo-web and libstd-rust-web-dev-bpf, which only Debian has: \
                     `rustup toolchain install nightly --component rust-src`)";
        }
        text
    }
}

/// The steps in their order; none if nothing is missing.
pub(super) fn plan(machine: &Machine, needs: Needs) -> Vec<Step> {
    let mut steps = Vec::new();
    if needs.checks && !machine.components.is_empty() {
        steps.push(components(machine));
    }
    if needs.checks && machine.rustup && !machine.arm {
        steps.push(arm());
    }
    let packages = packages(machine, needs);
    if !packages.is_empty() {
        steps.push(apt(packages));
    } else if needs.vm && !machine.apt_lists {
        steps.push(apt_lists());
    }
    if !machine.bpf_linker {
        steps.push(bpf_linker(machine.llvm));
    }
    if needs.checks && !machine.cargo_deny {
        steps.push(cargo_deny());
    }
    if (needs.cluster || needs.kind) && !machine.new_go {
        steps.push(go());
    }
    steps
}

/// Debian packages that are missing, in the order of their names.
fn packages(machine: &Machine, needs: Needs) -> Vec<Missing> {
    let of_benches = BENCH_PACKAGES.iter().filter(|_| needs.bench);
    let of_vm = VM_PACKAGES.iter().filter(|_| needs.vm);
    let of_checks = CHECK_PACKAGES.iter().filter(|_| needs.checks);
    let of_kind = KIND_PACKAGES.iter().filter(|_| needs.kind && !machine.docker);
    let all = PACKAGES.iter().chain(of_benches).chain(of_vm).chain(of_checks).chain(of_kind);
    let absent = all.filter(|p| !machine.packages.contains(p.name));
    let mut missing: Vec<_> = absent.map(|p| Missing { name: p.name.to_owned(), why: p.why }).collect();
    let mut add = |name: &str, why| missing.push(Missing { name: name.to_owned(), why });
    if !machine.bpf_compiler {
        add("cargo-web", "builds the eBPF programs, with rustc-web");
        add("libstd-rust-web-dev-bpf", "`core`, compiled for the BPF target");
        add("rustc-web", "compiles the eBPF programs");
    }
    if !machine.bpf_linker && !machine.llvm_dev {
        add(&format!("llvm-{}-dev", machine.llvm), "what bpf-linker is built with");
    }
    if (needs.cluster || needs.kind) && !machine.go {
        add("golang-go", "fetches the Go that compiles the control plane");
    }
    missing.sort_by(|a, b| a.name.cmp(&b.name));
    missing
}

fn apt(missing: Vec<Missing>) -> Step {
    // Nothing that is there may go: rustc-web conflicts with Debian's own rustc.
    let install = CommandLine::new("apt-get install --yes --no-install-recommends --no-remove");
    let install = missing.iter().fold(install, |command, package| command.arg(&package.name));
    let quiet = |command: CommandLine| command.variable("DEBIAN_FRONTEND", "noninteractive");
    Step {
        missing,
        commands: vec![quiet(CommandLine::new("apt-get update")), quiet(install)],
        needs_root: true,
        advice: "installing Debian packages failed. If one cannot be located: rustc-web with its BPF library and \
                 LLVM 22 come from Debian's security archive (bookworm-security or later), which must be among apt's \
                 sources",
    }
}

/// The tier `vm` downloads kernels without installing them.
fn apt_lists() -> Step {
    let missing = Missing { name: "lists of packages".to_owned(), why: "name the kernels of the tier `vm`" };
    Step {
        missing: vec![missing],
        commands: vec![CommandLine::new("apt-get update")],
        needs_root: true,
        advice: "apt could not fetch its lists: does it reach its servers?",
    }
}

fn components(machine: &Machine) -> Step {
    let command = CommandLine::new("rustup component add");
    let command = machine.components.iter().fold(command, |command, name| command.arg(*name));
    let missing = machine.components.iter().map(|name| Missing {
        name: (*name).to_owned(),
        why: "a component of the Rust toolchain that `cargo xtask check` calls",
    });
    Step {
        missing: missing.collect(),
        commands: vec![command],
        needs_root: false,
        advice: if machine.rustup {
            "rustup could not add the components: does it reach its server?"
        } else {
            "there is no rustup: rustfmt and clippy must come from where this machine's Rust came from"
        },
    }
}

/// Rust's standard library for the other processor that the agent runs on.
fn arm() -> Step {
    Step {
        missing: vec![Missing {
            name: ARM_TARGET.to_owned(),
            why: "Rust's standard library for 64-bit ARM, for which `cargo xtask check` compiles the agent",
        }],
        commands: vec![CommandLine::new("rustup target add").arg(ARM_TARGET)],
        needs_root: false,
        advice: "rustup could not add the target: does it reach its server?",
    }
}

fn bpf_linker(llvm: u32) -> Step {
    let install = CommandLine::new("cargo install bpf-linker --locked --force --no-default-features")
        .arg("--version")
        .arg(BPF_LINKER_VERSION)
        .arg("--features")
        .arg(format!("llvm-{llvm}"))
        .variable("PATH", format!("/usr/lib/llvm-{llvm}/bin:$PATH"));
    Step {
        missing: vec![Missing {
            name: "bpf-linker".to_owned(),
            why: "links the eBPF programs and writes their BTF",
        }],
        commands: vec![install],
        needs_root: false,
        advice: "building bpf-linker failed: it needs the LLVM of the compiler that it serves, and llvm-config in PATH",
    }
}

fn cargo_deny() -> Step {
    let install = CommandLine::new("cargo install cargo-deny --locked --version").arg(CARGO_DENY_VERSION);
    Step {
        missing: vec![Missing {
            name: "cargo-deny".to_owned(),
            why: "checks licences and sources of dependencies",
        }],
        commands: vec![install],
        needs_root: false,
        advice: "building cargo-deny failed",
    }
}

/// The Go module proxy serves Go itself as a module, checked against the checksum database like any other. A module's
/// files are never programs, so that is made up for.
fn go() -> Step {
    let cache = go_module_cache().display().to_string();
    let download = CommandLine::new("go mod download")
        .arg(format!("golang.org/toolchain@{}", go_toolchain_version()))
        .variable("GOMODCACHE", cache)
        .variable("GOFLAGS", "-mod=mod")
        .variable("GOTOOLCHAIN", "local");
    let folder = go_toolchain();
    let programs = CommandLine::new("chmod -R a+x")
        .arg(folder.join("bin").display().to_string())
        .arg(folder.join("pkg/tool").display().to_string());
    Step {
        missing: vec![Missing {
            name: format!("go {}", super::machine::GO_VERSION),
            why: "compiles Kubernetes for `--cluster` and its tests, and kind",
        }],
        commands: vec![download, programs],
        needs_root: false,
        advice: "fetching Go from the Go module proxy failed; a Go of this version or later in PATH serves as well \
                 (https://go.dev/dl)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Debian with stable Rust of rustup's minimal profile, and nothing else.
    fn bare() -> Machine {
        Machine {
            root: true,
            apt: true,
            apt_lists: true,
            rustup: true,
            packages: ["ca-certificates", "gcc", "libc6-dev"].into(),
            components: vec!["rustfmt", "clippy"],
            arm: false,
            bpf_compiler: false,
            llvm: 22,
            llvm_dev: false,
            bpf_linker: false,
            cargo_deny: false,
            go: false,
            new_go: false,
            docker: false,
        }
    }

    fn complete() -> Machine {
        Machine {
            packages: PACKAGES.iter().chain(CHECK_PACKAGES).map(|package| package.name).collect(),
            components: vec![],
            arm: true,
            bpf_compiler: true,
            llvm_dev: true,
            bpf_linker: true,
            cargo_deny: true,
            go: true,
            new_go: true,
            ..bare()
        }
    }

    const CLUSTER: Needs = Needs { cluster: true, kind: false, bench: false, vm: false, checks: false };
    const BENCH: Needs = Needs { bench: true, ..CLUSTER };
    const VM: Needs = Needs { vm: true, cluster: false, ..CLUSTER };

    fn names(steps: &[Step]) -> Vec<&str> {
        steps.iter().flat_map(|step| &step.missing).map(|missing| missing.name.as_str()).collect()
    }

    #[test]
    fn nothing_is_done_where_nothing_is_missing() {
        assert_eq!(plan(&complete(), Needs::EVERYTHING), []);
    }

    #[test]
    fn benchmarks_need_their_rivals_and_nothing_else_does() {
        assert_eq!(names(&plan(&complete(), BENCH)), ["iptables", "wrk"]);
        assert_eq!(plan(&complete(), CLUSTER), []);
    }

    #[test]
    fn other_kernels_need_an_emulator_and_an_apt_that_knows_them() {
        assert_eq!(names(&plan(&complete(), VM)), ["qemu-system-x86", "wireguard-tools", "xz-utils"]);
        let packages = complete().packages.into_iter().chain(VM_PACKAGES.iter().map(|package| package.name));
        let ready = Machine { packages: packages.collect(), ..complete() };
        assert_eq!(plan(&ready, VM), []);
        assert_eq!(names(&plan(&Machine { apt_lists: false, ..ready.clone() }, VM)), ["lists of packages"]);
        assert_eq!(plan(&Machine { apt_lists: false, ..ready }, CLUSTER), []);
    }

    #[test]
    fn a_kind_cluster_needs_a_docker_that_answers_or_one_of_its_own() {
        let kind = Needs { kind: true, cluster: false, ..CLUSTER };
        assert_eq!(names(&plan(&complete(), kind)), ["debootstrap", "docker.io", "runc"]);
        assert_eq!(plan(&Machine { docker: true, ..complete() }, kind), []);
        let without_go = Machine { docker: true, go: false, new_go: false, ..complete() };
        assert_eq!(names(&plan(&without_go, kind)), ["golang-go", "go 1.26.8"]);
        assert_eq!(plan(&complete(), CLUSTER), []);
    }

    #[test]
    fn tests_need_no_checkers() {
        let steps = plan(&bare(), CLUSTER);
        assert!(!names(&steps).iter().any(|name| {
            ["cargo-deny", "clippy", "rustfmt", ARM_TARGET, "gcc-aarch64-linux-gnu"].contains(name)
        }));
    }

    #[test]
    fn a_bare_machine_gets_everything_once_and_in_order() {
        let steps = plan(&bare(), Needs::EVERYTHING);
        let expected = [
            "rustfmt",
            "clippy",
            ARM_TARGET,
            "bind9-dnsutils",
            "bpftool",
            "bubblewrap",
            "cargo-web",
            "curl",
            "ethtool",
            "gcc-aarch64-linux-gnu",
            "golang-go",
            "iproute2",
            "libc6-dev-arm64-cross",
            "libstd-rust-web-dev-bpf",
            "llvm-22-dev",
            "nftables",
            "rustc-web",
            "strace",
            "bpf-linker",
            "cargo-deny",
            "go 1.26.8",
        ];
        assert_eq!(names(&steps), expected);
        let apt: Vec<_> = steps.iter().filter(|step| step.needs_root).collect();
        assert_eq!(apt.len(), 1, "only packages need root, and they come in one step");
    }

    #[test]
    fn only_what_is_missing_is_installed() {
        let machine = Machine { packages: complete().packages, ..bare() };
        let machine = Machine { bpf_compiler: true, bpf_linker: true, go: true, ..machine };
        assert_eq!(
            names(&plan(&machine, Needs::EVERYTHING)),
            ["rustfmt", "clippy", ARM_TARGET, "cargo-deny", "go 1.26.8"]
        );
        assert!(plan(&machine, Needs::EVERYTHING).iter().all(|step| !step.needs_root));
    }

    #[test]
    fn a_laboratory_without_a_cluster_needs_neither_go_nor_the_checkers() {
        let machine =
            Machine { cargo_deny: false, go: false, new_go: false, components: vec!["clippy"], ..complete() };
        assert_eq!(plan(&machine, Needs::default()), []);
        assert_eq!(names(&plan(&machine, CLUSTER)), ["golang-go", "go 1.26.8"]);
    }

    #[test]
    fn the_linker_is_built_for_the_llvm_of_the_compiler() {
        let machine = Machine { bpf_linker: false, llvm: 23, llvm_dev: false, ..complete() };
        let steps = plan(&machine, Needs::default());
        assert_eq!(names(&steps), ["llvm-23-dev", "bpf-linker"]);
        let command = steps[1].commands[0].to_string();
        assert!(command.starts_with("PATH=/usr/lib/llvm-23/bin:$PATH cargo install bpf-linker"), "{command}");
        assert!(command.ends_with("--features llvm-23"), "{command}");
    }

    #[test]
    fn no_package_is_ever_removed_for_another() {
        for command in plan(&bare(), Needs::EVERYTHING).iter().flat_map(|step| &step.commands) {
            let command = command.to_string();
            assert!(!command.contains("apt-get install") || command.contains("--no-remove"), "{command}");
        }
    }

    #[test]
    fn without_apt_the_way_round_debians_compiler_is_named() {
        let steps = plan(&bare(), Needs::default());
        let packages = steps.iter().find(|step| step.needs_root).unwrap();
        let text = packages.without_apt();
        assert!(
            text.contains("bpftool")
                && text.contains("rustup toolchain install nightly --component rust-src")
        );
    }
}
