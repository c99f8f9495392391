//! What tests send, made from its parts.

use super::rewrite::{checksum, crc32c, header_checksum};
use super::{ETHERNET, FRAGMENT, Headers, ICMP, ICMPV6, SCTP, TCP, UDP, chunk, number};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Link-layer destination and source of every frame that is sent.
const LINK: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

/// A packet with ports, or a ping, before it is bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// [`TCP`], [`UDP`], [`SCTP`]; any other is an echo request.
    pub proto: u8,
    /// TCP flags; the first chunk of SCTP.
    pub flags: u8,
    /// TCP sequence number; SCTP verification tag.
    pub seq: u32,
    /// TCP acknowledgement number; the tag that SCTP's INIT and INIT ACK ask for.
    pub ack: u32,
    /// Time to live.
    pub ttl: u8,
    /// Data.
    pub data: Vec<u8>,
    /// Whether a UDP datagram has a checksum (over IPv4).
    pub summed: bool,
}

impl Segment {
    /// The frame.
    pub fn frame(&self) -> Vec<u8> {
        ip_frame(self.src.ip(), self.dst.ip(), self.proto, self.ttl, &self.transport())
    }

    fn transport(&self) -> Vec<u8> {
        let mut l4 = [self.src.port().to_be_bytes(), self.dst.port().to_be_bytes()].concat();
        let sum_at = match self.proto {
            TCP => {
                l4.extend(self.seq.to_be_bytes());
                l4.extend(self.ack.to_be_bytes());
                l4.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
                16
            }
            UDP => {
                l4.extend((8 + self.data.len() as u16).to_be_bytes());
                l4.extend([0, 0]);
                6
            }
            SCTP => return self.sctp(l4),
            _ => {
                l4 = vec![if self.src.is_ipv6() { 128 } else { 8 }, 0, 0, 0, 0, 1, 0, 1];
                2
            }
        };
        l4.extend(&self.data);
        if self.proto != UDP || self.summed || self.src.is_ipv6() {
            let sum = checksum(&Headers::between(self.src.ip(), self.dst.ip(), self.proto), &l4);
            let sum = if self.proto == UDP && sum == [0, 0] { [0xff, 0xff] } else { sum };
            l4[sum_at..sum_at + 2].copy_from_slice(&sum);
        }
        l4
    }

    fn sctp(&self, mut packet: Vec<u8>) -> Vec<u8> {
        packet.extend(self.seq.to_be_bytes());
        packet.extend([0; 4]);
        let asks = matches!(self.flags, chunk::INIT | chunk::INIT_ACK);
        let length = 4 + if asks { 16 } else { self.data.len() };
        packet.extend([self.flags, 0]);
        packet.extend((length as u16).to_be_bytes());
        if asks {
            packet.extend(self.ack.to_be_bytes());
            packet.extend([0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
        } else {
            packet.extend(&self.data);
        }
        // Chunks are filled up to whole words.
        packet.resize(packet.len().next_multiple_of(4), 0);
        let crc = crc32c(&packet).to_le_bytes();
        packet[8..12].copy_from_slice(&crc);
        packet
    }
}

/// A frame around an IP payload.
pub fn ip_frame(src: IpAddr, dst: IpAddr, proto: u8, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = LINK.to_vec();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame.extend([8, 0]);
            frame.extend(header_v4(src, dst, proto, ttl, &[], payload.len()));
        }
        (src, dst) => {
            let octets = |ip| match ip {
                IpAddr::V4(ip) => Ipv4Addr::to_ipv6_mapped(&ip).octets(),
                IpAddr::V6(ip) => Ipv6Addr::octets(&ip),
            };
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((payload.len() as u16).to_be_bytes());
            frame.extend([proto, ttl]);
            frame.extend([octets(src), octets(dst)].concat());
        }
    }
    frame.extend(payload);
    frame
}

fn header_v4(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, ttl: u8, options: &[u8], payload: usize) -> Vec<u8> {
    let words = (20 + options.len()) / 4;
    let mut header = vec![0x40 | words as u8, 0];
    header.extend((words as u16 * 4 + payload as u16).to_be_bytes());
    header.extend([0x12, 0x34, 0x40, 0, ttl, proto, 0, 0]);
    header.extend([src.octets(), dst.octets()].concat());
    header.extend(options);
    let sum = header_checksum(&header);
    header[10..12].copy_from_slice(&sum);
    header
}

/// The frame with headers more than it needs behind its plain network header: IPv4 options, which are whole words; or
/// IPv6 extension headers, each by its number and its bytes but the first, which says what follows.
pub fn behind(frame: &[u8], options: &[u8], extensions: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut out = frame.to_vec();
    if frame[ETHERNET] >> 4 == 4 {
        out.splice(ETHERNET + 20..ETHERNET + 20, options.iter().copied());
        out[ETHERNET] += (options.len() / 4) as u8;
        let length = number(&frame[ETHERNET + 2..ETHERNET + 4]) + options.len();
        out[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&(length as u16).to_be_bytes());
        sum_header(&mut out);
        return out;
    }
    let last = frame[ETHERNET + 6];
    let mut bytes = Vec::new();
    for (at, (_, rest)) in extensions.iter().enumerate() {
        bytes.push(extensions.get(at + 1).map_or(last, |(next, _)| *next));
        bytes.extend(rest);
    }
    out[ETHERNET + 6] = extensions.first().map_or(last, |(number, _)| *number);
    let length = number(&frame[ETHERNET + 4..ETHERNET + 6]) + bytes.len();
    out[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&(length as u16).to_be_bytes());
    out.splice(ETHERNET + 40..ETHERNET + 40, bytes);
    out
}

/// The fragments of a plain frame, each but the last with `piece` bytes behind its network header, a multiple of eight.
pub fn cut_up(frame: &[u8], id: u16, piece: usize) -> Vec<Vec<u8>> {
    let v6 = frame[ETHERNET] >> 4 == 6;
    let (head, payload) = frame.split_at(ETHERNET + if v6 { 40 } else { 20 });
    let count = payload.len().div_ceil(piece);
    let fragment = |(at, bytes): (usize, &[u8])| {
        let more = at + 1 < count;
        let [high, low] = ((at * piece) as u16).to_be_bytes();
        let [id_high, id_low] = id.to_be_bytes();
        let mut out = head.to_vec();
        out.extend(bytes);
        if v6 {
            out[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&(bytes.len() as u16).to_be_bytes());
            let header = vec![0, high, low | u8::from(more), 0, 0, id_high, id_low];
            return behind(&out, &[], &[(FRAGMENT, header)]);
        }
        out[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&(20 + bytes.len() as u16).to_be_bytes());
        let offset = (at * piece / 8) as u16 | if more { 0x2000 } else { 0 };
        out[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&id.to_be_bytes());
        out[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&offset.to_be_bytes());
        sum_header(&mut out);
        out
    };
    payload.chunks(piece).enumerate().map(fragment).collect()
}

pub(in crate::oracle) fn sum_header(frame: &mut [u8]) {
    let length = usize::from(frame[ETHERNET] & 15) * 4;
    frame[ETHERNET + 10..ETHERNET + 12].fill(0);
    let sum = header_checksum(&frame[ETHERNET..ETHERNET + length]);
    frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum);
}

/// The ICMP error of this type, code and second word that a host at `from` sends to the sender of a plain frame about it,
/// with `quoted` bytes of it.
pub fn error_about(
    frame: &[u8],
    headers: &Headers,
    from: IpAddr,
    kind: [u8; 2],
    word: u32,
    quoted: usize,
) -> Vec<u8> {
    let mut message = vec![kind[0], kind[1], 0, 0];
    message.extend(word.to_be_bytes());
    message.extend(frame[headers.l3..].iter().take(quoted));
    let proto = if from.is_ipv6() { ICMPV6 } else { ICMP };
    let sum = checksum(&Headers::between(from, headers.src.ip(), proto), &message);
    message[2..4].copy_from_slice(&sum);
    ip_frame(from, headers.src.ip(), proto, 64, &message)
}

/// The frame with VLAN tags, the outer first.
pub fn tagged(frame: &[u8], tags: usize) -> Vec<u8> {
    let mut out = frame.to_vec();
    for _ in 0..tags {
        out.splice(12..12, [0x81, 0, 0, 7]);
    }
    out
}
