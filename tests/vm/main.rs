//! The tour on other kernels than this machine's: Debian's, booted in an emulated machine.
//!
//! Needs `qemu-system-x86_64` and an apt that knows the kernels' packages; they are downloaded and unpacked, never
//! installed. Emulation takes minutes: with all tests only one tour runs on the oldest kernel and one on the newest.

mod initramfs;
mod machine;
mod package;

use machine::{Console, PROCESSORS};
use package::Archive;
use std::sync::{Mutex, PoisonError};

/// Modules the laboratory and the agent need, besides what these depend on.
const MODULES: &[&str] = &[
    "8021q",
    "bonding",
    "bridge",
    "cls_bpf",
    "dummy",
    "inet_diag",
    "ipip",
    "nf_conntrack_netlink",
    "nft_chain_nat",
    "nft_ct",
    "nft_masq",
    "sch_ingress",
    "tcp_diag",
    "udp_diag",
    "veth",
    "vrf",
    "wireguard",
];

/// Arguments of `portolan-lab`, a tour each. Emulated, forty requests take longer than pods usually drain, and a
/// verifier that walks every program for three agents at once takes more than a minute.
const TOURS: &[&str] = &[
    "run --once --drain 60 --patience 300",
    "run --once --drain 60 --patience 300 --xdp",
    "run --once --drain 60 --patience 300 --pod-network bridge --strict-rp-filter --no-tx-checksums",
];

/// Layouts that need what this machine's kernel may lack (netkit came with Linux 6.7).
const LAYOUTS: &str = "layouts --special --patience 10 --lines";

/// How the line of `portolan-lab maps` begins.
const MAPS: &str = "all maps but flows take ";

/// Boots a kernel of this series, has it run tours, and gives what it said.
fn tours_on(archive: &Archive, series: &str, tours: &[&str]) -> Console {
    tours_with(archive, series, tours, PROCESSORS)
}

/// As [`tours_on`], where there could be so many processors.
fn tours_with(archive: &Archive, series: &str, tours: &[&str], possible: usize) -> Console {
    // One machine at a time: each takes all processors.
    static ONE: Mutex<()> = Mutex::new(());
    let _turn = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kernel = package::kernel(archive, series).unwrap();
    let initramfs = initramfs::build(&kernel, MODULES, tours).unwrap();
    let console = machine::boot(&kernel.image, &initramfs, possible).unwrap();
    let ends: Vec<_> =
        console.lines().filter_map(|line| line.strip_prefix("portolan-vm: exit status ")).collect();
    assert_eq!(ends, vec!["0"; tours.len()], "how the tours on {} ended", kernel.name);
    assert!(console.says("portolan-vm: done"), "{} did not come to its end", kernel.name);
    for trouble in ["BUG:", "WARNING:", "Oops", "verifier bug"] {
        assert!(!console.lines().any(|line| line.contains(trouble)), "the kernel complained: {trouble}");
    }
    console
}

/// What runs with all tests: one tour each on the oldest kernel and on the newest.
mod short {
    use super::*;

    /// B13, as a kernel tells it that has per-CPU values for so many.
    #[test]
    fn the_maps_are_small_where_there_could_be_many_cpus() {
        // Since 6.9 a kernel takes no more for possible than this firmware says are there.
        let archive = Archive::default();
        for (cpus, limit) in [(2, 32.0), (64, 36.0), (128, 40.0)] {
            let console = tours_with(&archive, "6.1", &["maps"], cpus);
            let line =
                console.lines().find_map(|line| line.strip_prefix(MAPS)).expect("a line about the maps");
            let (mebibytes, possible) = line.split_once(" MiB with ").expect(line);
            assert_eq!(possible, format!("{cpus} possible CPUs"));
            assert!(
                mebibytes.parse::<f64>().expect(line) <= limit,
                "{line}, above the target of {limit} MiB"
            );
        }
    }

    /// The kernel of Debian 11.
    #[test]
    fn a_kernel_that_lacks_something_is_refused_by_what_it_lacks() {
        let console = tours_on(&Archive::of("bullseye").unwrap(), "5.10", &[]);
        for lack in
            ["bpf_check_mtu (5.12)", "bpf_loop (5.17)", "bpf_xdp_get_buff_len (5.18)", "Linux 6.1 has all"]
        {
            assert!(console.says(lack), "no word of {lack}");
        }
        assert!(!console.says("bpf_redirect_neigh"), "5.10 has it");
    }

    #[test]
    fn linux_6_1_serves_by_clsact_filters() {
        let console = tours_on(&Archive::default(), "6.1", &TOURS[..1]);
        assert!(console.says("tc programs by clsact filters"));
    }

    #[test]
    fn the_newest_linux_serves_by_tcx_links_and_in_every_layout() {
        let console = tours_on(&Archive::newest().unwrap(), "", &[TOURS[0], LAYOUTS]);
        assert!(console.says("tc programs by TCX links"));
    }
}

/// What runs only if the tier is named.
mod long {
    use super::*;

    #[test]
    fn linux_6_1_serves_with_other_options() {
        tours_on(&Archive::default(), "6.1", &TOURS[1..]);
    }

    #[test]
    fn linux_6_12_serves_by_tcx_links() {
        let console = tours_on(&Archive::default(), "6.12", TOURS);
        assert!(console.says("tc programs by TCX links"));
    }

    #[test]
    fn the_newest_linux_serves_with_other_options() {
        tours_on(&Archive::newest().unwrap(), "", &TOURS[1..]);
    }
}
