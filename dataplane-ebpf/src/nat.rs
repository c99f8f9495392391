//! Rewriting: [`plan`] says what will change, [`apply`] is the only writer of a translated packet's bytes.

use crate::frame::{Frame, Refused};
use crate::global::global;
use crate::parse::Packet;
use crate::repeat::{Step, Steps, repeat};
use dataplane_common::checksum::{Sum, update};
use dataplane_common::crc32c::{self, Product};
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
pub fn apply<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    rewrite: &Rewrite,
    product: &mut Product,
) -> Result<(), Refused> {
    let addresses = headers::<F, true>(frame, packet, rewrite)?;
    let ports = Sum::default()
        .minus(&packet.src_port.bytes())
        .minus(&packet.dst_port.bytes())
        .plus(&rewrite.src_port.bytes())
        .plus(&rewrite.dst_port.bytes());
    if packet.proto == Protocol::Sctp as u8 {
        return frame.update_crc32c(packet.checksum_offset(), crc_delta(packet, rewrite, product));
    }
    let same_ports = (packet.src_port, packet.dst_port) == (rewrite.src_port, rewrite.dst_port);
    let ports = if same_ports { Sum::default() } else { ports };
    // A checksum of zero is none. Over IPv6 that is for tunnels only (RFC 6935), and not ours to judge.
    let optional = packet.proto == Protocol::Udp as u8;
    frame.update_checksum(packet.checksum_offset(), addresses, ports, optional)
}

/// What an SCTP packet's CRC32c changes by: it covers the ports, and no address (S6).
#[inline(always)]
fn crc_delta(packet: &Packet, rewrite: &Rewrite, product: &mut Product) -> u32 {
    let ([a, b], [c, d]) = (packet.src_port.bytes(), packet.dst_port.bytes());
    let ([e, f], [g, h]) = (rewrite.src_port.bytes(), rewrite.dst_port.bytes());
    let length = packet.length.wrapping_sub(packet.network_header());
    crc32c_delta(product, u32::from_ne_bytes([a ^ e, b ^ f, c ^ g, d ^ h]), length)
}

global! {
    /// What the CRC32c of `length` bytes changes by where their first four, read as a number, change by XOR with `change`.
    fn crc32c_delta as nat_crc32c_delta(product: mut Product; change: u32, length: u32) -> u32 {
        let [first, second] = crc32c::factors(length as u16);
        *product = Product::of(change.to_le(), first);
        let mut multiplication = Multiplication(product);
        repeat(Product::STEPS, &mut multiplication);
        *multiplication.0 = Product::of(multiplication.0.get(), second);
        repeat(Product::STEPS, &mut multiplication);
        multiplication.0.get()
    }
}

/// A product that is being taken: what the loop works on must lie on the stack, and this is all of it that does.
struct Multiplication<'a>(&'a mut Product);

impl Steps for Multiplication<'_> {
    fn step(&mut self, _index: u32) -> Step {
        self.0.step();
        Step::Next
    }
}

/// Writes the changes of the network header alone: for a packet without a transport header of its own (a fragment after
/// the first, an ICMP error, a quoted header). By how much the sum of the addresses changed.
///
/// # Errors
/// As [`apply`].
#[inline(always)]
pub fn apply_to_network<F: Frame>(frame: &mut F, packet: &Packet, rewrite: &Rewrite) -> Result<Sum, Refused> {
    headers::<F, false>(frame, packet, rewrite)
}

#[inline(always)]
fn headers<F: Frame, const PORTS: bool>(
    frame: &mut F,
    packet: &Packet,
    rewrite: &Rewrite,
) -> Result<Sum, Refused> {
    if packet.is_v4() {
        return ipv4::<F, PORTS>(frame, packet, rewrite);
    }
    ipv6::<F, PORTS>(frame, packet, rewrite)
}

/// Writes time to live, header checksum, both addresses and perhaps both ports, which without options are 16 bytes in a
/// row. By how much the sum of the addresses changed.
#[inline(always)]
fn ipv4<F: Frame, const PORTS: bool>(
    frame: &mut F,
    packet: &Packet,
    rewrite: &Rewrite,
) -> Result<Sum, Refused> {
    const TTL: u32 = 8;
    const HEADER: u32 = 20;
    let addresses = Sum::default()
        .minus(&packet.src.v4_octets())
        .minus(&packet.dst.v4_octets())
        .plus(&rewrite.src.v4_octets())
        .plus(&rewrite.dst.v4_octets());
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
    if PORTS && packet.network_header() == HEADER {
        frame.write(packet.l3() + TTL, &bytes)?;
    } else {
        let [header @ .., _, _, _, _] = bytes;
        frame.write::<12>(packet.l3() + TTL, &header)?;
        if PORTS {
            frame.write(packet.l4(), &[p0, p1, q0, q1])?;
        }
    }
    Ok(addresses)
}

/// Writes hop limit, both addresses and perhaps both ports. By how much the sum of the addresses changed.
#[inline(always)]
fn ipv6<F: Frame, const PORTS: bool>(
    frame: &mut F,
    packet: &Packet,
    rewrite: &Rewrite,
) -> Result<Sum, Refused> {
    const NEXT_HEADER: u32 = 6;
    const ADDRESSES: u32 = 8;
    if rewrite.ttl != packet.ttl {
        let [next, _] = frame.read(packet.l3() + NEXT_HEADER).ok_or(Refused)?;
        frame.write_counted(packet.l3() + NEXT_HEADER, &[next, rewrite.ttl])?;
    }
    let ([s0, s1], [d0, d1]) = (rewrite.src.words(), rewrite.dst.words());
    frame.write_counted::<32>(packet.l3() + ADDRESSES, &bytemuck::must_cast([s0, s1, d0, d1]))?;
    if PORTS {
        let ([p0, p1], [q0, q1]) = (rewrite.src_port.bytes(), rewrite.dst_port.bytes());
        frame.write(packet.l4(), &[p0, p1, q0, q1])?;
    }
    Ok(Sum::default()
        .minus_address(&packet.src)
        .minus_address(&packet.dst)
        .plus_address(&rewrite.src)
        .plus_address(&rewrite.dst))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::sample::{self, BOTH, Family};
    use crate::frame::slice::SliceFrame;
    use crate::parse::{parse, tcp};

    fn translated(mut frame: SliceFrame, rewrite: &Rewrite) -> SliceFrame {
        let mut packet: Packet = parsed(&mut frame);
        apply(&mut frame, &packet, rewrite, &mut Product::of(0, 0)).unwrap();
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

    /// What the packets of a family become.
    fn rewrite(family: Family) -> Rewrite {
        Rewrite {
            src: family.addr([10, 0, 0, 1]),
            dst: family.addr([10, 244, 3, 9]),
            src_port: Port::new(61_001),
            dst_port: Port::new(8_080),
            ttl: 63,
        }
    }

    #[test]
    fn both_checksums_are_right_after_a_translation() {
        for family in BOTH {
            for frame in [family.tcp(tcp::ACK, b"some data"), family.udp(b"odd", true), family.udp(b"", true)]
            {
                assert!(sample::sums_right(&frame));
                let frame = translated(frame, &rewrite(family));
                assert!(sample::sums_right(&frame), "{frame:02x?}");
            }
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_stays_zero() {
        // RFC 768, RFC 6935.
        for family in BOTH {
            let frame = translated(family.udp(b"data", false), &rewrite(family));
            assert_eq!(frame.bytes[family.l4() + 6..][..2], [0, 0]);
        }
    }

    #[test]
    fn a_udp_checksum_never_becomes_zero() {
        // RFC 768, RFC 8200 section 8.1: a sum of zero is sent as all ones.
        for family in BOTH {
            let becomes_zero = (0..=u16::MAX).find(|number| {
                let frame = translated(family.udp(&number.to_be_bytes(), true), &rewrite(family));
                frame.bytes[family.l4() + 6..][..2] == [0xff; 2]
            });
            let data = becomes_zero.expect("one of all sums").to_be_bytes();
            assert!(sample::sums_right(&translated(family.udp(&data, true), &rewrite(family))));
        }
    }

    #[test]
    fn a_checksum_left_to_the_device_covers_the_new_addresses_only() {
        for family in BOTH {
            let mut frame = family.tcp(tcp::ACK, b"data");
            let packet = parsed(&mut frame);
            let begun = |src: &Addr, dst: &Addr| {
                Sum::default().plus_address(src).plus_address(dst).plus(&[0, 6, 0, 24]).fold().to_ne_bytes()
            };
            let field = family.l4() + 16..family.l4() + 18;
            frame.bytes[field.clone()].copy_from_slice(&begun(&packet.src, &packet.dst));
            frame.partial = true;
            let rewrite = rewrite(family);
            let frame = translated(frame, &rewrite);
            assert_eq!(frame.bytes[field], begun(&rewrite.src, &rewrite.dst));
        }
    }

    #[test]
    fn nothing_else_in_the_packet_changes() {
        for family in BOTH {
            let before = family.tcp(tcp::ACK, b"untouched");
            let after = translated(before.clone(), &rewrite(family));
            let checksum = family.l4() + 16..family.l4() + 18;
            // Time to live, header checksum, addresses, ports, TCP checksum.
            let ours = |at: usize| match family {
                Family::V4 => at == 22 || (24..38).contains(&at) || checksum.contains(&at),
                Family::V6 => at == 21 || (22..58).contains(&at) || checksum.contains(&at),
            };
            for at in (0..before.bytes.len()).filter(|at| !ours(*at)) {
                assert_eq!(before.bytes[at], after.bytes[at], "byte {at}");
            }
        }
    }

    #[test]
    fn options_stay_where_they_are() {
        // P21.
        let mut frame = sample::tcp(tcp::ACK, b"data");
        let options = [1, 1, 1, 0];
        frame.bytes[14] = 0x46;
        frame.bytes[17] += 4;
        frame.bytes.splice(34..34, options);
        frame.bytes[24..26].fill(0);
        let checksum = Sum::default().plus(&frame.bytes[14..38]).checksum();
        frame.bytes[24..26].copy_from_slice(&checksum);
        let after = translated(frame, &rewrite(Family::V4));
        assert_eq!(after.bytes[34..38], options);
        assert_eq!(Sum::default().plus(&after.bytes[14..38]).fold(), 0xffff);
        // The pseudo header: addresses, protocol, length.
        let sum = Sum::default().plus(&after.bytes[26..34]).plus(&[0, 6, 0, 24]).plus(&after.bytes[38..]);
        assert_eq!(sum.fold(), 0xffff);
    }
}
