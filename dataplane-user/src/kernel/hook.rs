//! The programs by name: where each is attached and in which order.

use super::roles::Role;

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// XDP on an uplink.
    XdpUplink,
    /// tc ingress of an uplink.
    UplinkIn,
    /// tc egress of an uplink.
    UplinkOut,
    /// tc ingress of an uplink whose packets have no link-layer header.
    BareUplinkIn,
    /// tc egress of such an uplink.
    BareUplinkOut,
    /// tc ingress of a pod interface: packets from a pod.
    PodIn,
    /// tc egress of a pod interface: packets to a pod.
    PodOut,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::XdpUplink,
        Self::UplinkIn,
        Self::UplinkOut,
        Self::BareUplinkIn,
        Self::BareUplinkOut,
        Self::PodIn,
        Self::PodOut,
    ];

    /// Name of the program, and first half of its pins' names.
    pub const fn program(self) -> &'static str {
        match self {
            Self::XdpUplink => "xdp_uplink",
            Self::UplinkIn => "tc_uplink_in",
            Self::UplinkOut => "tc_uplink_out",
            Self::BareUplinkIn => "tc_bare_in",
            Self::BareUplinkOut => "tc_bare_out",
            Self::PodIn => "tc_pod_in",
            Self::PodOut => "tc_pod_out",
        }
    }

    /// The tc hooks of an interface, the restoring side first: a translated packet never meets a node that cannot
    /// translate its reply back. `ethernet`: its packets have an Ethernet header; a pod's always do.
    pub const fn of(role: Role, ethernet: bool) -> [Self; 2] {
        match (role, ethernet) {
            (Role::Uplink, true) => [Self::UplinkOut, Self::UplinkIn],
            (Role::Uplink, false) => [Self::BareUplinkOut, Self::BareUplinkIn],
            (Role::Pod, _) => [Self::PodOut, Self::PodIn],
        }
    }

    /// Whether the program is loaded only where an interface wants it: few nodes have one.
    pub const fn is_rare(self) -> bool {
        match self {
            Self::BareUplinkIn | Self::BareUplinkOut => true,
            Self::XdpUplink | Self::UplinkIn | Self::UplinkOut | Self::PodIn | Self::PodOut => false,
        }
    }

    /// Whether packets leave the stack here. Then the program is the last of its chain, else the first: what others
    /// attach sees packets as the pods see them.
    pub const fn is_egress(self) -> bool {
        match self {
            Self::XdpUplink | Self::UplinkIn | Self::BareUplinkIn | Self::PodIn => false,
            Self::UplinkOut | Self::BareUplinkOut | Self::PodOut => true,
        }
    }
}

/// A hook of the socket layer, on the node's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketHook {
    /// Name of the program and of its pin.
    pub program: &'static str,
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
}

/// The socket hooks: that which counts a closed socket off before those that count one, and those that restore what programs see before
/// those that translate.
pub const SOCKET_HOOKS: [SocketHook; 9] = [
    SocketHook { program: "sock_release", attach_type: 34 },
    SocketHook { program: "getpeername4", attach_type: 29 },
    SocketHook { program: "getpeername6", attach_type: 30 },
    SocketHook { program: "recvmsg4", attach_type: 19 },
    SocketHook { program: "recvmsg6", attach_type: 20 },
    SocketHook { program: "sendmsg4", attach_type: 14 },
    SocketHook { program: "sendmsg6", attach_type: 15 },
    SocketHook { program: "connect4", attach_type: 10 },
    SocketHook { program: "connect6", attach_type: 11 },
];
