//! The kernel, its file systems and its settings.

use super::{CheckArgs, CheckLine};
use crate::causes::causes;
use crate::config::PortRange;
use crate::kernel::pins::Pins;
use crate::kernel::{capability, local_ports, probe};
use std::fs;
use std::path::Path;

pub(super) fn look(args: &CheckArgs) -> Vec<CheckLine> {
    vec![
        rights(),
        kernel(),
        cgroup(args.cgroup.as_deref()),
        bpffs(&args.show.bpffs),
        forwarding(),
        source_ports(args.snat_ports),
    ]
}

fn rights() -> CheckLine {
    const CHECK: &str = "rights";
    match capability::check() {
        Ok(()) => CheckLine::well(CHECK, "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"),
        Err(error) => CheckLine::failing(CHECK, error.to_string(), "run this as root"),
    }
}

fn kernel() -> CheckLine {
    const CHECK: &str = "kernel";
    match probe::features() {
        Ok(features) if !features.btf => CheckLine::failing(
            CHECK,
            features.to_string(),
            "a kernel with CONFIG_DEBUG_INFO_BTF, as distributions have it",
        ),
        Ok(features) => CheckLine::well(CHECK, features.to_string()),
        Err(error) => CheckLine::failing(CHECK, error.to_string(), "a newer kernel"),
    }
}

fn cgroup(named: Option<&Path>) -> CheckLine {
    const CHECK: &str = "cgroup2";
    match probe::cgroup(named) {
        Ok(cgroup) => CheckLine::well(CHECK, cgroup.path.display().to_string()),
        Err(error) => CheckLine::failing(
            CHECK,
            causes(&error),
            "in the chart the value `cgroup` names it; --socket-lb=off does without",
        ),
    }
}

fn bpffs(root: &Path) -> CheckLine {
    const CHECK: &str = "BPF file system";
    match Pins::new(root).lies_on_bpffs() {
        Ok(true) => CheckLine::well(CHECK, root.display().to_string()),
        Ok(false) => CheckLine::warning(
            CHECK,
            format!("none at {}", root.display()),
            "the chart's init container mounts one; on the node itself `portolan mount-bpffs` does",
        ),
        Err(error) => CheckLine::failing(CHECK, error.to_string(), "run this as root"),
    }
}

fn sysctl(name: &str) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/sys/net/{name}")).ok()?.trim().to_owned())
}

fn forwarding() -> CheckLine {
    const CHECK: &str = "forwarding";
    match sysctl("ipv4/ip_forward").as_deref() {
        Some("1") => CheckLine::well(CHECK, "net.ipv4.ip_forward is 1"),
        Some(other) => CheckLine::failing(
            CHECK,
            format!("net.ipv4.ip_forward is {other}"),
            "the pod network sets it, or `sysctl net.ipv4.ip_forward=1`: packets to pods are forwarded",
        ),
        None => CheckLine::warning(CHECK, "cannot be read", "is /proc mounted?"),
    }
}

fn source_ports(given: Option<PortRange>) -> CheckLine {
    const CHECK: &str = "source ports";
    let Some(ours) = given else {
        let number: usize = local_ports::read().left().iter().map(ExactSizeIterator::len).sum();
        let found = format!("{number} that the node does not use itself, for translated sources");
        return if number == 0 {
            CheckLine::failing(CHECK, found, "narrow net.ipv4.ip_local_port_range")
        } else {
            CheckLine::well(CHECK, found)
        };
    };
    let range = sysctl("ipv4/ip_local_port_range").unwrap_or_default();
    let numbers: Vec<u16> = range.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [first, last] = numbers[..] else {
        return CheckLine::warning(CHECK, "net.ipv4.ip_local_port_range cannot be read", "is /proc mounted?");
    };
    let found = format!("{}-{} for translated sources, {first}-{last} for sockets", ours.first, ours.last);
    if ours.first <= last && first <= ours.last {
        return CheckLine::failing(
            CHECK,
            format!("{found}: they overlap (P12)"),
            "set net.ipv4.ip_local_port_range, or --snat-ports, so that no port is in both",
        );
    }
    CheckLine::well(CHECK, found)
}
