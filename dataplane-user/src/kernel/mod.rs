//! The kernel: `bpf(2)`, maps, programs and links. Nothing else in the agent names aya or makes these calls.

pub mod alone;
pub mod attach;
pub mod bpf;
pub mod callers;
pub mod capability;
pub mod cleanup;
pub mod clock;
mod clsact;
pub mod conntrack;
mod enlarge;
pub mod hook;
pub mod lasting;
pub mod link;
pub mod links;
pub mod maps;
pub mod masquerade;
mod netlink;
pub mod object;
pub mod pins;
pub mod probe;
pub mod roles;
mod rtnetlink_dump;
pub mod service_route;
pub mod sockets;
pub mod sysctls;
mod xdp;
