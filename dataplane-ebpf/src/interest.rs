//! Whether a packet can be ours at all, from the filter and a few array reads: what is not ours leaves here.

use crate::maps::FILTER;
use crate::parse::Packet;
use crate::path::Hook;
use dataplane_common::filter::FilterBit;

/// How a packet may concern us. All false: it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Its destination may be a frontend: a client's packet.
    pub frontend: bool,
    /// Its source may be a backend, and the hook is one where such a packet may have to be restored.
    pub reply: bool,
    /// Its destination may be a ClusterIP, whatever the port.
    pub closed: bool,
}

impl Interest {
    /// Whether nothing about it can be ours.
    #[inline(always)]
    pub const fn none(&self) -> bool {
        !(self.frontend || self.reply || self.closed)
    }
}

/// Asks the filter what a packet may be, as far as it matters at this hook.
#[inline(always)]
pub fn of(packet: &Packet, hook: Hook) -> Interest {
    let proto = packet.proto;
    let frontend = || test(FilterBit::frontend(&packet.dst, packet.dst_port, proto));
    let backend = || test(FilterBit::backend(&packet.src, packet.src_port, proto));
    let to_node = || test(FilterBit::node_address(&packet.dst));
    let closed = || test(FilterBit::closed_address(&packet.dst));
    match hook {
        // Replies of flows whose source was translated, and of the node's own, are addressed to the node.
        Hook::UplinkIngress | Hook::PodIngress => {
            let to_node = to_node();
            Interest { frontend: frontend(), reply: to_node && backend(), closed: !to_node && closed() }
        }
        Hook::UplinkEgress => Interest { frontend: frontend(), reply: backend(), closed: closed() },
        Hook::PodEgress => Interest { frontend: false, reply: backend(), closed: false },
    }
}

#[inline(always)]
fn test(bit: FilterBit) -> bool {
    FILTER.get(bit.word()).is_some_and(|word| word & bit.mask() != 0)
}
