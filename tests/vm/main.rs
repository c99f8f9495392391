//! The tour on other kernels than this machine's: Debian's, booted in an emulated machine.
//!
//! Needs `qemu-system-x86_64` and an apt that knows the kernels' packages; they are downloaded and unpacked, never
//! installed. Emulation takes minutes, so this tier runs only when it is named.

mod initramfs;
mod machine;
mod package;

use machine::Console;
use std::sync::{Mutex, PoisonError};

/// Modules the laboratory and the agent need, besides what these depend on.
const MODULES: &[&str] =
    &["bridge", "cls_bpf", "dummy", "inet_diag", "sch_ingress", "tcp_diag", "udp_diag", "veth"];

/// Arguments of `portolan-lab run --once`, a tour each. Emulated, forty requests take longer than pods usually drain, and a
/// verifier that walks every program for three agents at once takes more than a minute.
const TOURS: &[&str] = &[
    "--drain 20 --patience 300",
    "--drain 20 --patience 300 --xdp",
    "--drain 20 --patience 300 --pod-network bridge --strict-rp-filter --no-tx-checksums",
];

/// Boots a kernel of this series, has it run all tours, and gives what it said.
fn tours_on(series: &str) -> Console {
    // One machine at a time: each takes all processors.
    static ONE: Mutex<()> = Mutex::new(());
    let _turn = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kernel = package::kernel(series).unwrap();
    let initramfs = initramfs::build(&kernel, MODULES, TOURS).unwrap();
    let console = machine::boot(&kernel.image, &initramfs).unwrap();
    let ends: Vec<_> =
        console.lines().filter_map(|line| line.strip_prefix("portolan-vm: exit status ")).collect();
    assert_eq!(ends, vec!["0"; TOURS.len()], "how the tours on {} ended", kernel.name);
    assert!(console.says("portolan-vm: done"), "{} did not come to its end", kernel.name);
    for trouble in ["BUG:", "WARNING:", "Oops", "verifier bug"] {
        assert!(!console.lines().any(|line| line.contains(trouble)), "the kernel complained: {trouble}");
    }
    console
}

#[test]
fn linux_6_1_serves_by_clsact_filters() {
    let console = tours_on("6.1");
    assert!(console.says("tc programs by clsact filters"));
}

#[test]
fn linux_6_12_serves_by_tcx_links() {
    let console = tours_on("6.12");
    assert!(console.says("tc programs by TCX links"));
}
