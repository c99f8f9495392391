//! Packets as bytes: their headers, whole checksums, and what a rewrite makes of them. Frames have an Ethernet header.

mod build;
mod rewrite;

pub(in crate::oracle) use build::sum_header;
pub use build::{Segment, behind, cut_up, error_about, ip_frame, tagged};
pub(in crate::oracle) use rewrite::checksum;
pub use rewrite::{Rewrite, header_sum_is_right, rewritten, transport_sum_is_right};

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG: usize = 4;
/// IP protocol numbers.
pub const ICMP: u8 = 1;
/// Transmission Control Protocol.
pub const TCP: u8 = 6;
/// User Datagram Protocol.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// Stream Control Transmission Protocol.
pub const SCTP: u8 = 132;

/// IPv6 extension headers that are followed (P21): hop-by-hop options, routing, fragment, destination options.
const EXTENSIONS: [u8; 4] = [0, ROUTING, FRAGMENT, 60];
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
/// How many of them are, and how many bytes they may have together.
const MOST_EXTENSIONS: (usize, usize) = (4, 128);
/// VLAN tags that are looked behind.
const MOST_TAGS: usize = 2;

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

/// Chunks of SCTP (RFC 9260 section 3.2).
pub mod chunk {
    /// Data.
    pub const DATA: u8 = 0;
    /// Begins an association.
    pub const INIT: u8 = 1;
    /// The answer, with the tag that packets to its sender bear.
    pub const INIT_ACK: u8 = 2;
    /// The end, at once.
    pub const ABORT: u8 = 6;
    /// No more data.
    pub const SHUTDOWN: u8 = 7;
    /// Nor from here.
    pub const SHUTDOWN_ACK: u8 = 8;
    /// The end.
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// Why a packet cannot be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flaw {
    /// A fragment after the first: it has no ports.
    Fragment,
    /// More extension headers than are followed, or a source route that has not ended.
    Extensions,
    /// It ends too early, or a length in it lies.
    Lengths,
    /// A protocol without ports.
    Protocol,
}

/// What makes a packet a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification of its datagram.
    pub id: u32,
    /// Whether it is the first, which has the ports.
    pub first: bool,
}

/// The packet that an ICMP error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote {
    /// Its source.
    pub src: SocketAddr,
    /// Its destination.
    pub dst: SocketAddr,
    /// Its protocol.
    pub proto: u8,
    /// Where its network header begins.
    pub l3: usize,
    /// Where its transport header begins.
    pub l4: usize,
}

/// The headers of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The link-layer address that it comes from.
    pub link: [u8; 6],
    /// The source; port 0 where there is none to be read.
    pub src: SocketAddr,
    /// The destination; likewise.
    pub dst: SocketAddr,
    /// Protocol of the transport header.
    pub proto: u8,
    /// Time to live.
    pub ttl: u8,
    /// Where the network header begins.
    pub l3: usize,
    /// Where the transport header begins.
    pub l4: usize,
    /// Bytes of the IP packet by its own account.
    pub length: usize,
    /// TCP flags, sequence and acknowledgement number.
    pub tcp: Option<(u8, u32, u32)>,
    /// SCTP's first chunk, the tag of the packet, and the tag that an INIT ACK asks for.
    pub sctp: Option<(u8, u32, u32)>,
    /// Bytes of data in a TCP segment.
    pub data: usize,
    /// Whether it is a fragment.
    pub fragment: Option<Fragment>,
    /// The packet that it is an error about.
    pub quote: Option<Quote>,
    /// What is wrong with it.
    pub flaw: Option<Flaw>,
    /// The frame ends before or within the transport header: whether ports can be read is anybody's guess.
    pub cut: bool,
}

/// Network order.
pub fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// The headers of a frame, if it is IP and long enough to say from where to where it goes. `tags`: VLAN tags are in the
/// frame, and are looked behind; elsewhere the kernel keeps one beside the packet.
pub fn parse(frame: &[u8], tags: bool) -> Option<Headers> {
    let mut l3 = ETHERNET;
    let kind = |l3: usize| frame.get(l3 - 2..l3).map(number);
    while tags && l3 < ETHERNET + MOST_TAGS * TAG && matches!(kind(l3)?, 0x8100 | 0x88a8) {
        l3 += TAG;
    }
    let mut headers = match kind(l3)? {
        0x0800 => network_v4(frame, l3),
        0x86dd => network_v6(frame, l3),
        _ => None,
    }?;
    headers.link.copy_from_slice(&frame[6..12]);
    let lies = headers.length < headers.l4 - l3 || headers.length > frame.len() - l3;
    if headers.flaw.is_none() {
        transport(frame, &mut headers);
    }
    if lies || headers.flaw == Some(Flaw::Lengths) {
        (headers.flaw, headers.quote) = (Some(Flaw::Lengths), None);
    }
    Some(headers)
}

fn network_v4(frame: &[u8], l3: usize) -> Option<Headers> {
    let header = frame.get(l3..l3 + 20)?;
    if header[0] >> 4 != 4 {
        return None;
    }
    let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&header[at..at + 4]).unwrap_or_default());
    let header_length = usize::from(header[0] & 15) * 4;
    let mut headers = Headers::between(address(12), address(16), header[9]);
    (headers.ttl, headers.length) = (header[8], number(&header[2..4]));
    (headers.l3, headers.l4) = (l3, l3 + header_length.max(20));
    let (offset, more) = (number(&header[6..8]) & 0x1fff, header[6] & 0x20 != 0);
    if offset != 0 || more {
        headers.fragment = Some(Fragment { id: number(&header[4..6]) as u32, first: offset == 0 });
    }
    headers.flaw = (offset != 0).then_some(Flaw::Fragment);
    if header_length < 20 {
        // Whatever else: its length lies. The ports are read where they would be.
        headers.length = 0;
    }
    Some(headers)
}

fn network_v6(frame: &[u8], l3: usize) -> Option<Headers> {
    let header = frame.get(l3..l3 + 40)?;
    let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).unwrap_or_default();
    let (src, dst) = (Ipv6Addr::from(address(8)), Ipv6Addr::from(address(24)));
    // An IPv4-mapped address is none that a packet may have.
    if header[0] >> 4 != 6 || src.to_ipv4_mapped().is_some() || dst.to_ipv4_mapped().is_some() {
        return None;
    }
    let mut headers = Headers::between(src.into(), dst.into(), header[6]);
    (headers.ttl, headers.length) = (header[7], 40 + number(&header[4..6]));
    (headers.l3, headers.l4) = (l3, l3 + 40);
    for _ in 0..MOST_EXTENSIONS.0 {
        if headers.flaw.is_none() {
            headers.flaw = extension(frame, &mut headers);
        }
    }
    if headers.flaw.is_none() && EXTENSIONS.contains(&headers.proto) {
        headers.flaw = Some(Flaw::Extensions);
    }
    Some(headers)
}

/// One extension header, if there is one (RFC 8200 section 4).
fn extension(frame: &[u8], headers: &mut Headers) -> Option<Flaw> {
    if !EXTENSIONS.contains(&headers.proto) {
        return None;
    }
    let Some(header) = frame.get(headers.l4..headers.l4 + 4) else { return Some(Flaw::Lengths) };
    let mut length = (usize::from(header[1]) + 1) * 8;
    if headers.proto == FRAGMENT {
        length = 8;
        let Some(id) = frame.get(headers.l4 + 4..headers.l4 + 8) else { return Some(Flaw::Lengths) };
        let (offset, more) = (number(&header[2..4]) >> 3, header[3] & 1 != 0);
        // RFC 6946: a fragment that is all there is is none.
        if offset != 0 || more {
            headers.fragment = Some(Fragment { id: number(id) as u32, first: offset == 0 });
        }
        if offset != 0 {
            headers.proto = header[0];
            return Some(Flaw::Fragment);
        }
    }
    let on_its_way = headers.proto == ROUTING && header[3] != 0;
    if on_its_way || headers.l4 + length > headers.l3 + 40 + MOST_EXTENSIONS.1 {
        return Some(Flaw::Extensions);
    }
    headers.proto = header[0];
    headers.l4 += length;
    None
}

/// Ports, TCP and SCTP fields, and what is wrong with the transport header.
fn transport(frame: &[u8], headers: &mut Headers) {
    let l4 = headers.l4;
    let header_length = match headers.proto {
        TCP => 20,
        UDP => 8,
        SCTP => 16,
        _ => {
            headers.flaw = Some(Flaw::Protocol);
            headers.quote = if headers.fragment.is_none() { quote(frame, headers) } else { None };
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
    let payload = headers.length.saturating_sub(l4 - headers.l3);
    let word = |at: usize| number(&header[at..at + 4]) as u32;
    let wrong = match headers.proto {
        TCP => {
            let own = usize::from(header[12] >> 4) * 4;
            headers.tcp = Some((header[13], word(4), word(8)));
            headers.data = payload.saturating_sub(own);
            own < 20 || own > payload
        }
        UDP => {
            let own = number(&header[4..6]);
            // The length is that of all fragments.
            own < 8 || payload < 8 || own > payload && headers.fragment.is_none()
        }
        _ => {
            let asked = frame.get(l4 + 16..l4 + 20).map(number);
            headers.sctp = Some((header[12], word(4), asked.unwrap_or(0) as u32));
            payload < 16 || header[12] == chunk::INIT_ACK && asked.is_none()
        }
    };
    if headers.proto == SCTP && headers.fragment.is_some() {
        // What its CRC32c becomes hangs on the length of all fragments.
        headers.flaw = Some(Flaw::Protocol);
    } else if wrong {
        headers.flaw = Some(Flaw::Lengths);
    }
}

/// What an ICMP error quotes, if that is a packet with ports: unreachable, time exceeded, parameter problem, and packet too
/// big (RFC 792, RFC 4443).
fn quote(frame: &[u8], outer: &Headers) -> Option<Quote> {
    let kind = *frame.get(outer.l4)?;
    let is_error = match (outer.proto, outer.is_v6()) {
        (ICMP, false) => matches!(kind, 3 | 11 | 12),
        (ICMPV6, true) => matches!(kind, 1..=4),
        _ => false,
    };
    let l3 = outer.l4 + 8;
    let inner = if outer.is_v6() { network_v6(frame, l3) } else { network_v4(frame, l3) };
    let inner = inner.filter(|inner| is_error && inner.flaw.is_none())?;
    let ports = frame.get(inner.l4..inner.l4 + 4)?;
    if ![TCP, UDP, SCTP].contains(&inner.proto) || inner.l4 + 4 > outer.end() {
        return None;
    }
    let port = |at: usize| number(&ports[at..at + 2]) as u16;
    let (src, dst) = (SocketAddr::new(inner.src.ip(), port(0)), SocketAddr::new(inner.dst.ip(), port(2)));
    Some(Quote { src, dst, proto: inner.proto, l3, l4: inner.l4 })
}

impl Quote {
    /// Where its transport checksum is, if that is quoted too.
    pub const fn checksum_at(&self) -> usize {
        checksum_at(self.l4, self.proto)
    }
}

impl Headers {
    /// A packet of which nothing else is known.
    fn between(src: IpAddr, dst: IpAddr, proto: u8) -> Self {
        Self {
            link: [0; 6],
            src: SocketAddr::new(src, 0),
            dst: SocketAddr::new(dst, 0),
            proto,
            ttl: 0,
            l3: 0,
            l4: 0,
            length: 0,
            tcp: None,
            sctp: None,
            data: 0,
            fragment: None,
            quote: None,
            flaw: None,
            cut: false,
        }
    }

    /// Whether it is IPv6.
    pub const fn is_v6(&self) -> bool {
        self.src.is_ipv6()
    }

    /// Whether a fragment may be of a protocol that Services have.
    pub fn may_have_ports(&self) -> bool {
        [TCP, UDP, SCTP].contains(&self.proto) || self.is_v6() && EXTENSIONS.contains(&self.proto)
    }

    /// Whether VLAN tags are in front of it.
    pub const fn is_tagged(&self) -> bool {
        self.l3 != ETHERNET
    }

    /// TCP flags; none for other protocols.
    pub fn flags(&self) -> u8 {
        self.tcp.map_or(0, |(flags, ..)| flags)
    }

    /// Whether it is TCP with exactly these of the flags SYN, ACK and RST.
    pub fn is_tcp_with(&self, flags: u8) -> bool {
        self.tcp.is_some() && self.flags() & (flag::SYN | flag::ACK | flag::RST) == flags
    }

    /// Whether SCTP's first chunk is of this kind.
    pub fn has_chunk(&self, wanted: u8) -> bool {
        self.sctp.is_some_and(|(kind, ..)| kind == wanted)
    }

    /// Whether it asks for a connection.
    pub fn opens(&self) -> bool {
        self.is_tcp_with(flag::SYN) || self.has_chunk(chunk::INIT)
    }

    /// Whether it accepts one.
    pub fn accepts(&self) -> bool {
        self.is_tcp_with(flag::SYN | flag::ACK) || self.has_chunk(chunk::INIT_ACK)
    }

    /// Whether it ends a connection at once.
    pub fn resets(&self) -> bool {
        self.flags() & flag::RST != 0 || self.has_chunk(chunk::ABORT)
    }

    /// Where the transport checksum is.
    pub const fn checksum_at(&self) -> usize {
        checksum_at(self.l4, self.proto)
    }

    /// Where the IP packet ends in its frame.
    pub const fn end(&self) -> usize {
        self.l3 + self.length
    }
}

/// Where the checksum of a transport header is that begins at `l4`.
const fn checksum_at(l4: usize, proto: u8) -> usize {
    l4 + match proto {
        TCP => 16,
        SCTP => 8,
        ICMP | ICMPV6 => 2,
        _ => 6,
    }
}

#[cfg(test)]
mod tests;
