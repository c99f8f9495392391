//! Answers that say no: a TCP RST, or an ICMP error. Built in place of the packet they answer; the frame then goes back
//! to whoever sent it.

use crate::frame::{Frame, Refused};
use crate::parse::{Packet, tcp};
use dataplane_common::checksum::Sum;
use dataplane_common::{Addr, Protocol};

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const ICMP_HEADER: usize = 8;
/// How much of the transport header an ICMP error quotes, behind the IP header (RFC 792).
const QUOTE: usize = 8;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const TIME_TO_LIVE: u8 = 64;

/// An ICMP error (RFC 792, RFC 1191, RFC 4443).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpError {
    /// Type and code in ICMP.
    v4: [u8; 2],
    /// The same in ICMPv6.
    v6: [u8; 2],
    /// Bytes; 0 unless the packet is too big.
    mtu: u16,
}

impl IcmpError {
    /// Destination unreachable: port unreachable.
    pub const PORT_UNREACHABLE: Self = Self { v4: [3, 3], v6: [1, 4], mtu: 0 };
    /// Destination unreachable: net unreachable, or no route to it.
    pub const NO_ROUTE: Self = Self { v4: [3, 0], v6: [1, 0], mtu: 0 };
    /// Time to live (hop limit) exceeded in transit.
    pub const TIME_EXCEEDED: Self = Self { v4: [11, 0], v6: [3, 0], mtu: 0 };

    /// Destination unreachable: fragmentation needed; or packet too big. With the MTU in bytes.
    pub const fn too_big(mtu: u16) -> Self {
        Self { v4: [3, 4], v6: [2, 0], mtu }
    }

    /// The first eight bytes, checksum zero.
    const fn header(self, v4: bool) -> [u8; ICMP_HEADER] {
        let [kind, code] = if v4 { self.v4 } else { self.v6 };
        let [high, low] = self.mtu.to_be_bytes();
        [kind, code, 0, 0, 0, 0, high, low]
    }
}

/// An ICMP error, and who sends it.
///
/// All zero is a valid value.
#[derive(Clone, Copy)]
pub struct Refusal {
    /// The error.
    pub error: IcmpError,
    /// The address that it comes from.
    pub source: Addr,
}

/// Turns the frame into a RST (RFC 9293 section 3.10.7.1).
///
/// # Errors
/// [`Refused`]: the frame may be half changed and must be dropped.
pub fn reset<F: Frame>(frame: &mut F, packet: &Packet) -> Result<(), Refused> {
    let (seq, ack, flags) = if packet.flags & tcp::ACK != 0 {
        (packet.ack, 0, tcp::RST)
    } else {
        let syn_or_fin = (packet.flags & tcp::SYN != 0) as u32 + (packet.flags & tcp::FIN != 0) as u32;
        let data = data_length(frame, packet).ok_or(Refused)?;
        (0, packet.seq.wrapping_add(data).wrapping_add(syn_or_fin), tcp::RST | tcp::ACK)
    };
    let partial = frame.checksum_is_partial(packet.checksum_offset());
    begin(frame, packet, &packet.dst, Protocol::Tcp as u8, TCP_HEADER)?;

    let mut segment = [0; TCP_HEADER];
    [segment[0], segment[1]] = packet.dst_port.bytes();
    [segment[2], segment[3]] = packet.src_port.bytes();
    [segment[4], segment[5], segment[6], segment[7]] = seq.to_be_bytes();
    [segment[8], segment[9], segment[10], segment[11]] = ack.to_be_bytes();
    (segment[12], segment[13]) = ((TCP_HEADER as u8 / 4) << 4, flags);
    let pseudo = pseudo_header(&packet.dst, &packet.src, Protocol::Tcp as u8, TCP_HEADER);
    // What the device is to finish begins with the sum of the pseudo header.
    let checksum = if partial { pseudo.fold().to_ne_bytes() } else { pseudo.plus(&segment).checksum() };
    [segment[16], segment[17]] = checksum;
    frame.write(behind_header(packet), &segment)
}

/// Bytes of data in a TCP segment.
fn data_length<F: Frame>(frame: &mut F, packet: &Packet) -> Option<u32> {
    // Two bytes: the bounds of a single one at a variable offset are none that the verifier understands.
    let [offset, _] = frame.read(packet.l4() + 12)?;
    let headers = packet.network_header() + ((offset >> 4) as u32) * 4;
    Some(packet.length.saturating_sub(headers))
}

/// Turns the frame into an ICMP error from `source` to the packet's sender.
///
/// # Errors
/// [`Refused`]: the frame may be half changed and must be dropped.
pub fn icmp<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    source: &Addr,
    error: IcmpError,
) -> Result<(), Refused> {
    if packet.is_v4() {
        return icmpv4(frame, packet, source, error);
    }
    if packet.network_header() > IPV6_HEADER as u32 {
        // Of a fragment: its header, and behind it what a stack needs to find the socket.
        return icmpv6::<F, { IPV6_HEADER + 2 * QUOTE }>(frame, packet, source, error);
    }
    icmpv6::<F, { IPV6_HEADER + QUOTE }>(frame, packet, source, error)
}

/// Where the UDP checksum was left to the device, the device later writes a sum into bytes 6 and 7 of the ICMP header.
/// For port unreachable they are unused, and a sum over data whose own sum is zero leaves that sum zero.
fn icmpv4<F: Frame>(frame: &mut F, packet: &Packet, source: &Addr, error: IcmpError) -> Result<(), Refused> {
    let quote = frame.read::<{ IPV4_HEADER + QUOTE }>(packet.l3()).ok_or(Refused)?;
    begin(frame, packet, source, ICMP, ICMP_HEADER + quote.len())?;
    let mut header = error.header(true);
    [header[2], header[3]] = Sum::default().plus(&header).plus(&quote).checksum();
    frame.write(behind_header(packet), &header)?;
    frame.write(behind_header(packet) + ICMP_HEADER as u32, &quote)
}

/// As [`icmpv4`], but the checksum covers a pseudo header. If bytes 6 and 7 hold its sum before the device replaces them,
/// it is no longer part of the rest, which then sums to zero as above.
fn icmpv6<F: Frame, const QUOTED: usize>(
    frame: &mut F,
    packet: &Packet,
    source: &Addr,
    error: IcmpError,
) -> Result<(), Refused> {
    let quote = frame.read::<QUOTED>(packet.l3()).ok_or(Refused)?;
    let partial = packet.proto == Protocol::Udp as u8 && frame.checksum_is_partial(packet.checksum_offset());
    begin(frame, packet, source, ICMPV6, ICMP_HEADER + quote.len())?;
    let mut header = error.header(false);
    let mut sum = pseudo_header(source, &packet.src, ICMPV6, ICMP_HEADER + quote.len());
    if partial {
        [header[6], header[7]] = sum.fold().to_ne_bytes();
        sum = Sum::default();
    }
    [header[2], header[3]] = sum.plus(&header).plus(&quote).checksum();
    frame.write(behind_header(packet), &header)?;
    frame.write(behind_header(packet) + ICMP_HEADER as u32, &quote)
}

/// Offset of what follows the network header of an answer to `packet`, which has no options.
#[inline(always)]
fn behind_header(packet: &Packet) -> u32 {
    packet.l3() + if packet.is_v4() { IPV4_HEADER } else { IPV6_HEADER } as u32
}

/// Cuts the frame to an answer from `source` to the packet's sender, `length` bytes behind its network header, and writes
/// that header.
fn begin<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    source: &Addr,
    proto: u8,
    length: usize,
) -> Result<(), Refused> {
    let l3 = packet.l3();
    frame.resize(behind_header(packet) + length as u32)?;
    if packet.is_v4() {
        return frame.write(l3, &ipv4_header(source, &packet.src, proto, (IPV4_HEADER + length) as u16));
    }
    const ADDRESSES: u32 = 8;
    let [high, low] = (length as u16).to_be_bytes();
    frame.write(l3, &[0x60, 0, 0, 0, high, low, proto, TIME_TO_LIVE])?;
    frame.write(l3 + ADDRESSES, source.bytes())?;
    frame.write(l3 + ADDRESSES + 16, packet.src.bytes())
}

/// An IPv4 header without options, for a packet of `length` bytes that is not to be fragmented.
fn ipv4_header(src: &Addr, dst: &Addr, proto: u8, length: u16) -> [u8; IPV4_HEADER] {
    const DONT_FRAGMENT: u8 = 0x40;
    let ([l0, l1], [s0, s1, s2, s3], [d0, d1, d2, d3]) =
        (length.to_be_bytes(), src.v4_octets(), dst.v4_octets());
    let mut header =
        [0x45, 0, l0, l1, 0, 0, DONT_FRAGMENT, 0, TIME_TO_LIVE, proto, 0, 0, s0, s1, s2, s3, d0, d1, d2, d3];
    [header[10], header[11]] = Sum::default().plus(&header).checksum();
    header
}

/// Sum of the pseudo header that the transport checksum of both families covers.
pub(crate) fn pseudo_header(src: &Addr, dst: &Addr, proto: u8, length: usize) -> Sum {
    let [high, low] = (length as u16).to_be_bytes();
    Sum::default().plus_address(src).plus_address(dst).plus(&[0, proto, high, low])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::sample::{self, BOTH, Family};
    use crate::frame::slice::SliceFrame;
    use crate::parse::parse;

    fn refused(mut frame: SliceFrame) -> (SliceFrame, Packet) {
        let mut packet = Packet::EMPTY;
        assert!(parse(&mut frame, &mut packet));
        if packet.proto == Protocol::Tcp as u8 {
            reset(&mut frame, &packet).unwrap();
        } else {
            icmp(&mut frame, &packet, &packet.dst, IcmpError::PORT_UNREACHABLE).unwrap();
        }
        assert!(parse(&mut frame, &mut packet));
        (frame, packet)
    }

    #[test]
    fn a_syn_is_refused_by_a_reset_that_acknowledges_it() {
        // P1; RFC 9293 section 3.10.7.1, "CLOSED".
        for family in BOTH {
            let (frame, answer) = refused(family.tcp(tcp::SYN, b""));
            assert!(sample::sums_right(&frame));
            assert_eq!((answer.src, answer.dst), (family.service(), family.client()));
            assert_eq!((answer.src_port.number(), answer.dst_port.number()), (80, 40_000));
            assert_eq!((answer.flags, answer.seq, answer.ack), (tcp::RST | tcp::ACK, 0, 1_001));
            assert_eq!(frame.bytes.len(), family.l4() + 20);
        }
    }

    #[test]
    fn data_and_fin_count_in_the_number_that_a_reset_acknowledges() {
        for family in BOTH {
            let (_, answer) = refused(family.tcp(tcp::SYN | tcp::FIN, b"hello"));
            assert_eq!(answer.ack, 1_000 + 5 + 2);
        }
    }

    #[test]
    fn an_acknowledgement_is_refused_by_a_reset_with_its_number() {
        for family in BOTH {
            let (frame, answer) = refused(family.tcp(tcp::ACK, b"data"));
            assert!(sample::sums_right(&frame));
            assert_eq!((answer.flags, answer.seq, answer.ack), (tcp::RST, 2_000, 0));
        }
    }

    #[test]
    fn a_datagram_is_refused_by_port_unreachable_that_quotes_it() {
        // P1; RFC 792; RFC 4443 section 3.1.
        for (family, kind) in [(Family::V4, [3, 3]), (Family::V6, [1, 4])] {
            let sent = family.udp(b"question", true);
            let (frame, answer) = refused(sent.clone());
            assert!(sample::sums_right(&frame));
            assert_eq!((answer.src, answer.dst), (family.service(), family.client()));
            let at = family.l4();
            assert_eq!(frame.bytes[at..at + 2], kind);
            assert_eq!(frame.bytes[at + 8..], sent.bytes[14..at + 8], "the header and eight bytes");
        }
    }

    #[test]
    fn a_reset_whose_checksum_is_left_to_the_device_begins_with_the_pseudo_header() {
        for family in BOTH {
            let mut sent = family.tcp(tcp::SYN, b"");
            sent.partial = true;
            let (frame, _) = refused(sent);
            let pseudo = Sum::default()
                .plus_address(&family.service())
                .plus_address(&family.client())
                .plus(&[0, 6, 0, 20]);
            assert_eq!(frame.bytes[family.l4() + 16..][..2], pseudo.fold().to_ne_bytes());
        }
    }

    #[test]
    fn port_unreachable_stays_right_when_the_device_sums_the_datagram_it_no_longer_is() {
        for family in BOTH {
            let mut sent = family.udp(b"question", true);
            sent.partial = true;
            let (mut frame, _) = refused(sent);
            // What a device does with the UDP datagram that it was told of (`skb_checksum_help`).
            let (start, field) = (family.l4(), family.l4() + 6);
            let sum = Sum::default().plus(&frame.bytes[start..]).checksum();
            frame.bytes[field..field + 2].copy_from_slice(if sum == [0; 2] { &[0xff; 2] } else { &sum });
            assert!(sample::sums_right(&frame), "{family:?}");
        }
    }
}
