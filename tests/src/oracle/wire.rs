//! Packets as bytes: their headers, whole checksums, and what a rewrite makes of them. Frames have an Ethernet header.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// IP protocol numbers.
pub const ICMP: u8 = 1;
/// Transmission Control Protocol.
pub const TCP: u8 = 6;
/// User Datagram Protocol.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;

/// TCP flags (RFC 9293 section 3.1).
pub mod flag {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// Why a packet cannot be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flaw {
    /// A fragment.
    Fragment,
    /// IP options.
    Options,
    /// It ends too early, or a length in it lies.
    Lengths,
    /// A protocol without ports.
    Protocol,
}

/// The headers of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The source; port 0 where there is none to be read.
    pub src: SocketAddr,
    /// The destination; likewise.
    pub dst: SocketAddr,
    /// Protocol of the transport header.
    pub proto: u8,
    /// Time to live.
    pub ttl: u8,
    /// Where the transport header begins.
    pub l4: usize,
    /// Bytes of the IP packet by its own account.
    pub length: usize,
    /// TCP flags, sequence and acknowledgement number.
    pub tcp: Option<(u8, u32, u32)>,
    /// Bytes of data in a TCP segment.
    pub data: usize,
    /// What is wrong with it.
    pub flaw: Option<Flaw>,
    /// The frame ends before or within the transport header: whether ports can be read is anybody's guess.
    pub cut: bool,
}

/// Network order.
pub fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// The headers of a frame, if it is IP and long enough to say from where to where it goes.
pub fn parse(frame: &[u8]) -> Option<Headers> {
    match number(frame.get(12..14)?) {
        0x0800 => parse_v4(frame),
        0x86dd => parse_v6(frame),
        _ => None,
    }
}

fn parse_v4(frame: &[u8]) -> Option<Headers> {
    let header = frame.get(ETHERNET..ETHERNET + 20)?;
    if header[0] >> 4 != 4 {
        return None;
    }
    let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&header[at..at + 4]).unwrap_or_default());
    let header_length = usize::from(header[0] & 15) * 4;
    let fragment = number(&header[6..8]);
    let mut headers = Headers {
        src: SocketAddr::new(address(12), 0),
        dst: SocketAddr::new(address(16), 0),
        proto: header[9],
        ttl: header[8],
        l4: ETHERNET + header_length.max(20),
        length: number(&header[2..4]),
        tcp: None,
        data: 0,
        flaw: None,
        cut: false,
    };
    if fragment & 0x1fff != 0 {
        headers.flaw = Some(Flaw::Fragment);
        return Some(headers);
    }
    transport(frame, &mut headers);
    let available = frame.len() - ETHERNET;
    if header_length < 20 || headers.length < header_length || headers.length > available {
        headers.flaw = Some(Flaw::Lengths);
    } else if header_length > 20 {
        headers.flaw = Some(Flaw::Options);
    } else if fragment & 0x2000 != 0 {
        headers.flaw = Some(Flaw::Fragment);
    }
    Some(headers)
}

fn parse_v6(frame: &[u8]) -> Option<Headers> {
    let header = frame.get(ETHERNET..ETHERNET + 40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&header[at..at + 16]).unwrap_or_default());
    let mut headers = Headers {
        src: SocketAddr::new(address(8), 0),
        dst: SocketAddr::new(address(24), 0),
        proto: header[6],
        ttl: header[7],
        l4: ETHERNET + 40,
        length: 40 + number(&header[4..6]),
        tcp: None,
        data: 0,
        flaw: None,
        cut: false,
    };
    transport(frame, &mut headers);
    if headers.length > frame.len() - ETHERNET {
        headers.flaw = Some(Flaw::Lengths);
    }
    Some(headers)
}

/// Ports, TCP fields and what is wrong with the transport header.
fn transport(frame: &[u8], headers: &mut Headers) {
    let l4 = headers.l4;
    let header_length = match headers.proto {
        TCP => 20,
        UDP => 8,
        _ => {
            headers.flaw = Some(Flaw::Protocol);
            return;
        }
    };
    if let Some(ports) = frame.get(l4..l4 + 4) {
        headers.src.set_port(number(&ports[..2]) as u16);
        headers.dst.set_port(number(&ports[2..]) as u16);
    }
    let Some(header) = frame.get(l4..l4 + header_length) else {
        headers.cut = true;
        headers.flaw = Some(Flaw::Lengths);
        return;
    };
    let payload = headers.length.saturating_sub(l4 - ETHERNET);
    let wrong = if headers.proto == TCP {
        let own = usize::from(header[12] >> 4) * 4;
        headers.tcp = Some((header[13], number(&header[4..8]) as u32, number(&header[8..12]) as u32));
        headers.data = payload.saturating_sub(own);
        own < 20 || own > payload
    } else {
        let own = number(&header[4..6]);
        own < 8 || own > payload
    };
    if wrong {
        headers.flaw = Some(Flaw::Lengths);
    }
}

impl Headers {
    /// Whether it is IPv6.
    pub const fn is_v6(&self) -> bool {
        self.src.is_ipv6()
    }

    /// TCP flags; none for other protocols.
    pub fn flags(&self) -> u8 {
        self.tcp.map_or(0, |(flags, ..)| flags)
    }

    /// Whether it is TCP with exactly these of the flags SYN, ACK and RST.
    pub fn is_tcp_with(&self, flags: u8) -> bool {
        self.tcp.is_some() && self.flags() & (flag::SYN | flag::ACK | flag::RST) == flags
    }

    /// Where the transport checksum is.
    pub const fn checksum_at(&self) -> usize {
        self.l4 + if self.proto == TCP { 16 } else { 6 }
    }

    /// Where the IP packet ends in its frame.
    pub const fn end(&self) -> usize {
        ETHERNET + self.length
    }
}

/// What becomes of a packet's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The source.
    pub src: SocketAddr,
    /// The destination.
    pub dst: SocketAddr,
    /// Whether its time to live falls by one.
    pub ttl_falls: bool,
}

/// A frame after a rewrite, byte for byte. Its checksums are right if they were; a checksum that was wrong is wrong by as
/// much as before, so that who receives the packet finds it out.
pub fn rewritten(frame: &[u8], headers: &Headers, rewrite: &Rewrite) -> Vec<u8> {
    let mut out = frame.to_vec();
    match (rewrite.src.ip(), rewrite.dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            out[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&src.octets());
            out[ETHERNET + 16..ETHERNET + 20].copy_from_slice(&dst.octets());
            out[ETHERNET + 8] -= u8::from(rewrite.ttl_falls);
            let at = ETHERNET + 10;
            let sum = carried(frame, &out, at, ETHERNET..ETHERNET + 20);
            out[at..at + 2].copy_from_slice(&sum);
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            out[ETHERNET + 8..ETHERNET + 24].copy_from_slice(&src.octets());
            out[ETHERNET + 24..ETHERNET + 40].copy_from_slice(&dst.octets());
            out[ETHERNET + 7] -= u8::from(rewrite.ttl_falls);
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            panic!("a rewrite keeps the family")
        }
    }
    // P20: what follows the first fragment has no transport header.
    if !headers.is_v6() && number(&frame[ETHERNET + 6..ETHERNET + 8]) & 0x1fff != 0 {
        return out;
    }
    let l4 = headers.l4;
    out[l4..l4 + 2].copy_from_slice(&rewrite.src.port().to_be_bytes());
    out[l4 + 2..l4 + 4].copy_from_slice(&rewrite.dst.port().to_be_bytes());
    let at = headers.checksum_at();
    if headers.proto == UDP && out[at..at + 2] == [0, 0] {
        // RFC 768: no checksum.
        return out;
    }
    // Both addresses lie in a row, from byte 12 or 8 of the header on; then the ports. What else the sum covers is as it was.
    let addresses = if headers.is_v6() { ETHERNET + 8..ETHERNET + 40 } else { ETHERNET + 12..ETHERNET + 20 };
    let old = [&frame[addresses.clone()], &frame[l4..l4 + 4]].concat();
    let new = [&out[addresses], &out[l4..l4 + 4]].concat();
    let sum = shifted(number(&frame[at..at + 2]), &old, &new);
    let sum = if headers.proto == UDP && sum == 0 { 0xffff } else { sum };
    out[at..at + 2].copy_from_slice(&(sum as u16).to_be_bytes());
    out
}

/// The checksum at `at` after what lies in `covered` changed.
fn carried(before: &[u8], after: &[u8], at: usize, covered: std::ops::Range<usize>) -> [u8; 2] {
    let without = |frame: &[u8]| [&frame[covered.start..at], &frame[at + 2..covered.end]].concat();
    (shifted(number(&before[at..at + 2]), &without(before), &without(after)) as u16).to_be_bytes()
}

/// A checksum that covered `old` and covers `new` now: in arithmetic modulo 65,535, where a checksum is minus the sum of
/// all that it covers. Of the two numbers that stand for zero, 0 is the one that a sum over something gives.
fn shifted(checksum: usize, old: &[u8], new: &[u8]) -> usize {
    const MODULUS: usize = 0xffff;
    let sum = |bytes: &[u8]| bytes.chunks(2).map(number).sum::<usize>() % MODULUS;
    (checksum + sum(old) + MODULUS - sum(new)) % MODULUS
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
pub fn header_sum_is_right(frame: &[u8]) -> bool {
    let length = usize::from(frame[ETHERNET] & 15) * 4;
    frame[ETHERNET] >> 4 == 6
        || frame.get(ETHERNET..ETHERNET + length).is_some_and(|header| ones_sum(header) == 0xffff)
}

/// Whether the transport checksum of a whole packet is right, taken over all that it covers.
pub fn transport_sum_is_right(frame: &[u8], headers: &Headers) -> bool {
    let Some(segment) = frame.get(headers.l4..headers.end()) else { return false };
    let segment = if headers.proto == UDP { &segment[..number(&segment[4..6])] } else { segment };
    match headers.proto {
        UDP if !headers.is_v6() && segment[6..8] == [0, 0] => true,
        ICMP => ones_sum(segment) == 0xffff,
        _ => {
            let covered = [pseudo_header(headers, segment.len()), segment.to_vec()].concat();
            ones_sum(&covered) == 0xffff
        }
    }
}

/// The checksum of a transport segment whose own field is zero.
pub fn checksum(headers: &Headers, segment: &[u8]) -> [u8; 2] {
    let covered = [pseudo_header(headers, segment.len()), segment.to_vec()].concat();
    (!(ones_sum(&covered) as u16)).to_be_bytes()
}

/// What a test sends, before it is bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// [`TCP`] or [`UDP`].
    pub proto: u8,
    /// TCP flags.
    pub flags: u8,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgement number.
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
        let mut l4 = [self.src.port().to_be_bytes(), self.dst.port().to_be_bytes()].concat();
        if self.proto == TCP {
            l4.extend(self.seq.to_be_bytes());
            l4.extend(self.ack.to_be_bytes());
            l4.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        } else {
            l4.extend((8 + self.data.len() as u16).to_be_bytes());
            l4.extend([0, 0]);
        }
        l4.extend(&self.data);
        let (sum_at, v6) = (if self.proto == TCP { 16 } else { 6 }, self.src.is_ipv6());
        let headers = Headers {
            src: self.src,
            dst: self.dst,
            proto: self.proto,
            ttl: self.ttl,
            l4: 0,
            length: 0,
            tcp: None,
            data: 0,
            flaw: None,
            cut: false,
        };
        if self.proto == TCP || self.summed || v6 {
            let sum = checksum(&headers, &l4);
            let sum = if self.proto == UDP && sum == [0, 0] { [0xff, 0xff] } else { sum };
            l4[sum_at..sum_at + 2].copy_from_slice(&sum);
        }
        ip_frame(self.src.ip(), self.dst.ip(), self.proto, self.ttl, &l4)
    }
}

/// A frame around an IP payload.
pub fn ip_frame(src: IpAddr, dst: IpAddr, proto: u8, ttl: u8, payload: &[u8]) -> Vec<u8> {
    /// Link-layer destination and source of every frame that is sent.
    const LINK: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let mut frame = LINK.to_vec();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame.extend([8, 0]);
            let mut header = vec![0x45, 0];
            header.extend((20 + payload.len() as u16).to_be_bytes());
            header.extend([0x12, 0x34, 0x40, 0, ttl, proto, 0, 0]);
            header.extend([src.octets(), dst.octets()].concat());
            let sum = !(ones_sum(&header) as u16);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend(header);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(proto: u8, v6: bool) -> Segment {
        let addresses =
            if v6 { ["[fd00::1]:40000", "[fd00::2]:80"] } else { ["10.0.0.1:40000", "10.0.0.2:80"] };
        let [src, dst] = addresses.map(|text| text.parse().unwrap());
        Segment {
            src,
            dst,
            proto,
            flags: flag::ACK,
            seq: 1,
            ack: 2,
            ttl: 64,
            data: b"odd".to_vec(),
            summed: true,
        }
    }

    #[test]
    fn a_rewrite_gives_what_making_the_packet_anew_gives() {
        for (proto, v6) in [(TCP, false), (UDP, false), (TCP, true), (UDP, true)] {
            let before = segment(proto, v6);
            let [src, dst] =
                if v6 { ["[fd00::9]:61000", "[fd00::a]:8080"] } else { ["9.9.9.9:61000", "8.8.8.8:8080"] };
            let rewrite = Rewrite { src: src.parse().unwrap(), dst: dst.parse().unwrap(), ttl_falls: true };
            let after = Segment { src: rewrite.src, dst: rewrite.dst, ttl: 63, ..before.clone() };
            let frame = before.frame();
            let headers = parse(&frame).unwrap();
            assert_eq!(headers.flaw, None);
            assert!(header_sum_is_right(&frame) && transport_sum_is_right(&frame, &headers));
            assert_eq!(rewritten(&frame, &headers, &rewrite), after.frame());
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong() {
        let mut frame = segment(TCP, false).frame();
        *frame.last_mut().unwrap() ^= 1;
        let headers = parse(&frame).unwrap();
        let rewrite = Rewrite { src: headers.src, dst: "8.8.8.8:8080".parse().unwrap(), ttl_falls: false };
        let out = rewritten(&frame, &headers, &rewrite);
        let headers = parse(&out).unwrap();
        assert!(header_sum_is_right(&out) && !transport_sum_is_right(&out, &headers));
    }
}
