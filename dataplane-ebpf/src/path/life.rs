//! The life of a flow: what a packet that was translated says of how far it is (C4).

use crate::flow::{self, Found};
use crate::parse::{Packet, sctp, tcp};
use dataplane_common::Protocol;
use dataplane_common::flow::{Flow, FlowKey, Stage};

/// How a flow ends: the flags for the half of its last packet, and for the other. Without any it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// For the half of the packet.
    pub own: u16,
    /// For the other.
    pub others: u16,
}

impl End {
    /// It goes on.
    pub const NONE: Self = Self { own: 0, others: 0 };

    /// It was reset.
    const RESET: Self = Self { own: Flow::OVER, others: Flow::OVER };
}

/// Moves a flow through its life: half-open, established, closing. How it ends, if it does.
#[inline(always)]
pub(super) fn progress(key: &FlowKey, found: Found, packet: &Packet, flow: &Flow) -> End {
    match flow.stage() {
        Stage::HalfOpen => {
            // A connection that was refused leaves nothing behind.
            if !confirm(key, found, packet, flow) && packet.resets() {
                flow::remove(key, flow);
            }
        }
        Stage::Established if packet.proto == Protocol::Tcp as u8 => {
            if packet.flags & tcp::RST != 0 {
                return End::RESET;
            }
            if packet.flags & tcp::FIN != 0 {
                return finish(key, found, flow);
            }
        }
        Stage::Established if packet.proto == Protocol::Sctp as u8 => {
            if packet.flags == sctp::ABORT || packet.flags == sctp::SHUTDOWN_COMPLETE {
                return End::RESET;
            }
            if packet.flags == sctp::SHUTDOWN || packet.flags == sctp::SHUTDOWN_ACK {
                return finish(key, found, flow);
            }
        }
        Stage::Closing if !flow.has(Flow::OVER) => {
            let answers = !flow.has(Flow::LAST_FIN) && packet.tcp(tcp::SYN | tcp::FIN, 0);
            if answers || packet.resets() || packet.sctp(sctp::SHUTDOWN_COMPLETE) {
                found.mark(key, flow, Flow::OVER);
            }
        }
        Stage::Established | Stage::Closing => {}
    }
    End::NONE
}

/// A FIN, or what SCTP has for it, on an established flow: when both ends have sent one, the flow is closing.
#[inline(always)]
fn finish(key: &FlowKey, found: Found, flow: &Flow) -> End {
    let (own, others) = if flow.has(Flow::REPLY) {
        (Flow::ENDPOINT_FIN, Flow::CLIENT_FIN)
    } else {
        (Flow::CLIENT_FIN, Flow::ENDPOINT_FIN)
    };
    if flow.has(others) {
        return End { own: own | Flow::LAST_FIN, others: own };
    }
    found.mark(key, flow, own);
    End::NONE
}

/// Takes a half-open flow forward: notes the endpoint's answer, or promotes on the client's proof that it saw one, or on answers by
/// UDP that go on. Whether the flow is established now.
#[inline(always)]
fn confirm(key: &FlowKey, found: Found, packet: &Packet, flow: &Flow) -> bool {
    let (is_tcp, is_udp) = (packet.proto == Protocol::Tcp as u8, packet.proto == Protocol::Udp as u8);
    let is_reply = flow.has(Flow::REPLY);
    if is_reply && packet.accepts() {
        let proof = if is_tcp { packet.seq.wrapping_add(1) } else { packet.ack };
        flow::answered(flow, packet.proto, proof);
    }
    let confirmed = if is_reply {
        is_udp && flow::streams(flow)
    } else if is_tcp {
        packet.tcp(tcp::SYN | tcp::ACK | tcp::RST, tcp::ACK) && flow::proves(flow, packet.ack)
    } else if is_udp {
        flow.has(Flow::ANSWERED)
    } else {
        // The tag that the INIT ACK asked for.
        flow.has(Flow::ACK_KNOWN) && packet.seq == flow.expected_ack() && !packet.resets()
    };
    if confirmed {
        let fin = if packet.tcp(tcp::FIN, tcp::FIN) { Flow::CLIENT_FIN } else { 0 };
        found.mark(key, flow, Flow::CONFIRMED | fin);
    }
    confirmed
}
