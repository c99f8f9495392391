//! Packets made from scratch, with right checksums: what goes in, and what is expected to come out.

use std::net::IpAddr;

/// TCP flag bits.
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// The same for IPv6.
pub const ICMPV6: u8 = 58;

/// Link-layer destination of every packet that a test sends.
pub const LINK_TO: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Link-layer source of every packet that a test sends.
pub const LINK_FROM: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// An IP packet in an Ethernet frame, by its fields. Its addresses say of which family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Link-layer destination and source.
    pub link: [[u8; 6]; 2],
    /// VLAN tags, each with its EtherType.
    pub tags: Vec<[u8; 4]>,
    /// Source address and port.
    pub src: (IpAddr, u16),
    /// Destination address and port.
    pub dst: (IpAddr, u16),
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// IPv4 identification, or IPv6 flow label.
    pub id: u16,
    /// IPv4 options; a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: the number of each, and its bytes behind the first, which says what follows.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// IPv4 flags and fragment offset as they stand in the header.
    pub fragment: u16,
    /// What the packet carries.
    pub transport: Transport,
}

/// What a packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A TCP segment.
    Tcp {
        /// Its flags.
        flags: u8,
        /// Its sequence number.
        seq: u32,
        /// Its acknowledgement number.
        ack: u32,
        /// Its window.
        window: u16,
        /// Its data.
        data: Vec<u8>,
    },
    /// A UDP datagram.
    Udp {
        /// Its data.
        data: Vec<u8>,
        /// Whether it has a checksum.
        checksum: bool,
    },
    /// An SCTP packet with a right CRC32c.
    Sctp {
        /// Its verification tag.
        tag: u32,
        /// Its chunks.
        chunks: Vec<u8>,
    },
    /// Any other protocol, as bytes; ICMP and ICMPv6 get their checksum.
    Other {
        /// The protocol's number.
        proto: u8,
        /// What follows the IP header.
        bytes: Vec<u8>,
    },
}

/// Parses an address; a test's typing mistake ends it.
pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is no address"))
}

/// A TCP segment without data: sequence number 1,000, acknowledgement number 2,000 where the flag says so.
pub fn tcp_packet(src: (&str, u16), dst: (&str, u16), flags: u8) -> Packet {
    let ack = if flags & tcp::ACK != 0 { 2_000 } else { 0 };
    packet(src, dst, Transport::Tcp { flags, seq: 1_000, ack, window: 0xffff, data: Vec::new() })
}

/// A UDP datagram with a checksum.
pub fn udp_packet(src: (&str, u16), dst: (&str, u16), data: &[u8]) -> Packet {
    packet(src, dst, Transport::Udp { data: data.to_vec(), checksum: true })
}

/// An SCTP packet with one chunk: its type, and what follows the chunk's header (a multiple of four bytes).
pub fn sctp_packet(src: (&str, u16), dst: (&str, u16), tag: u32, chunk: u8, value: &[u8]) -> Packet {
    let mut chunks = vec![chunk, 0];
    chunks.extend((4 + value.len() as u16).to_be_bytes());
    chunks.extend(value);
    packet(src, dst, Transport::Sctp { tag, chunks })
}

/// Any packet.
pub fn packet(src: (&str, u16), dst: (&str, u16), transport: Transport) -> Packet {
    Packet {
        link: [LINK_TO, LINK_FROM],
        tags: Vec::new(),
        src: (ip(src.0), src.1),
        dst: (ip(dst.0), dst.1),
        ttl: 64,
        id: 7,
        options: Vec::new(),
        extensions: Vec::new(),
        fragment: 0x4000,
        transport,
    }
}

impl Packet {
    /// The same with another source.
    #[must_use]
    pub fn from(mut self, addr: &str, port: u16) -> Self {
        self.src = (ip(addr), port);
        self
    }

    /// The same with another destination.
    #[must_use]
    pub fn to(mut self, addr: &str, port: u16) -> Self {
        self.dst = (ip(addr), port);
        self
    }

    /// The same with these link-layer addresses (destination, source).
    #[must_use]
    pub fn link(mut self, to: [u8; 6], from: [u8; 6]) -> Self {
        self.link = [to, from];
        self
    }

    /// The same with another time to live.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// The same with these TCP numbers.
    #[must_use]
    pub fn numbers(mut self, new_seq: u32, new_ack: u32) -> Self {
        if let Transport::Tcp { seq, ack, .. } = &mut self.transport {
            (*seq, *ack) = (new_seq, new_ack);
        }
        self
    }

    /// Number of the protocol.
    pub fn proto(&self) -> u8 {
        match &self.transport {
            Transport::Tcp { .. } => 6,
            Transport::Udp { .. } => 17,
            Transport::Sctp { .. } => 132,
            Transport::Other { proto, .. } => *proto,
        }
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.link.concat();
        bytes.extend(self.tags.concat());
        bytes.extend(if self.src.0.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
        bytes.extend(self.network_bytes());
        bytes
    }

    /// The frame without its link-layer header.
    pub fn network_bytes(&self) -> Vec<u8> {
        let transport = self.transport_bytes();
        let mut bytes = if self.src.0.is_ipv4() {
            self.ipv4_header(transport.len())
        } else {
            self.ipv6_headers(transport.len())
        };
        bytes.extend(transport);
        bytes
    }

    /// Its fragments, with `piece` bytes behind the network header in each but the last. The first carries the transport
    /// checksum over the whole.
    pub fn fragments(&self, piece: usize) -> Vec<Self> {
        let payload = self.network_bytes().split_off(self.header_length());
        let last = payload.len().div_ceil(piece) - 1;
        payload
            .chunks(piece)
            .enumerate()
            .map(|(number, bytes)| {
                let transport = Transport::Other { proto: self.proto(), bytes: bytes.to_vec() };
                self.fragment(number * piece, number != last, transport)
            })
            .collect()
    }

    /// A fragment of it that begins at an offset, which is a multiple of 8.
    pub fn fragment(&self, offset: usize, more: bool, transport: Transport) -> Self {
        let mut fragment = self.clone();
        fragment.transport = transport;
        if self.src.0.is_ipv4() {
            fragment.fragment = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
        } else {
            let ([high, low], [a, b]) =
                ((offset as u16 | u16::from(more)).to_be_bytes(), self.id.to_be_bytes());
            fragment.extensions = vec![(44, vec![0, high, low, 0, 0, a, b])];
        }
        fragment
    }

    /// Bytes of the network header, with all that belongs to it.
    pub fn header_length(&self) -> usize {
        self.network_bytes().len() - self.transport_bytes().len()
    }

    /// The IPv4 header for this many bytes behind it.
    fn ipv4_header(&self, payload: usize) -> Vec<u8> {
        let length = 20 + self.options.len();
        let mut header = vec![0x40 | (length / 4) as u8, 0];
        header.extend(((length + payload) as u16).to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend(self.fragment.to_be_bytes());
        header.extend([self.ttl, self.proto(), 0, 0]);
        header.extend(octets(self.src.0));
        header.extend(octets(self.dst.0));
        header.extend(&self.options);
        let checksum = checksum(&[&header]);
        header[10..12].copy_from_slice(&checksum);
        header
    }

    /// The IPv6 header and its extension headers for this many bytes behind them.
    fn ipv6_headers(&self, payload: usize) -> Vec<u8> {
        let numbers: Vec<u8> =
            self.extensions.iter().map(|(number, _)| *number).chain([self.proto()]).collect();
        let mut extensions = Vec::new();
        for (next, (_, rest)) in numbers[1..].iter().zip(&self.extensions) {
            extensions.push(*next);
            extensions.extend(rest);
        }
        let mut header = vec![0x60, 0];
        header.extend(self.id.to_be_bytes());
        header.extend(((extensions.len() + payload) as u16).to_be_bytes());
        header.extend([numbers[0], self.ttl]);
        header.extend(octets(self.src.0));
        header.extend(octets(self.dst.0));
        header.extend(extensions);
        header
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let ports = [self.src.1.to_be_bytes(), self.dst.1.to_be_bytes()].concat();
        match &self.transport {
            Transport::Tcp { flags, seq, ack, window, data } => {
                let mut segment = ports;
                segment.extend(seq.to_be_bytes());
                segment.extend(ack.to_be_bytes());
                segment.extend([0x50, *flags]);
                segment.extend(window.to_be_bytes());
                segment.extend([0; 4]);
                segment.extend(data);
                let checksum = checksum(&[&self.pseudo_header(segment.len()), &segment]);
                segment[16..18].copy_from_slice(&checksum);
                segment
            }
            Transport::Udp { data, checksum: has_checksum } => {
                let mut datagram = ports;
                datagram.extend((8 + data.len() as u16).to_be_bytes());
                datagram.extend([0; 2]);
                datagram.extend(data);
                if *has_checksum {
                    let sum = checksum(&[&self.pseudo_header(datagram.len()), &datagram]);
                    datagram[6..8].copy_from_slice(if sum == [0; 2] { &[0xff; 2] } else { &sum });
                }
                datagram
            }
            Transport::Sctp { tag, chunks } => {
                let mut packet = ports;
                packet.extend(tag.to_be_bytes());
                packet.extend([0; 4]);
                packet.extend(chunks);
                let crc = crc32c(&packet);
                packet[8..12].copy_from_slice(&crc.to_le_bytes());
                packet
            }
            Transport::Other { proto, bytes } => {
                let mut bytes = bytes.clone();
                if matches!(*proto, ICMP | ICMPV6) && bytes.len() >= 8 {
                    bytes[2..4].copy_from_slice(&[0; 2]);
                    let pseudo = if *proto == ICMP { Vec::new() } else { self.pseudo_header(bytes.len()) };
                    let checksum = checksum(&[&pseudo, &bytes]);
                    bytes[2..4].copy_from_slice(&checksum);
                }
                bytes
            }
        }
    }

    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        let mut header = [octets(self.src.0), octets(self.dst.0)].concat();
        header.extend([0, self.proto()]);
        header.extend((length as u16).to_be_bytes());
        header
    }
}

/// An address as it stands in a header.
fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The Internet checksum of these bytes in a row (RFC 1071); all but the last run have an even length.
fn checksum(runs: &[&[u8]]) -> [u8; 2] {
    let mut sum = 0u32;
    for pair in runs.iter().flat_map(|run| run.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// The CRC32c of these bytes (RFC 3720 appendix B.4).
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut state = u32::MAX;
    for byte in bytes {
        state ^= u32::from(*byte);
        for _ in 0..8 {
            state = if state & 1 == 1 { (state >> 1) ^ 0x82f6_3b78 } else { state >> 1 };
        }
    }
    !state
}

/// The ICMP or ICMPv6 error of this type and code, with its second word, that a router at `from` sends about `about`.
pub fn icmp_error(from: &str, about: &Packet, kind: [u8; 2], word: u32) -> Packet {
    let mut error = icmp_error_quoting(from, about, kind, word, 8);
    (error.id, error.link) = (0, [LINK_FROM, LINK_TO]);
    error
}

/// The same as it arrives from elsewhere, quoting this many bytes behind the network header, or all there are.
pub fn icmp_error_quoting(
    from: &str,
    about: &Packet,
    [kind, code]: [u8; 2],
    word: u32,
    quoted: usize,
) -> Packet {
    let mut bytes = vec![kind, code, 0, 0];
    bytes.extend(word.to_be_bytes());
    bytes.extend(about.network_bytes().iter().take(about.header_length() + quoted));
    let proto = if about.src.0.is_ipv4() { ICMP } else { ICMPV6 };
    let mut error = packet((from, 0), (from, 0), Transport::Other { proto, bytes });
    error.dst = (about.src.0, 0);
    error
}
