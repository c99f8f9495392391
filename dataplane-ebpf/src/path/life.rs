//! The life of a flow: what a packet that was translated says of how far it is (C4).

use crate::affinity;
use crate::flow::{self, Found};
use crate::parse::{Packet, sctp, tcp};
use dataplane_common::Protocol;
use dataplane_common::event::{Ended, EventKind, What};
use dataplane_common::flow::{Flow, FlowKey, Numbers, Stage};

/// What a packet does to the life of its flow. Without flags the flow goes on, unless it was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// For the half of the packet.
    pub own: u16,
    /// For the other.
    pub others: u16,
    /// What whoever watches is told.
    pub what: What,
}

impl End {
    /// It goes on.
    pub const NONE: Self = Self { own: 0, others: 0, what: What::NOTHING };

    /// It goes on as one that both ends have confirmed.
    const CONFIRMED: Self = Self { what: What::of(EventKind::Established), ..Self::NONE };

    /// It was refused, and goes.
    pub const REFUSED: Self = Self { what: What::ended(Ended::Refused), ..Self::NONE };

    /// It was reset.
    const RESET: Self = Self { own: Flow::OVER, others: Flow::OVER, what: What::ended(Ended::Reset) };
}

/// Moves a flow through its life: half-open, established, closing. How it ends, if it does. `peer` is memory for the other half's key.
#[inline(always)]
pub(super) fn progress(key: &FlowKey, found: Found, packet: &Packet, flow: &Flow, peer: &mut FlowKey) -> End {
    let stage = flow.stage();
    let is_tcp = packet.proto == Protocol::Tcp as u8;
    let (is_near, resets) = if is_tcp {
        (follow(found, packet, flow), packet.resets() && is_reset(packet, flow, peer))
    } else {
        (true, packet.resets())
    };
    match stage {
        Stage::HalfOpen => {
            if confirm(key, found, packet, flow) {
                return End::CONFIRMED;
            }
            // A connection that was refused leaves nothing behind.
            if resets {
                return End::REFUSED;
            }
        }
        Stage::Established if is_tcp => {
            if resets {
                return End::RESET;
            }
            if packet.tcp(tcp::FIN | tcp::RST, tcp::FIN) && is_near {
                return finish(key, found, flow);
            }
        }
        Stage::Established if packet.proto == Protocol::Sctp as u8 => {
            if resets || packet.flags == sctp::SHUTDOWN_COMPLETE {
                return End::RESET;
            }
            if packet.flags == sctp::SHUTDOWN || packet.flags == sctp::SHUTDOWN_ACK {
                return finish(key, found, flow);
            }
        }
        Stage::Closing if !flow.has(Flow::OVER) => {
            let answers =
                !flow.has(Flow::LAST_FIN) && packet.tcp(tcp::SYN | tcp::FIN | tcp::RST, 0) && is_near;
            if answers || resets || packet.sctp(sctp::SHUTDOWN_COMPLETE) {
                found.mark(key, flow, Flow::OVER);
            }
        }
        Stage::Established | Stage::Closing => {}
    }
    End::NONE
}

/// The numbers of a TCP segment.
#[inline(always)]
pub(super) fn numbers(packet: &Packet) -> Numbers {
    let data = packet.length.wrapping_sub(packet.network_header()).wrapping_sub(packet.transport_header());
    let flags = (packet.flags & tcp::SYN != 0) as u32 + (packet.flags & tcp::FIN != 0) as u32;
    let ack = if packet.flags & tcp::ACK != 0 { packet.ack } else { 0 };
    Numbers { end: packet.seq.wrapping_add(data).wrapping_add(flags), ack }
}

/// Follows the numbers of a direction's segments. Whether this one's are near those before: what is not is somebody's guess.
#[inline(always)]
fn follow(found: Found, packet: &Packet, flow: &Flow) -> bool {
    let segment = numbers(packet);
    let is_near = flow.numbers.is_near(segment);
    // A client that has not seen an answer may begin anew, with other numbers.
    let opens = packet.opens() && !flow.has(Flow::REPLY) && flow.stage() == Stage::HalfOpen;
    let after = if opens { segment } else { flow.numbers.after(segment) };
    let goes_on = packet.tcp(tcp::SYN | tcp::RST, 0) && is_near;
    if (opens || goes_on) && after != flow.numbers {
        found.note(after);
    }
    is_near
}

/// Whether a TCP reset has the number that its receiver waits for (RFC 5961, 3). Anybody can send one with another.
#[inline(always)]
fn is_reset(packet: &Packet, flow: &Flow, peer: &mut FlowKey) -> bool {
    let peer = flow::numbers_of_peer(flow, packet.proto, peer);
    flow.numbers.resets(peer, packet.seq, numbers(packet).ack, flow.stage() == Stage::HalfOpen)
}

/// Notes what an endpoint's SYN-ACK says of both ends.
#[inline(always)]
fn accept(found: Found, packet: &Packet, flow: &Flow) {
    let (own, proof) = (numbers(packet), packet.seq.wrapping_add(1));
    found.note(own);
    flow::answered(flow, packet.proto, proof, Numbers { end: own.ack, ack: proof });
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
        return End { own: own | Flow::LAST_FIN, others: own, what: What::ended(Ended::Closed) };
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
        if is_tcp {
            accept(found, packet, flow);
        } else {
            flow::answered(flow, packet.proto, packet.ack, Numbers::default());
        }
    } else if is_reply && packet.tcp(tcp::SYN | tcp::ACK | tcp::RST, tcp::ACK) {
        flow::goes_on(flow, packet.proto, packet.seq);
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
        if flow.has(Flow::AFFINE) {
            affinity::proved(key, flow);
        }
    }
    confirmed
}
