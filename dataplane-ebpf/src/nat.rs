//! Rewriting: [`plan`] says what will change, [`apply`] is the only writer of a translated packet's bytes.

use crate::frame::{Frame, Refused};
use crate::parse::Packet;
use dataplane_common::checksum::{Sum, update};
use dataplane_common::flow::Flow;
use dataplane_common::{Addr, Port, Protocol};

/// What a packet becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub src_port: Port,
    /// Destination port.
    pub dst_port: Port,
    /// Time to live.
    pub ttl: u8,
}

/// What a packet of `flow` becomes. `routed`: it leaves past the stack, so its time to live falls here.
#[inline(always)]
pub const fn plan(packet: &Packet, flow: &Flow, routed: bool) -> Rewrite {
    Rewrite {
        src: flow.src,
        dst: flow.dst,
        src_port: flow.src_port,
        dst_port: flow.dst_port,
        ttl: if routed { packet.ttl - 1 } else { packet.ttl },
    }
}

/// Writes the changes.
///
/// # Errors
/// [`Refused`]: the packet may be half changed and must be dropped.
#[inline(always)]
pub fn apply<F: Frame>(frame: &mut F, packet: &Packet, rewrite: &Rewrite) -> Result<(), Refused> {
    let addresses = Sum::default()
        .minus(&packet.src.v4_octets())
        .minus(&packet.dst.v4_octets())
        .plus(&rewrite.src.v4_octets())
        .plus(&rewrite.dst.v4_octets());
    let ports = Sum::default()
        .minus(&packet.src_port.bytes())
        .minus(&packet.dst_port.bytes())
        .plus(&rewrite.src_port.bytes())
        .plus(&rewrite.dst_port.bytes());
    ipv4(frame, packet, rewrite, addresses)?;
    let same_ports = (packet.src_port, packet.dst_port) == (rewrite.src_port, rewrite.dst_port);
    let ports = if same_ports { Sum::default() } else { ports };
    let optional = packet.proto == Protocol::Udp as u8;
    frame.update_checksum(packet.checksum_offset(), addresses, ports, optional)
}

/// Writes time to live, header checksum, both addresses and both ports: 16 bytes in a row, in one go.
#[inline(always)]
fn ipv4<F: Frame>(frame: &mut F, packet: &Packet, rewrite: &Rewrite, addresses: Sum) -> Result<(), Refused> {
    const TTL: u32 = 8;
    let [proto, c0, c1] = frame.read::<3>(packet.l3() + TTL + 1).ok_or(Refused)?;
    let delta = addresses.minus(&[packet.ttl, proto]).plus(&[rewrite.ttl, proto]);
    let [c0, c1] = update([c0, c1], delta);
    let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (rewrite.src.v4_octets(), rewrite.dst.v4_octets());
    let ([p0, p1], [q0, q1]) = (rewrite.src_port.bytes(), rewrite.dst_port.bytes());
    let bytes = [rewrite.ttl, proto, c0, c1, s0, s1, s2, s3, d0, d1, d2, d3, p0, p1, q0, q1];
    frame.write(packet.l3() + TTL, &bytes)
}
