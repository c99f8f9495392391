//! What a rewrite makes of a packet, byte for byte; and whether checksums are right.

use super::{Headers, ICMP, Quote, SCTP, TCP, UDP, checksum_at, number};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

/// What becomes of a packet's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The source.
    pub src: SocketAddr,
    /// The destination.
    pub dst: SocketAddr,
    /// Whether its time to live falls by one.
    pub ttl_falls: bool,
    /// Source and destination of the packet that it quotes.
    pub quote: Option<(SocketAddr, SocketAddr)>,
}

/// A frame after a rewrite. Its checksums are right if they were; a checksum that was wrong is wrong by as much as before,
/// so that who receives the packet finds it out.
pub fn rewritten(frame: &[u8], headers: &Headers, rewrite: &Rewrite) -> Vec<u8> {
    let mut out = frame.to_vec();
    let addresses = network(frame, &mut out, headers.l3, (rewrite.src.ip(), rewrite.dst.ip()));
    if rewrite.ttl_falls {
        let at = headers.l3 + if headers.is_v6() { 7 } else { 8 };
        out[at] = out[at].wrapping_sub(1);
        sum_of_header(frame, &mut out, headers.l3);
    }
    // P20: what follows the first fragment has no transport header.
    if headers.fragment.is_some_and(|fragment| !fragment.first) {
        return out;
    }
    match (headers.proto, headers.quote, rewrite.quote) {
        (TCP | UDP | SCTP, ..) => {
            let (end, ports) = (headers.end(), (rewrite.src.port(), rewrite.dst.port()));
            transport(frame, &mut out, headers.l4..end, headers.proto, ports, addresses);
        }
        (_, Some(quote), Some(new)) => requote(frame, &mut out, headers, quote, new, addresses),
        _ => {}
    }
    out
}

/// Writes both addresses of a network header. Where they are.
fn network(before: &[u8], out: &mut [u8], l3: usize, addresses: (IpAddr, IpAddr)) -> Range<usize> {
    let (at, bytes) = match addresses {
        (IpAddr::V4(src), IpAddr::V4(dst)) => (l3 + 12, [src.octets(), dst.octets()].concat()),
        (IpAddr::V6(src), IpAddr::V6(dst)) => (l3 + 8, [src.octets(), dst.octets()].concat()),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            panic!("a rewrite keeps the family")
        }
    };
    out[at..at + bytes.len()].copy_from_slice(&bytes);
    sum_of_header(before, out, l3);
    at..at + bytes.len()
}

/// Carries the checksum of an IPv4 header over; there is none in IPv6.
fn sum_of_header(before: &[u8], out: &mut [u8], l3: usize) {
    if before[l3] >> 4 == 4 {
        carry(before, out, l3 + 10, &[l3..l3 + 10, l3 + 12..l3 + 20]);
    }
}

/// Writes the ports of the transport header that fills `at`, and carries its checksum over, if it is there.
fn transport(
    before: &[u8],
    out: &mut [u8],
    at: Range<usize>,
    proto: u8,
    ports: (u16, u16),
    addresses: Range<usize>,
) {
    out[at.start..at.start + 2].copy_from_slice(&ports.0.to_be_bytes());
    out[at.start + 2..at.start + 4].copy_from_slice(&ports.1.to_be_bytes());
    let sum = checksum_at(at.start, proto);
    if proto == SCTP {
        // It covers all of the packet and no address; its bits are linear in those that it covers.
        let crc = |frame: &[u8]| crc32c(&[&frame[at.start..sum], &[0; 4], &frame[sum + 4..at.end]].concat());
        let change = (crc(before) ^ crc(out)).to_le_bytes();
        out[sum..sum + 4].iter_mut().zip(change).for_each(|(byte, change)| *byte ^= change);
        return;
    }
    if sum + 2 > at.end || proto == UDP && before[sum..sum + 2] == [0, 0] {
        // Cut off in a quote; RFC 768: no checksum.
        return;
    }
    carry(before, out, sum, &[addresses, at.start..at.start + 4]);
    if proto == UDP && out[sum..sum + 2] == [0, 0] {
        out[sum..sum + 2].fill(0xff);
    }
}

/// Rewrites what an ICMP error quotes, and carries over the error's own checksum, which covers all of that.
fn requote(
    before: &[u8],
    out: &mut [u8],
    outer: &Headers,
    quote: Quote,
    new: (SocketAddr, SocketAddr),
    outer_addresses: Range<usize>,
) {
    let addresses = network(before, out, quote.l3, (new.0.ip(), new.1.ip()));
    let ports = (new.0.port(), new.1.port());
    if quote.proto == SCTP {
        // Nobody can verify a CRC32c of a part.
        out[quote.l4..quote.l4 + 2].copy_from_slice(&ports.0.to_be_bytes());
        out[quote.l4 + 2..quote.l4 + 4].copy_from_slice(&ports.1.to_be_bytes());
    } else {
        transport(before, out, quote.l4..outer.end(), quote.proto, ports, addresses);
    }
    let sum = outer.l4 + 2;
    let message = sum + 2..outer.end();
    if outer.is_v6() {
        carry(before, out, sum, &[outer_addresses, message]);
    } else {
        carry(before, out, sum, &[message]);
    }
}

/// Carries the checksum at `at` over the changes of what it covers.
fn carry(before: &[u8], out: &mut [u8], at: usize, covered: &[Range<usize>]) {
    let of = |frame: &[u8]| covered.iter().map(|range| sum(&frame[range.clone()])).sum::<usize>() % MODULUS;
    let sum = (number(&before[at..at + 2]) + of(before) + MODULUS - of(out)) % MODULUS;
    out[at..at + 2].copy_from_slice(&(sum as u16).to_be_bytes());
}

/// Checksums are numbers modulo 65,535, where a checksum is minus the sum of all that it covers. Of the two numbers that
/// stand for zero, 0 is the one that a sum over something gives.
const MODULUS: usize = 0xffff;

fn sum(bytes: &[u8]) -> usize {
    bytes.chunks(2).map(|pair| number(&[pair[0], pair.get(1).copied().unwrap_or(0)])).sum::<usize>() % MODULUS
}

/// The sum of 16-bit words with the carries added back (RFC 1071).
fn ones_sum(bytes: &[u8]) -> usize {
    let word = |pair: &[u8]| number(&[pair[0], pair.get(1).copied().unwrap_or(0)]);
    let mut sum: usize = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// CRC32c (RFC 9260 appendix A), bit by bit, the lowest first.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = u32::MAX;
    for bit in bytes.iter().flat_map(|byte| (0..8).map(move |bit| u32::from(byte >> bit & 1))) {
        crc = if (crc ^ bit) & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
    }
    !crc
}

/// The pseudo header of a transport checksum.
fn pseudo_header(headers: &Headers, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for ip in [headers.src.ip(), headers.dst.ip()] {
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, headers.proto]);
    bytes
}

/// Whether the IPv4 header's checksum is right; there is none in IPv6.
pub fn header_sum_is_right(frame: &[u8], headers: &Headers) -> bool {
    let l3 = headers.l3;
    let length = usize::from(frame[l3] & 15) * 4;
    headers.is_v6() || frame.get(l3..l3 + length).is_some_and(|header| ones_sum(header) == 0xffff)
}

/// Whether the transport checksum of a whole packet is right, taken over all that it covers.
pub fn transport_sum_is_right(frame: &[u8], headers: &Headers) -> bool {
    let Some(segment) = frame.get(headers.l4..headers.end()) else { return false };
    let segment = if headers.proto == UDP { &segment[..number(&segment[4..6])] } else { segment };
    match headers.proto {
        UDP if !headers.is_v6() && segment[6..8] == [0, 0] => true,
        ICMP => ones_sum(segment) == 0xffff,
        SCTP => {
            let whole = [&segment[..8], &[0; 4], &segment[12..]].concat();
            crc32c(&whole).to_le_bytes() == segment[8..12]
        }
        _ => ones_sum(&[pseudo_header(headers, segment.len()), segment.to_vec()].concat()) == 0xffff,
    }
}

/// The checksum of a transport segment whose own field is zero.
pub(in crate::oracle) fn checksum(headers: &Headers, segment: &[u8]) -> [u8; 2] {
    let pseudo = if headers.proto == ICMP { Vec::new() } else { pseudo_header(headers, segment.len()) };
    (!(ones_sum(&[pseudo, segment.to_vec()].concat()) as u16)).to_be_bytes()
}

/// The checksum of an IPv4 header whose own field is zero.
pub(super) fn header_checksum(header: &[u8]) -> [u8; 2] {
    (!(ones_sum(header) as u16)).to_be_bytes()
}
