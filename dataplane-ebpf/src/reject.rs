//! Answers that say no: a TCP RST, or an ICMP error. Built in place of the packet they answer; the frame then goes back
//! to whoever sent it.

use crate::frame::{ETHERNET, Frame, Refused};
use crate::parse::{Packet, tcp};
use dataplane_common::checksum::Sum;
use dataplane_common::{Addr, Protocol};

const IPV4_HEADER: usize = 20;
const TCP_HEADER: usize = 20;
const ICMP_HEADER: usize = 8;
/// What an ICMP error quotes: the IP header and eight bytes (RFC 792).
const QUOTE: usize = IPV4_HEADER + 8;
const ICMP: u8 = 1;
const TIME_TO_LIVE: u8 = 64;

/// An ICMP error (RFC 792, RFC 1191).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpError {
    kind: u8,
    code: u8,
    /// Bytes; 0 unless fragmentation is needed.
    mtu: u16,
}

impl IcmpError {
    /// Destination unreachable: port unreachable.
    pub const PORT_UNREACHABLE: Self = Self { kind: 3, code: 3, mtu: 0 };
    /// Time to live exceeded in transit.
    pub const TIME_EXCEEDED: Self = Self { kind: 11, code: 0, mtu: 0 };

    /// Destination unreachable: fragmentation needed, with the MTU in bytes.
    pub const fn fragmentation_needed(mtu: u16) -> Self {
        Self { kind: 3, code: 4, mtu }
    }

    /// The first eight bytes, checksum zero.
    const fn header(self) -> [u8; ICMP_HEADER] {
        let [high, low] = self.mtu.to_be_bytes();
        [self.kind, self.code, 0, 0, 0, 0, high, low]
    }
}

/// Turns the frame into what refuses its packet: a RST for TCP, port unreachable for all else (P1).
///
/// # Errors
/// [`Refused`]: the frame may be half changed and must be dropped.
#[inline(always)]
pub fn refuse<F: Frame>(frame: &mut F, packet: &Packet) -> Result<(), Refused> {
    if packet.proto == Protocol::Tcp as u8 {
        return reset(frame, packet);
    }
    icmp(frame, packet, &packet.dst, IcmpError::PORT_UNREACHABLE)
}

/// Turns the frame into a RST (RFC 9293 section 3.10.7.1).
fn reset<F: Frame>(frame: &mut F, packet: &Packet) -> Result<(), Refused> {
    let (seq, ack, flags) = if packet.flags & tcp::ACK != 0 {
        (packet.ack, 0, tcp::RST)
    } else {
        let syn_or_fin = (packet.flags & tcp::SYN != 0) as u32 + (packet.flags & tcp::FIN != 0) as u32;
        let data = data_length(frame, packet).ok_or(Refused)?;
        (0, packet.seq.wrapping_add(data).wrapping_add(syn_or_fin), tcp::RST | tcp::ACK)
    };
    let partial = frame.checksum_is_partial(packet.checksum_offset());
    frame.resize(ETHERNET + (IPV4_HEADER + TCP_HEADER) as u32)?;
    let ip = ipv4_header(&packet.dst, &packet.src, Protocol::Tcp as u8, (IPV4_HEADER + TCP_HEADER) as u16);
    frame.write(ETHERNET, &ip)?;

    let mut segment = [0; TCP_HEADER];
    [segment[0], segment[1]] = packet.dst_port.bytes();
    [segment[2], segment[3]] = packet.src_port.bytes();
    [segment[4], segment[5], segment[6], segment[7]] = seq.to_be_bytes();
    [segment[8], segment[9], segment[10], segment[11]] = ack.to_be_bytes();
    (segment[12], segment[13]) = ((TCP_HEADER as u8 / 4) << 4, flags);
    let pseudo = Sum::default().plus(&packet.dst.v4_octets()).plus(&packet.src.v4_octets()).plus(&[
        0,
        Protocol::Tcp as u8,
        0,
        TCP_HEADER as u8,
    ]);
    // What the device is to finish begins with the sum of the pseudo header.
    let checksum = if partial { pseudo.fold().to_ne_bytes() } else { pseudo.plus(&segment).checksum() };
    [segment[16], segment[17]] = checksum;
    frame.write(ETHERNET + IPV4_HEADER as u32, &segment)
}

/// Bytes of data in a TCP segment.
fn data_length<F: Frame>(frame: &mut F, packet: &Packet) -> Option<u32> {
    let [offset] = frame.read::<1>(packet.l4() + 12)?;
    let headers = packet.l4() - packet.l3() + ((offset >> 4) as u32) * 4;
    Some(packet.length.saturating_sub(headers))
}

/// Turns the frame into an ICMP error from `source` to the packet's sender.
///
/// Where the UDP checksum was left to the device, the device later writes a sum into bytes 6 and 7 of the ICMP header.
/// For port unreachable they are unused, and a sum over data whose own sum is zero leaves that sum zero.
///
/// # Errors
/// [`Refused`]: the frame may be half changed and must be dropped.
pub fn icmp<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    source: &Addr,
    error: IcmpError,
) -> Result<(), Refused> {
    let quote = frame.read::<QUOTE>(packet.l3()).ok_or(Refused)?;
    let length = IPV4_HEADER + ICMP_HEADER + QUOTE;
    frame.resize(ETHERNET + length as u32)?;
    frame.write(ETHERNET, &ipv4_header(source, &packet.src, ICMP, length as u16))?;
    let mut header = error.header();
    [header[2], header[3]] = Sum::default().plus(&header).plus(&quote).checksum();
    frame.write(ETHERNET + IPV4_HEADER as u32, &header)?;
    frame.write(ETHERNET + (IPV4_HEADER + ICMP_HEADER) as u32, &quote)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::sample;
    use crate::frame::slice::SliceFrame;
    use crate::parse::parse;

    fn refused(mut frame: SliceFrame) -> (SliceFrame, Packet) {
        let mut packet = Packet::EMPTY;
        assert!(parse(&mut frame, &mut packet));
        refuse(&mut frame, &packet).unwrap();
        assert!(parse(&mut frame, &mut packet));
        (frame, packet)
    }

    #[test]
    fn a_syn_is_refused_by_a_reset_that_acknowledges_it() {
        // P1; RFC 9293 section 3.10.7.1, "CLOSED".
        let (frame, answer) = refused(sample::tcp(tcp::SYN, b""));
        assert!(sample::sums_right(&frame));
        assert_eq!((answer.src, answer.dst), (Addr::from_v4(sample::SERVICE), Addr::from_v4(sample::CLIENT)));
        assert_eq!((answer.src_port.number(), answer.dst_port.number()), (80, 40_000));
        assert_eq!((answer.flags, answer.seq, answer.ack), (tcp::RST | tcp::ACK, 0, 1_001));
        assert_eq!(frame.bytes.len(), 54);
    }

    #[test]
    fn data_and_fin_count_in_the_number_that_a_reset_acknowledges() {
        let (_, answer) = refused(sample::tcp(tcp::SYN | tcp::FIN, b"hello"));
        assert_eq!(answer.ack, 1_000 + 5 + 2);
    }

    #[test]
    fn an_acknowledgement_is_refused_by_a_reset_with_its_number() {
        let (frame, answer) = refused(sample::tcp(tcp::ACK, b"data"));
        assert!(sample::sums_right(&frame));
        assert_eq!((answer.flags, answer.seq, answer.ack), (tcp::RST, 2_000, 0));
    }

    #[test]
    fn a_datagram_is_refused_by_port_unreachable_that_quotes_it() {
        // P1; RFC 792.
        let sent = sample::udp(b"question", true);
        let (frame, answer) = refused(sent.clone());
        assert!(sample::sums_right(&frame));
        assert_eq!((answer.src, answer.dst), (Addr::from_v4(sample::SERVICE), Addr::from_v4(sample::CLIENT)));
        assert_eq!(frame.bytes[34..36], [3, 3]);
        assert_eq!(frame.bytes[42..], sent.bytes[14..42], "the header and eight bytes");
    }

    #[test]
    fn a_reset_whose_checksum_is_left_to_the_device_begins_with_the_pseudo_header() {
        let mut sent = sample::tcp(tcp::SYN, b"");
        sent.partial = true;
        let (frame, _) = refused(sent);
        let pseudo = Sum::default().plus(&sample::SERVICE).plus(&sample::CLIENT).plus(&[0, 6, 0, 20]);
        assert_eq!(frame.bytes[50..52], pseudo.fold().to_ne_bytes());
    }
}
