//! Interfaces, addresses and routes of a lab, all of them inside its namespaces: no interface of a lab is ever made in, or
//! passes through, the machine's own namespace.

use super::tunnel::{self, Tunnel};
use anyhow::{Context, Result, bail};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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
    /// As `HostRoutes`; to other nodes through a VXLAN device `vxlan0` (as flannel).
    Vxlan,
    /// As `HostRoutes`; to other nodes through a TUN device `tun0`, whose packets have no Ethernet header.
    Tun,
    /// As `HostRoutes`, by a netkit pair for each pod (Linux 6.7).
    Netkit,
}

impl PodNetwork {
    /// What carries packets to the pods of other nodes, if it is not their own network.
    pub(crate) const fn tunnel(self) -> Option<Tunnel> {
        match self {
            Self::HostRoutes | Self::Bridge | Self::Netkit => None,
            Self::Vxlan => Some(Tunnel::Vxlan),
            Self::Tun => Some(Tunnel::Tun),
        }
    }

    /// Whether a pod has a link of its own to the node, with host routes at both ends.
    const fn is_point_to_point(self) -> bool {
        match self {
            Self::HostRoutes | Self::Vxlan | Self::Tun | Self::Netkit => true,
            Self::Bridge => false,
        }
    }

    /// The size of a pod's largest packets.
    fn mtu(self) -> u16 {
        self.tunnel().map_or(tunnel::UPLINK_MTU, Tunnel::mtu)
    }
}

/// What makes a router of a namespace.
pub(crate) const FORWARDING: [(&str, &str); 2] =
    [("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")];

/// One of the two families. Whatever has an address in a lab has one of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// That of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// `AF_INET` or `AF_INET6`.
    pub const fn domain(self) -> i32 {
        match self {
            Self::V4 => libc::AF_INET,
            Self::V6 => libc::AF_INET6,
        }
    }

    /// The bits of an address.
    pub(crate) const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The prefix length of the nodes' network, and of a node's pod range.
    const fn network_bits(self) -> u8 {
        match self {
            Self::V4 => 24,
            Self::V6 => 64,
        }
    }

    /// All addresses, as the destination of a default route.
    pub(crate) const fn everything(self) -> &'static str {
        match self {
            Self::V4 => "0.0.0.0/0",
            Self::V6 => "::/0",
        }
    }
}

/// The two addresses of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Addresses {
    /// That of a family.
    pub const fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }

    /// Both, IPv4 first.
    pub const fn both(self) -> [IpAddr; 2] {
        [self.of(Family::V4), self.of(Family::V6)]
    }

    /// Both, each with its family.
    pub(crate) fn each(self) -> impl Iterator<Item = (Family, IpAddr)> {
        Family::BOTH.into_iter().map(move |family| (family, self.of(family)))
    }
}

/// The number of addresses that a node can give to pods.
pub(crate) const POD_ADDRESSES: std::ops::RangeInclusive<u8> = 2..=253;
/// The last byte of the addresses that a node's tunnel device has.
const TUNNEL_HOST: u8 = 254;

/// The last group of an IPv6 address, which reads as the last byte of the IPv4 address beside it: 200 is `::200`.
fn group(host: u8) -> u16 {
    let host = u16::from(host);
    ((host / 100) << 8) | ((host / 10 % 10) << 4) | (host % 10)
}

/// The network that joins the nodes and the client: `192.168.100.0/24` and `fd00:100::/64`; the bridge itself is `.1`.
pub(crate) fn uplink(host: u8) -> Addresses {
    uplink_of(0, host)
}

/// The network of one node (counted from 1) behind a router: `192.168.(100 + N).0/24` and `fd00:100:N::/64`.
pub(crate) fn uplink_of(node: u8, host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(192, 168, 100 + node, host),
        v6: Ipv6Addr::new(0xfd00, 0x100, group(node), 0, 0, 0, 0, group(host)),
    }
}

/// The addresses of a node's tunnel device: the source of what the node itself sends to the pods of others.
pub(crate) fn tunnel_end(node: u8) -> Addresses {
    pod(node, TUNNEL_HOST)
}

/// The pod network of a node (counted from 1): `10.244.N.0/24` and `fd00:10:244:N::/64`; the gateway is `.1`.
pub(crate) fn pod(node: u8, host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(10, 244, node, host),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, group(node), 0, 0, 0, group(host)),
    }
}

/// The range of the pods of a node.
pub(crate) fn pod_range(node: u8, family: Family) -> String {
    format!("{}/{}", pod(node, 0).of(family), family.network_bits())
}

/// Addresses of two networks: the first bytes of IPv4 and the first groups of IPv6.
pub(crate) fn on(([a, b, c], [x, y, z]): ([u8; 3], [u16; 3]), host: u8) -> Addresses {
    Addresses { v4: Ipv4Addr::new(a, b, c, host), v6: Ipv6Addr::new(x, y, z, 0, 0, 0, 0, group(host)) }
}

/// A second network beside that of the nodes, `10.201.0.0/24` and `fd00:201::/64`; its bridge has no address.
pub(crate) fn second(host: u8) -> Addresses {
    on(([10, 201, 0], [0xfd00, 0x201, 0]), host)
}

/// The ends of a VPN.
pub(crate) fn vpn(host: u8) -> Addresses {
    on(([100, 64, 0], [0xfd00, 0x64, 0]), host)
}

/// The bridge of the second network.
pub(crate) fn second_bridge() -> Vec<String> {
    vec!["link add br1 type bridge mcast_snooping 0".into(), "link set br1 up".into()]
}

/// Gives an interface of the second network its addresses.
pub(crate) fn second_side(own: Addresses) -> Vec<String> {
    assign("eth1", own).chain(["link set eth1 up".into()]).collect()
}

/// Gives an interface of the nodes' network its addresses; everything else goes by way of the gateway.
pub(crate) fn uplink_side(own: Addresses, gateway: Addresses) -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned()];
    lines.extend(assign("eth0", own));
    lines.push("link set eth0 up".into());
    lines.extend(gateway.each().map(|(family, gateway)| default_route(family, gateway, "eth0")));
    lines
}

/// The router's interface to a node.
pub(crate) fn router_side(interface: &str, own: Addresses) -> Vec<String> {
    let up = format!("link set {interface} up");
    assign(interface, own).chain([up]).collect()
}

/// Addresses on an interface, with the network they are in.
fn assign(interface: &str, addresses: Addresses) -> impl Iterator<Item = String> {
    addresses
        .each()
        .map(move |(family, address)| address_on(interface, family, address, family.network_bits()))
}

/// Nobody waits until an address proves to be unique: those of a lab are.
pub(crate) fn address_on(interface: &str, family: Family, address: IpAddr, bits: u8) -> String {
    let flag = match family {
        Family::V4 => "",
        Family::V6 => " nodad",
    };
    format!("addr add {address}/{bits} dev {interface}{flag}")
}

fn default_route(family: Family, gateway: IpAddr, interface: &str) -> String {
    format!("route add {} via {gateway} dev {interface}", family.everything())
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
    gateway: Addresses,
    address: Addresses,
) -> Vec<String> {
    let interface = pod_interface(pod);
    let mtu = network.mtu();
    let mut lines = match network {
        // Its other end gets the first free name, `nk0` when each has moved away.
        PodNetwork::Netkit => vec![
            format!("link add {interface} mtu {mtu} type netkit"),
            format!("link set nk0 netns {namespace} name eth0"),
        ],
        PodNetwork::HostRoutes | PodNetwork::Vxlan | PodNetwork::Tun | PodNetwork::Bridge => {
            vec![format!(
                "link add {interface} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {namespace}"
            )]
        }
    };
    match network {
        PodNetwork::HostRoutes | PodNetwork::Vxlan | PodNetwork::Tun | PodNetwork::Netkit => {
            lines.extend(
                gateway
                    .each()
                    .map(|(family, gateway)| address_on(&interface, family, gateway, family.bits())),
            );
            lines.push(format!("link set {interface} up"));
            lines.extend(address.each().map(|(family, address)| on_link(&interface, family, address)));
        }
        PodNetwork::Bridge => lines.push(format!("link set {interface} master cni0 up")),
    }
    lines
}

/// A route to one address that is at the other end.
fn on_link(interface: &str, family: Family, address: IpAddr) -> String {
    format!("route add {address}/{} dev {interface} scope link", family.bits())
}

/// What is done inside a new pod.
pub(crate) fn pod_side(network: PodNetwork, gateway: Addresses, address: Addresses) -> Vec<String> {
    let point_to_point = network.is_point_to_point();
    let length = |family: Family| if point_to_point { family.bits() } else { family.network_bits() };
    let mut lines = vec!["link set lo up".to_owned()];
    lines.extend(address.each().map(|(family, address)| address_on("eth0", family, address, length(family))));
    lines.push("link set eth0 up".into());
    for (family, gateway) in gateway.each() {
        if point_to_point {
            lines.push(on_link("eth0", family, gateway));
        }
        lines.push(default_route(family, gateway, "eth0"));
    }
    lines
}

/// The bridge of a node's pods.
pub(crate) fn pod_bridge(gateway: Addresses) -> Vec<String> {
    let mut lines = vec!["link add cni0 type bridge mcast_snooping 0".to_owned()];
    lines.extend(assign("cni0", gateway));
    lines.push("link set cni0 up".into());
    lines
}

/// The bridge that joins the nodes.
pub(crate) fn uplink_bridge() -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned(), "link add br0 type bridge mcast_snooping 0".into()];
    lines.extend(assign("br0", uplink(1)));
    lines.push("link set br0 up".into());
    lines
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
