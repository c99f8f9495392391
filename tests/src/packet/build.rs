//! Packets made from scratch, with right checksums: what goes in, and what is expected to come out.

use std::net::Ipv4Addr;

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

/// Link-layer destination of every packet that a test sends.
pub const LINK_TO: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Link-layer source of every packet that a test sends.
pub const LINK_FROM: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// An IPv4 packet in an Ethernet frame, by its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Link-layer destination and source.
    pub link: [[u8; 6]; 2],
    /// Source address and port.
    pub src: (Ipv4Addr, u16),
    /// Destination address and port.
    pub dst: (Ipv4Addr, u16),
    /// Time to live.
    pub ttl: u8,
    /// IP identification.
    pub id: u16,
    /// IP options; a multiple of four bytes.
    pub options: Vec<u8>,
    /// Flags and fragment offset as they stand in the header.
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
    /// Any other protocol, as bytes; ICMP gets its checksum.
    Other {
        /// The protocol's number.
        proto: u8,
        /// What follows the IP header.
        bytes: Vec<u8>,
    },
}

/// Parses an address; a test's typing mistake ends it.
pub fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap_or_else(|_| panic!("{text} is no IPv4 address"))
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

/// Any packet.
pub fn packet(src: (&str, u16), dst: (&str, u16), transport: Transport) -> Packet {
    Packet {
        link: [LINK_TO, LINK_FROM],
        src: (ip(src.0), src.1),
        dst: (ip(dst.0), dst.1),
        ttl: 64,
        id: 7,
        options: Vec::new(),
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
            Transport::Other { proto, .. } => *proto,
        }
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let transport = self.transport_bytes();
        let mut bytes: Vec<u8> = self.link.concat();
        bytes.extend([8, 0]);
        bytes.extend(self.ip_header(transport.len()));
        bytes.extend(transport);
        bytes
    }

    /// The IP header for this many bytes behind it.
    fn ip_header(&self, payload: usize) -> Vec<u8> {
        let length = 20 + self.options.len();
        let mut header = vec![0x40 | (length / 4) as u8, 0];
        header.extend(((length + payload) as u16).to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend(self.fragment.to_be_bytes());
        header.extend([self.ttl, self.proto(), 0, 0]);
        header.extend(self.src.0.octets());
        header.extend(self.dst.0.octets());
        header.extend(&self.options);
        let checksum = checksum(&[&header]);
        header[10..12].copy_from_slice(&checksum);
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
            Transport::Other { proto, bytes } => {
                let mut bytes = bytes.clone();
                if *proto == 1 && bytes.len() >= 8 {
                    bytes[2..4].copy_from_slice(&[0; 2]);
                    let checksum = checksum(&[&bytes]);
                    bytes[2..4].copy_from_slice(&checksum);
                }
                bytes
            }
        }
    }

    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        let mut header = [self.src.0.octets(), self.dst.0.octets()].concat();
        header.extend([0, self.proto()]);
        header.extend((length as u16).to_be_bytes());
        header
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

/// The ICMP error of this type and code, with its second word, that a router at `from` sends about `about`.
pub fn icmp_error(from: &str, about: &Packet, kind: u8, code: u8, word: u32) -> Packet {
    let mut bytes = vec![kind, code, 0, 0];
    bytes.extend(word.to_be_bytes());
    bytes.extend(&about.bytes()[14..14 + 28]);
    let mut error = packet((from, 0), ("0.0.0.0", 0), Transport::Other { proto: 1, bytes });
    error.dst = (about.src.0, 0);
    (error.id, error.link) = (0, [LINK_FROM, LINK_TO]);
    error
}
