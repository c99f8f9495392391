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
    // Two whole words: whoever copies them next waits long for words that were written in pieces.
    let bytes: [u8; 16] = bytemuck::must_cast([
        u64::from_ne_bytes([rewrite.ttl, proto, c0, c1, s0, s1, s2, s3]),
        u64::from_ne_bytes([d0, d1, d2, d3, p0, p1, q0, q1]),
    ]);
    frame.write(packet.l3() + TTL, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::sample;
    use crate::frame::slice::SliceFrame;
    use crate::parse::{parse, tcp};

    fn translated(mut frame: SliceFrame, rewrite: &Rewrite) -> SliceFrame {
        let mut packet: Packet = parsed(&mut frame);
        apply(&mut frame, &packet, rewrite).unwrap();
        packet = parsed(&mut frame);
        assert_eq!((packet.src, packet.dst), (rewrite.src, rewrite.dst));
        assert_eq!(
            (packet.src_port, packet.dst_port, packet.ttl),
            (rewrite.src_port, rewrite.dst_port, rewrite.ttl)
        );
        frame
    }

    fn parsed(frame: &mut SliceFrame) -> Packet {
        let mut packet = Packet::EMPTY;
        assert!(parse(frame, &mut packet));
        packet
    }

    const REWRITE: Rewrite = Rewrite {
        src: Addr::from_v4([10, 0, 0, 1]),
        dst: Addr::from_v4([10, 244, 3, 9]),
        src_port: Port::new(61_001),
        dst_port: Port::new(8_080),
        ttl: 63,
    };

    #[test]
    fn both_checksums_are_right_after_a_translation() {
        for frame in [sample::tcp(tcp::ACK, b"some data"), sample::udp(b"odd", true), sample::udp(b"", true)]
        {
            assert!(sample::sums_right(&frame));
            let frame = translated(frame, &REWRITE);
            assert!(sample::sums_right(&frame), "{frame:02x?}");
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_stays_zero() {
        let frame = translated(sample::udp(b"data", false), &REWRITE);
        assert_eq!(frame.bytes[40..42], [0, 0]);
    }

    #[test]
    fn a_checksum_left_to_the_device_covers_the_new_addresses_only() {
        let mut frame = sample::tcp(tcp::ACK, b"data");
        let packet = parsed(&mut frame);
        let begun = |src: &Addr, dst: &Addr| {
            Sum::default()
                .plus(&src.v4_octets())
                .plus(&dst.v4_octets())
                .plus(&[0, 6, 0, 24])
                .fold()
                .to_ne_bytes()
        };
        frame.bytes[50..52].copy_from_slice(&begun(&packet.src, &packet.dst));
        frame.partial = true;
        let frame = translated(frame, &REWRITE);
        assert_eq!(frame.bytes[50..52], begun(&REWRITE.src, &REWRITE.dst));
    }

    #[test]
    fn nothing_else_in_the_packet_changes() {
        let before = sample::tcp(tcp::ACK, b"untouched");
        let after = translated(before.clone(), &REWRITE);
        // TTL, header checksum, addresses, ports, TCP checksum.
        let ours = |at: usize| at == 22 || (24..38).contains(&at) || (50..52).contains(&at);
        for at in (0..before.bytes.len()).filter(|at| !ours(*at)) {
            assert_eq!(before.bytes[at], after.bytes[at], "byte {at}");
        }
    }
}
