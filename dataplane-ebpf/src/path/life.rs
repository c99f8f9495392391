//! The life of a flow: what a packet that was translated says of how far it is (C4).

use crate::flow::{self, Found};
use crate::parse::{Packet, sctp, tcp};
use dataplane_common::Protocol;
use dataplane_common::flow::{Flow, FlowKey, Stage};

/// Moves a flow through its life: half-open, established, closing.
#[inline(always)]
pub(super) fn progress(key: &FlowKey, found: Found, packet: &Packet, flow: &Flow) {
    match flow.stage() {
        Stage::HalfOpen => {
            // A connection that was refused leaves nothing behind.
            if !confirm(key, found, packet, flow) && packet.resets() {
                flow::remove(key, flow);
            }
        }
        Stage::Established if packet.proto == Protocol::Tcp as u8 => {
            if packet.flags & tcp::RST != 0 {
                found.close(key, flow, Flow::OVER, Flow::OVER);
            } else if packet.flags & tcp::FIN != 0 {
                finish(key, found, flow);
            }
        }
        Stage::Established if packet.proto == Protocol::Sctp as u8 => {
            if packet.flags == sctp::ABORT || packet.flags == sctp::SHUTDOWN_COMPLETE {
                found.close(key, flow, Flow::OVER, Flow::OVER);
            } else if packet.flags == sctp::SHUTDOWN || packet.flags == sctp::SHUTDOWN_ACK {
                finish(key, found, flow);
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
}

/// A FIN, or what SCTP has for it, on an established flow: when both ends have sent one, the flow is closing.
#[inline(always)]
fn finish(key: &FlowKey, found: Found, flow: &Flow) {
    let (own, others) = if flow.has(Flow::REPLY) {
        (Flow::ENDPOINT_FIN, Flow::CLIENT_FIN)
    } else {
        (Flow::CLIENT_FIN, Flow::ENDPOINT_FIN)
    };
    if flow.has(others) {
        found.close(key, flow, own | Flow::LAST_FIN, own);
    } else {
        found.mark(key, flow, own);
    }
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
