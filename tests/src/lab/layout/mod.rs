//! Layouts of a node, as people have them, as data: what its interfaces and routes are, who calls whom, and who must answer.
//!
//! Each is a lab of two nodes. Pod `a` and pod `q` are on `node-1`, which has the agent, pod `c` is on `node-2`. `here` is a Service
//! with the endpoint `a`, `there` one with the endpoint `c`. The agent has its default flags, but where a layout needs what only its operator knows.

mod proxy;
mod raised;
mod table;
mod trial;

pub use proxy::{Proxy, Serving, kube_proxy_on};
pub use raised::Raised;
pub use table::{LAYOUTS, PLAIN};

use crate::lab::PodNetwork;
use End::{Beside, Here, There};
use Target::{Cached, ClusterIp, LbIp, NodePort};

/// Who does something, or has something done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The client outside, on the nodes' network.
    Client,
    /// A client on the second network alone.
    Second,
    /// A client behind the VPN device of `node-1`, which comes to it by the second network.
    Vpn,
    /// `node-1` itself.
    Node,
    /// `node-2` itself.
    Other,
    /// The pod `q` of `node-1`.
    Pod,
    /// The pod `a` of `node-1`.
    Server,
}

/// Which of the two Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `here`, whose endpoint is on `node-1`.
    Here,
    /// `there`, whose endpoint is on `node-2`.
    There,
    /// `beside`, whose endpoint is a pod `u` of `node-1` with an address of the nodes' network, on the bridge that the NIC is a port of.
    Beside,
}

/// An address of `node-1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// On the nodes' network.
    Uplink,
    /// On the second network.
    Second,
    /// On the VPN device.
    Vpn,
    /// The ClusterIP of `here`.
    ClusterIp,
}

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The ClusterIP.
    ClusterIp(End),
    /// The node port, on an address of `node-1`.
    NodePort(End, On),
    /// The LB IP.
    LbIp(End),
    /// The ClusterIP of the Service `cached`, whose endpoint is `c`; `node-1` has a server of its own there, `cache`.
    Cached,
}

/// A layout.
#[derive(Debug)]
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    /// What is so about it, and who has such nodes.
    pub about: &'static str,
    /// How pods are joined.
    pub pods: PodNetwork,
    /// Who is on the second network, by `eth1`.
    pub second: &'static [Who],
    /// Who joins it when the agent runs already.
    pub later: &'static [Who],
    /// For how long the VPN holds back each packet, in each direction, in milliseconds.
    pub vpn_delay_ms: u64,
    /// Lines of `ip`, before the agent starts.
    pub lines: &'static [(Who, &'static [&'static str])],
    /// Commands of the shell after them.
    pub commands: &'static [(Who, &'static str)],
    /// Commands of `nft` on `node-1`.
    pub rules: &'static [&'static str],
    /// Flags of the agent.
    pub flags: &'static [&'static str],
    /// Whether there is the Service `beside`.
    pub beside: bool,
    /// Addresses at which `node-1` has the server `cache`.
    pub cache: &'static [&'static str],
    /// Who calls what over TCP and UDP, and must be answered.
    pub answered: &'static [(Who, &'static [Target])],
    /// Who calls what, and must not be answered.
    pub unanswered: &'static [(Who, &'static [Target])],
    /// Who sends what a datagram of IPv4 that is longer than a pod's way and may be cut up, and must be answered.
    pub cut_up: &'static [(Who, &'static [Target])],
    /// What the kernel must be able to make for it and not every kernel can: kinds of interfaces, as `ip link` names them.
    pub needs: &'static [&'static str],
}

impl End {
    const fn name(self) -> &'static str {
        match self {
            Here => "here",
            There => "there",
            Beside => "beside",
        }
    }

    /// The last byte of its ClusterIP and LB IP.
    const fn host(self) -> u8 {
        match self {
            Here => 10,
            There => 20,
            Beside => 30,
        }
    }

    const fn node_port(self) -> u16 {
        match self {
            Here => 30_002,
            There => 30_003,
            Beside => 30_004,
        }
    }

    const fn pod(self) -> &'static str {
        match self {
            Here => "a",
            There => "c",
            Beside => "u",
        }
    }
}

impl Target {
    /// Who answers there.
    pub const fn answers(self) -> &'static str {
        match self {
            ClusterIp(end) | NodePort(end, _) | LbIp(end) => end.pod(),
            Cached => "cache",
        }
    }
}
