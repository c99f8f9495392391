//! Whether a packet can be ours at all, from the filter and a few array reads: what is not ours leaves here.

use crate::flow;
use crate::global::global;
use crate::maps::{CALLERS, FILTER};
use crate::parse::{Packet, tcp};
use crate::path::Hook;
use dataplane_common::Addr;
use dataplane_common::filter::{FilterBit, caller_cell, caller_mark};

/// How a packet may concern us. All false: it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Its destination may be a frontend, or a ClusterIP on a port that no Service has: a client's packet.
    pub frontend: bool,
    /// Its source may be a backend, and the hook is one where such a packet may have to be restored.
    pub reply: bool,
    /// It leaves, and its source may be a node port of this node, or it opens a connection that may be to an endpoint: no flow may have
    /// the same answers.
    pub outgoing: bool,
}

impl Interest {
    /// Whether nothing about it can be ours.
    #[inline(always)]
    pub const fn none(&self) -> bool {
        !(self.frontend || self.reply || self.outgoing)
    }
}

/// Asks the filter what a packet may be, as far as it matters at this hook.
#[inline(always)]
pub fn of(packet: &Packet, hook: Hook) -> Interest {
    let proto = packet.proto;
    // First what fails more often: few addresses have flows by packet at all.
    let reply =
        || has_called(&packet.dst, proto) && test(FilterBit::backend(&packet.src, packet.src_port, proto));
    match hook {
        Hook::UplinkIngress | Hook::PodIngress => {
            let (service, to_node) = destination(&packet.dst);
            if !to_node {
                return Interest { frontend: service, reply: false, outgoing: false };
            }
            let node_port = || test(FilterBit::node_port(&packet.dst, packet.dst_port, proto));
            // Replies of flows whose source was translated, and of the node's own, are addressed to the node.
            Interest { frontend: service || node_port(), reply: reply(), outgoing: false }
        }
        Hook::UplinkEgress | Hook::PodEgress => Interest {
            frontend: hook == Hook::UplinkEgress && destination(&packet.dst).0,
            reply: reply(),
            outgoing: test(FilterBit::node_port(&packet.src, packet.src_port, proto))
                || hook == Hook::UplinkEgress
                    && packet.tcp(tcp::SYN | tcp::ACK | tcp::RST, tcp::SYN)
                    && test(FilterBit::backend(&packet.dst, packet.dst_port, proto)),
        },
    }
}

/// Whether an address may be one of a Service, and whether it may be one of this node.
#[inline(always)]
fn destination(addr: &Addr) -> (bool, bool) {
    let (service, node) = (FilterBit::service_address(addr), FilterBit::node_address(addr));
    match FILTER.get(service.word()) {
        Some(word) => (word & service.mask() != 0, word & node.mask() != 0),
        None => (false, false),
    }
}

/// Whether an address may be one of a Service and cannot be one of this node.
#[inline(always)]
pub fn only_of_service(addr: &Addr) -> bool {
    destination(addr) == (true, false)
}

/// Whether a flow may have replies that go to `addr`.
#[inline(always)]
fn has_called(addr: &Addr, proto: u8) -> bool {
    CALLERS.get(caller_cell(addr, proto)).is_some_and(|mark| *mark != 0)
}

global! {
    /// Notes that a flow begins whose replies will go to `addr`. Must come before its entry: what looks for that asks here first.
    pub fn note_caller as interest_note_caller(addr: const Addr; proto: u8) {
        let Some(cell) = CALLERS.get_ptr_mut(caller_cell(addr, proto)) else { return };
        let mark = caller_mark(flow::now());
        // SAFETY: array elements stay; aligned words, of which the last writer's stays.
        unsafe {
            if cell.read_volatile() != mark {
                cell.write_volatile(mark);
            }
        }
    }
}

#[inline(always)]
fn test(bit: FilterBit) -> bool {
    FILTER.get(bit.word()).is_some_and(|word| word & bit.mask() != 0)
}
