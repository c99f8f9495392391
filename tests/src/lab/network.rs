//! Interfaces, addresses and routes of a lab, all of them inside its namespaces: no interface of a lab is ever made in, or
//! passes through, the machine's own namespace.

use anyhow::{Context, Result, bail};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

/// Runs lines of `ip -batch`, in a namespace or (only for `netns add`) outside.
pub(crate) fn ip_batch(namespace: Option<&str>, lines: &[String]) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("`ip` (package iproute2) cannot be run")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all((lines.join("\n") + "\n").as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "ip -n {} -batch failed: {}\n{}",
            namespace.unwrap_or("(none)"),
            String::from_utf8_lossy(&output.stderr).trim(),
            lines.join("\n")
        );
    }
    Ok(())
}

/// How pods are joined to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum PodNetwork {
    /// A point-to-point veth for each pod, with a host route (as kindnet).
    #[default]
    HostRoutes,
    /// Veths on a bridge `cni0` that has the node's gateway address.
    Bridge,
}

/// The number of addresses that a node can give to pods.
pub(crate) const POD_ADDRESSES: std::ops::RangeInclusive<u8> = 2..=254;

/// The network that joins the nodes: `192.168.100.0/24`; the bridge itself is `.1`.
pub(crate) fn uplink_address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 100, host)
}

/// The pod network of a node (counted from 1): `10.244.N.0/24`; the gateway is `.1`.
pub(crate) fn pod_address(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, host)
}

/// The name of the interface by which a node reaches a pod: `veth` and a hash of the pod's name.
pub(crate) fn pod_interface(pod: &str) -> String {
    let hash =
        pod.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("veth{hash:08x}")
}

/// What the node does to reach a new pod.
pub(crate) fn node_side(
    network: PodNetwork,
    pod: &str,
    namespace: &str,
    gateway: Ipv4Addr,
    address: Ipv4Addr,
) -> Vec<String> {
    let interface = pod_interface(pod);
    let mut lines = vec![format!("link add {interface} type veth peer name eth0 netns {namespace}")];
    match network {
        PodNetwork::HostRoutes => lines.extend([
            format!("addr add {gateway}/32 dev {interface}"),
            format!("link set {interface} up"),
            format!("route add {address}/32 dev {interface} scope link"),
        ]),
        PodNetwork::Bridge => lines.push(format!("link set {interface} master cni0 up")),
    }
    lines
}

/// What is done inside a new pod.
pub(crate) fn pod_side(network: PodNetwork, gateway: Ipv4Addr, address: Ipv4Addr) -> Vec<String> {
    let length = match network {
        PodNetwork::HostRoutes => 32,
        PodNetwork::Bridge => 24,
    };
    let mut lines = vec![
        "link set lo up".into(),
        format!("addr add {address}/{length} dev eth0"),
        "link set eth0 up".into(),
    ];
    if network == PodNetwork::HostRoutes {
        lines.push(format!("route add {gateway}/32 dev eth0 scope link"));
    }
    lines.push(format!("route add default via {gateway}"));
    lines
}

/// The bridge of a node's pods.
pub(crate) fn pod_bridge(gateway: Ipv4Addr) -> Vec<String> {
    vec![
        "link add cni0 type bridge mcast_snooping 0".into(),
        format!("addr add {gateway}/24 dev cni0"),
        "link set cni0 up".into(),
    ]
}

/// `ETHTOOL_STXCSUM`.
const ETHTOOL_SET_TX_CHECKSUM: u32 = 0x17;
/// `SIOCETHTOOL`.
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// Turns the checksumming of sent packets by the device off (or on), for an interface of the calling thread's namespace.
///
/// With it on, packets between veths carry no checksum that anybody has computed, and a wrong one goes unnoticed.
pub(crate) fn set_tx_checksums(interface: &str, on: bool) -> Result<()> {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let mut value = Value { command: ETHTOOL_SET_TX_CHECKSUM, data: u32::from(on) };
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: a new socket, owned from here on.
    let socket = unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        anyhow::ensure!(socket >= 0, io::Error::last_os_error());
        OwnedFd::from_raw_fd(socket)
    };
    // SAFETY: `request` and the `value` it points to outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    anyhow::ensure!(result == 0, "tx checksumming of {interface}: {}", io::Error::last_os_error());
    Ok(())
}
