//! From bytes to a [`Packet`]. The only place, beside `nat` and `reject`, where the two families differ.
//!
//! Parsing never decides: what is wrong with a packet is said in it, and counts only if the packet is ours.

use crate::frame::Frame;
use crate::repeat::{Step, Steps, repeat};
use dataplane_common::{Addr, Port, Protocol};

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const IPV4_HEADER: u8 = 20;
const IPV6_HEADER: u8 = 40;
const TCP_HEADER: u32 = 20;
const UDP_HEADER: u32 = 8;
/// The common header and that of the first chunk.
const SCTP_HEADER: u32 = 16;

/// How many IPv6 extension headers are followed (P21).
const EXTENSION_HEADERS: u32 = 4;
/// How many bytes of them.
const EXTENSION_BYTES: u32 = 128;

/// IPv6 extension headers (RFC 8200 section 4).
mod extension {
    /// Hop-by-hop options.
    pub(super) const HOP_BY_HOP: u8 = 0;
    /// Routing.
    pub(super) const ROUTING: u8 = 43;
    /// Fragment.
    pub(super) const FRAGMENT: u8 = 44;
    /// Destination options.
    pub(super) const DESTINATION: u8 = 60;
}

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// The same for IPv6.
pub const ICMPV6: u8 = 58;
/// The ICMP types that are errors and quote a packet, a bit for each: unreachable, time exceeded, parameter problem.
const ICMP_ERRORS: u32 = 1 << 3 | 1 << 11 | 1 << 12;
/// The same for ICMPv6: unreachable, packet too big, time exceeded, parameter problem.
const ICMPV6_ERRORS: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4;
/// Bytes before the packet that an ICMP error quotes.
const ICMP_HEADER: u8 = 8;
/// How far behind the frame's begin an ICMP error may begin, so that all offsets in the quoted packet fit into a byte.
const QUOTING_L4: u8 = u8::MAX - IPV6_HEADER - EXTENSION_BYTES as u8 - ICMP_HEADER;

/// TCP flag bits (RFC 9293 section 3.1).
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// Chunk types of SCTP (RFC 9260 section 3.2).
pub mod sctp {
    /// Begins an association.
    pub const INIT: u8 = 1;
    /// The answer to it.
    pub const INIT_ACK: u8 = 2;
    /// Ends an association at once.
    pub const ABORT: u8 = 6;
    /// No more data from the sender.
    pub const SHUTDOWN: u8 = 7;
    /// Nor from the other end.
    pub const SHUTDOWN_ACK: u8 = 8;
    /// The association has ended.
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// What stands in the way of translating a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Obstacle {
    /// Nothing.
    None,
    /// It is the first fragment of a datagram, with the ports: they must be noted for the others.
    FirstFragment,
    /// It is a fragment after the first: the ports are not in it.
    LaterFragment,
    /// It is an ICMP error, which concerns the packet that it quotes.
    IcmpError,
    /// It has more IPv6 extension headers than are followed, or has not been to all addresses of its source route.
    Extensions,
    /// It ends too early, or a length lies.
    Malformed,
    /// A protocol without ports that are known here.
    Protocol,
}

/// The headers of a packet, as far as they matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port; [`Port::ANY`] where unknown.
    pub src_port: Port,
    /// Destination port; [`Port::ANY`] where unknown.
    pub dst_port: Port,
    /// IP protocol number.
    pub proto: u8,
    /// TCP flags, or the type of an SCTP packet's first chunk; 0 otherwise.
    pub flags: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// What stands in the way of translating it.
    pub obstacle: Obstacle,
    /// TCP sequence number, or SCTP verification tag, host order.
    pub seq: u32,
    /// TCP acknowledgement number, or the tag that an SCTP INIT ACK asks for, host order.
    pub ack: u32,
    /// Bytes from the network header to the packet's end, link padding not counted.
    pub length: u32,
    /// Of a fragment: its datagram's identification, as its bytes stand in the packet.
    pub fragment_id: u32,
    /// Offset of the network header. One byte, so that the verifier knows its bounds whenever it is read.
    l3: u8,
    /// Offset of the transport header, where there is one.
    l4: u8,
    /// Bytes of the header of TCP or UDP, options counted; 0 otherwise.
    transport_header: u8,
}

impl Packet {
    /// No packet yet.
    #[cfg(test)]
    pub(crate) const EMPTY: Self = Self {
        src: Addr::UNSPECIFIED,
        dst: Addr::UNSPECIFIED,
        src_port: Port::ANY,
        dst_port: Port::ANY,
        proto: 0,
        flags: 0,
        ttl: 0,
        obstacle: Obstacle::None,
        seq: 0,
        ack: 0,
        length: 0,
        fragment_id: 0,
        l3: 0,
        l4: 0,
        transport_header: 0,
    };

    /// Whether routers may cut up an IPv4 packet: its bit "don't fragment" is clear (RFC 791).
    #[inline(always)]
    pub fn may_be_cut<F: Frame>(&self, frame: &mut F) -> bool {
        const FLAGS: u32 = 6;
        const DONT_FRAGMENT: u8 = 0x40;
        frame.read::<2>(self.l3() + FLAGS).is_some_and(|[flags, _]| flags & DONT_FRAGMENT == 0)
    }

    /// Whether a fragment may be of a protocol that Services have: behind an extension header anything may follow.
    #[inline(always)]
    pub fn may_have_ports(&self) -> bool {
        let proto = self.proto;
        proto == Protocol::Tcp as u8
            || proto == Protocol::Udp as u8
            || proto == Protocol::Sctp as u8
            || (!self.is_v4() && is_extension(proto))
    }

    /// Bytes of the header of TCP or UDP, options counted; 0 otherwise.
    #[inline(always)]
    pub const fn transport_header(&self) -> u32 {
        self.transport_header as u32
    }

    /// Whether the TCP flags in `mask` are exactly `wanted`.
    #[inline(always)]
    pub const fn tcp(&self, mask: u8, wanted: u8) -> bool {
        self.proto == Protocol::Tcp as u8 && self.flags & mask == wanted
    }

    /// Whether it is SCTP and its first chunk is of this type.
    #[inline(always)]
    pub const fn sctp(&self, chunk: u8) -> bool {
        self.proto == Protocol::Sctp as u8 && self.flags == chunk
    }

    /// Whether it asks for a connection, whatever the protocol calls that.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.tcp(tcp::SYN | tcp::ACK | tcp::RST, tcp::SYN) || self.sctp(sctp::INIT)
    }

    /// Whether it is of a TCP connection that was opened before.
    #[inline(always)]
    pub const fn continues(&self) -> bool {
        self.proto == Protocol::Tcp as u8 && !self.opens()
    }

    /// Whether it answers what opens a connection: a SYN-ACK, or an INIT ACK.
    #[inline(always)]
    pub const fn accepts(&self) -> bool {
        self.tcp(tcp::SYN | tcp::ACK | tcp::RST, tcp::SYN | tcp::ACK) || self.sctp(sctp::INIT_ACK)
    }

    /// Whether it ends a connection at once: a RST, or an ABORT.
    #[inline(always)]
    pub const fn resets(&self) -> bool {
        self.tcp(tcp::RST, tcp::RST) || self.sctp(sctp::ABORT)
    }

    /// Both ports, the source's first, as they stand in the packet.
    #[inline(always)]
    pub const fn ports(&self) -> u32 {
        let ([a, b], [c, d]) = (self.src_port.bytes(), self.dst_port.bytes());
        u32::from_ne_bytes([a, b, c, d])
    }

    /// Whether it is an IPv4 packet.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        self.dst.is_v4()
    }

    /// Offset of the network header.
    #[inline(always)]
    pub const fn l3(&self) -> u32 {
        self.l3 as u32
    }

    /// Offset of the transport header, where one follows.
    #[inline(always)]
    pub const fn l4(&self) -> u32 {
        self.l4 as u32
    }

    /// Bytes of the network header: options and extension headers included.
    #[inline(always)]
    pub const fn network_header(&self) -> u32 {
        self.l4.wrapping_sub(self.l3) as u32
    }

    /// Bytes of the network header without options or extension headers.
    #[inline(always)]
    pub fn plain_header(&self) -> u32 {
        if self.is_v4() { IPV4_HEADER as u32 } else { IPV6_HEADER as u32 }
    }

    /// Bytes of all headers of a packet of TCP or UDP whose network header has no options; never more than 100.
    #[inline(always)]
    pub fn plain_headers(&self) -> u32 {
        /// All bits of the length of a TCP header.
        const TRANSPORT: u32 = 60;
        self.plain_header() + (self.transport_header() & TRANSPORT)
    }

    /// Offset of the transport checksum.
    #[inline(always)]
    pub const fn checksum_offset(&self) -> u32 {
        let offset = if self.proto == Protocol::Tcp as u8 {
            16
        } else if self.proto == Protocol::Sctp as u8 {
            8
        } else {
            6
        };
        self.l4() + offset
    }
}

/// Reads the headers of the packet in `frame`; false if it is not IP, or too short to say.
#[inline(always)]
pub fn parse<F: Frame>(frame: &mut F, packet: &mut Packet) -> bool {
    let Some((l3, ethertype)) = frame.network() else { return false };
    packet.l3 = l3 as u8;
    (packet.src_port, packet.dst_port, packet.flags) = (Port::ANY, Port::ANY, 0);
    packet.transport_header = 0;
    let network = match ethertype {
        ETHERTYPE_IPV4 => ipv4(frame, packet),
        ETHERTYPE_IPV6 => ipv6(frame, packet),
        _ => None,
    };
    let Some(follows) = network else { return false };
    if follows == Follows::Transport {
        let found = transport(frame, packet);
        if found != Obstacle::None && packet.obstacle != Obstacle::Malformed {
            packet.obstacle = found;
        }
    }
    true
}

/// Writes an address in words: the compiler would make a call of a plain copy, which copies byte by byte.
#[inline(always)]
fn write(addr: &mut Addr, words: [u64; 2]) {
    let first: *mut u64 = (&raw mut *addr).cast();
    // SAFETY: an address has the size and the alignment of two words.
    unsafe {
        first.write_volatile(words[0]);
        first.add(1).write_volatile(words[1]);
    }
}

/// What comes behind the network header.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Follows {
    /// A transport header.
    Transport,
    /// The middle of something, or something unknown.
    Rest,
}

/// Reads the network header, and says in the packet what stands in the way as far as that shows it; `None` if it is none.
#[inline(always)]
fn ipv4<F: Frame>(frame: &mut F, packet: &mut Packet) -> Option<Follows> {
    let [version_ihl, _, len0, len1, id0, id1, frag0, frag1, ttl, proto, _, _] =
        frame.read::<12>(packet.l3())?;
    let [s0, s1, s2, s3, d0, d1, d2, d3] = frame.read::<8>(packet.l3() + 12)?;
    if version_ihl >> 4 != 4 {
        return None;
    }
    (packet.src, packet.dst) = (Addr::from_v4([s0, s1, s2, s3]), Addr::from_v4([d0, d1, d2, d3]));
    (packet.proto, packet.ttl) = (proto, ttl);
    let header_length = (version_ihl & 0x0f) * 4;
    packet.l4 = packet.l3 + if header_length < IPV4_HEADER { IPV4_HEADER } else { header_length };
    let available = frame.length() - packet.l3();
    packet.length = u16::from_be_bytes([len0, len1]) as u32;
    if packet.length == 0 && frame.segment_size() != 0 {
        // A segment train longer than the field can say ("BIG TCP").
        packet.length = available;
    }
    // Bit 13 says that more fragments follow, the lower 13 bits where this one begins (RFC 791 section 3.1).
    let more_fragments = frag0 & 0x20 != 0;
    let later_fragment = frag0 & 0x1f != 0 || frag1 != 0;
    packet.obstacle =
        if header_length < IPV4_HEADER || packet.length < header_length as u32 || packet.length > available {
            Obstacle::Malformed
        } else if later_fragment || more_fragments {
            packet.fragment_id = u16::from_ne_bytes([id0, id1]) as u32;
            if later_fragment { Obstacle::LaterFragment } else { Obstacle::FirstFragment }
        } else {
            Obstacle::None
        };
    Some(if later_fragment { Follows::Rest } else { Follows::Transport })
}

/// As [`ipv4`].
#[inline(always)]
fn ipv6<F: Frame>(frame: &mut F, packet: &mut Packet) -> Option<Follows> {
    let [version, _, _, _, len0, len1, next, hop_limit] = frame.read::<8>(packet.l3())?;
    let [src, dst]: [[u64; 2]; 2] = bytemuck::must_cast(frame.read::<32>(packet.l3() + 8)?);
    write(&mut packet.src, src);
    write(&mut packet.dst, dst);
    // An IPv4-mapped address is none that a packet may have, and would be taken for the IPv4 address itself.
    if version >> 4 != 6 || packet.src.is_v4() || packet.dst.is_v4() {
        return None;
    }
    (packet.proto, packet.ttl) = (next, hop_limit);
    packet.l4 = packet.l3 + IPV6_HEADER;
    let available = frame.length() - packet.l3();
    packet.length = IPV6_HEADER as u32 + u16::from_be_bytes([len0, len1]) as u32;
    if packet.length == IPV6_HEADER as u32 && frame.segment_size() != 0 {
        // As with IPv4.
        packet.length = available;
    }
    packet.obstacle = Obstacle::None;
    let follows = if is_extension(next) { extensions(frame, packet) } else { Follows::Transport };
    if packet.length < packet.network_header() || packet.length > available {
        packet.obstacle = Obstacle::Malformed;
    }
    Some(follows)
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, extension::HOP_BY_HOP | extension::ROUTING | extension::FRAGMENT | extension::DESTINATION)
}

/// Follows the extension headers up to the transport header (P21).
#[inline(always)]
fn extensions<F: Frame>(frame: &mut F, packet: &mut Packet) -> Follows {
    let mut headers = Extensions { frame, packet, follows: Follows::Transport };
    repeat(EXTENSION_HEADERS, &mut headers);
    let Extensions { packet, follows, .. } = headers;
    if is_extension(packet.proto) && follows == Follows::Transport {
        packet.obstacle = Obstacle::Extensions;
        return Follows::Rest;
    }
    follows
}

/// The extension headers of a packet, one after the other.
struct Extensions<'a, F> {
    frame: &'a mut F,
    packet: &'a mut Packet,
    follows: Follows,
}

impl<F: Frame> Extensions<'_, F> {
    /// Ends the walk: what follows is no transport header.
    fn stop(&mut self, obstacle: Obstacle) -> Step {
        self.packet.obstacle = obstacle;
        self.follows = Follows::Rest;
        Step::Done
    }
}

impl<F: Frame> Steps for Extensions<'_, F> {
    #[inline(always)]
    fn step(&mut self, _index: u32) -> Step {
        if !is_extension(self.packet.proto) {
            return Step::Done;
        }
        let Some([next, length, third, fourth]) = self.frame.read::<4>(self.packet.l4()) else {
            return self.stop(Obstacle::Malformed);
        };
        let mut bytes = (length as u32 + 1) * 8;
        if self.packet.proto == extension::FRAGMENT {
            bytes = 8;
            // The lowest bit says that more fragments follow, the upper 13 where this one begins.
            let (later, more) = (third != 0 || fourth & 0xf8 != 0, fourth & 1 != 0);
            let Some(id) = self.frame.read::<4>(self.packet.l4() + 4) else {
                return self.stop(Obstacle::Malformed);
            };
            self.packet.fragment_id = u32::from_ne_bytes(id);
            if later {
                self.packet.proto = next;
                return self.stop(Obstacle::LaterFragment);
            }
            if more {
                self.packet.obstacle = Obstacle::FirstFragment;
            }
        }
        let l4 = self.packet.l4() + bytes;
        // Segments left: the destination is not the last one yet, which is what the checksum covers.
        let on_its_way = self.packet.proto == extension::ROUTING && fourth != 0;
        if on_its_way || l4 > self.packet.l3() + IPV6_HEADER as u32 + EXTENSION_BYTES {
            return self.stop(Obstacle::Extensions);
        }
        (self.packet.proto, self.packet.l4) = (next, l4 as u8);
        Step::Next
    }
}

/// Reads ports, flags and numbers of the transport header, and says what stands in the way there.
#[inline(always)]
fn transport<F: Frame>(frame: &mut F, packet: &mut Packet) -> Obstacle {
    let payload = packet.length.saturating_sub(packet.network_header());
    if packet.proto == Protocol::Tcp as u8 {
        let Some(header) = frame.read::<14>(packet.l4()) else { return Obstacle::Malformed };
        let [a, b, c, d, s0, s1, s2, s3, a0, a1, a2, a3, offset, flags] = header;
        (packet.src_port, packet.dst_port) = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
        packet.flags = flags;
        packet.seq = u32::from_be_bytes([s0, s1, s2, s3]);
        packet.ack = u32::from_be_bytes([a0, a1, a2, a3]);
        packet.transport_header = (offset >> 4) * 4;
        if packet.transport_header() >= TCP_HEADER && packet.transport_header() <= payload {
            return Obstacle::None;
        }
    } else if packet.proto == Protocol::Udp as u8 {
        let Some([a, b, c, d, e, f]) = frame.read::<6>(packet.l4()) else { return Obstacle::Malformed };
        (packet.src_port, packet.dst_port) = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
        packet.transport_header = UDP_HEADER as u8;
        let length = u16::from_be_bytes([e, f]) as u32;
        // The length is that of the whole: of all segments, of all fragments. But the header is in the first.
        let whole = packet.obstacle == Obstacle::FirstFragment || frame.segment_size() != 0;
        if length >= UDP_HEADER && (length <= payload || whole && payload >= UDP_HEADER) {
            return Obstacle::None;
        }
    } else if packet.proto == Protocol::Sctp as u8 {
        return sctp_header(frame, packet, payload);
    } else if packet.obstacle == Obstacle::None && is_icmp_error(frame, packet) {
        return Obstacle::IcmpError;
    } else {
        return Obstacle::Protocol;
    }
    Obstacle::Malformed
}

/// Reads the common header of SCTP and the type of its first chunk; of an INIT ACK also the tag that it asks for.
#[inline(always)]
fn sctp_header<F: Frame>(frame: &mut F, packet: &mut Packet, payload: u32) -> Obstacle {
    let Some(header) = frame.read::<13>(packet.l4()) else { return Obstacle::Malformed };
    let [a, b, c, d, t0, t1, t2, t3, _, _, _, _, chunk] = header;
    (packet.src_port, packet.dst_port) = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
    (packet.flags, packet.seq) = (chunk, u32::from_be_bytes([t0, t1, t2, t3]));
    if packet.obstacle == Obstacle::FirstFragment {
        // What the CRC32c becomes hangs on the length of all fragments.
        return Obstacle::Protocol;
    }
    if chunk == sctp::INIT_ACK {
        let Some(tag) = frame.read::<4>(packet.l4() + SCTP_HEADER) else { return Obstacle::Malformed };
        packet.ack = u32::from_be_bytes(tag);
    }
    if payload >= SCTP_HEADER { Obstacle::None } else { Obstacle::Malformed }
}

/// Whether it is an ICMP error that quotes a packet (RFC 792, RFC 4443).
#[inline(always)]
fn is_icmp_error<F: Frame>(frame: &mut F, packet: &Packet) -> bool {
    let errors = match (packet.proto, packet.is_v4()) {
        (ICMP, true) => ICMP_ERRORS,
        (ICMPV6, false) => ICMPV6_ERRORS,
        _ => return false,
    };
    // Two bytes: the verifier does not follow the comparison that the compiler makes of the bounds of one.
    frame.read::<2>(packet.l4()).is_some_and(|[kind, _]| kind < 32 && errors & 1 << kind != 0)
}

/// Reads the header of the packet that the ICMP error `outer` quotes, and its ports; false if they are not all there.
#[inline(always)]
pub fn quoted<F: Frame>(frame: &mut F, outer: &Packet, quoted: &mut Packet) -> bool {
    if outer.l4 > QUOTING_L4 {
        return false;
    }
    quoted.l3 = outer.l4 + ICMP_HEADER;
    let network = if outer.is_v4() { ipv4(frame, quoted) } else { ipv6(frame, quoted) };
    // That the quoted packet is longer than the quote is no fault of it.
    if network != Some(Follows::Transport) || !is_translatable(quoted.proto) {
        return false;
    }
    let Some([a, b, c, d]) = frame.read::<4>(quoted.l4()) else { return false };
    (quoted.src_port, quoted.dst_port) = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
    quoted.l4() + 4 <= outer.l3() + outer.length
}

/// Whether packets of this protocol begin with ports and are translated.
#[inline(always)]
const fn is_translatable(proto: u8) -> bool {
    proto == Protocol::Tcp as u8 || proto == Protocol::Udp as u8 || proto == Protocol::Sctp as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::sample;
    use crate::frame::slice::SliceFrame;

    fn parsed(mut frame: SliceFrame) -> Option<Packet> {
        let mut packet = Packet::EMPTY;
        parse(&mut frame, &mut packet).then_some(packet)
    }

    #[test]
    fn a_tcp_segment_gives_all_its_numbers() {
        let packet = parsed(sample::tcp(tcp::SYN, b"")).unwrap();
        assert_eq!(packet.src, Addr::from_v4(sample::CLIENT));
        assert_eq!(packet.dst, Addr::from_v4(sample::SERVICE));
        assert_eq!((packet.src_port.number(), packet.dst_port.number()), (40_000, 80));
        assert_eq!((packet.flags, packet.seq, packet.ack), (tcp::SYN, 1_000, 2_000));
        assert_eq!((packet.proto, packet.ttl, packet.length, packet.obstacle), (6, 64, 40, Obstacle::None));
    }

    #[test]
    fn a_frame_that_is_not_ipv4_is_nobodys() {
        let mut arp = sample::udp(b"x", true);
        arp.bytes[13] = 6;
        assert_eq!(parsed(arp), None);
        assert_eq!(parsed(SliceFrame::new([0; 13])), None);
        let mut short = sample::udp(b"x", true);
        short.bytes.truncate(33);
        assert_eq!(parsed(short), None);
    }

    #[test]
    fn what_stands_in_the_way_is_said_and_the_ports_are_still_read() {
        let obstacle = |change: &dyn Fn(&mut SliceFrame)| {
            let mut frame = sample::udp(b"0123456789", true);
            change(&mut frame);
            let packet = parsed(frame).unwrap();
            (packet.obstacle, packet.dst_port.number())
        };
        assert_eq!(obstacle(&|_| {}), (Obstacle::None, 80));
        assert_eq!(obstacle(&|frame| frame.bytes[20] = 0x20), (Obstacle::FirstFragment, 80));
        assert_eq!(
            obstacle(&|frame| frame.bytes[21] = 1),
            (Obstacle::LaterFragment, 0),
            "a later fragment has no ports"
        );
        assert_eq!(
            obstacle(&|frame| frame.bytes[14] = 0x44),
            (Obstacle::Malformed, 80),
            "a header of 16 bytes"
        );
        assert_eq!(
            obstacle(&|frame| frame.bytes[17] += 1),
            (Obstacle::Malformed, 80),
            "longer than the frame"
        );
        assert_eq!(obstacle(&|frame| frame.bytes[39] = 7), (Obstacle::Malformed, 80), "a UDP length under 8");
        assert_eq!(
            obstacle(&|frame| frame.bytes[39] = 19),
            (Obstacle::Malformed, 80),
            "a UDP length past the end"
        );
        assert_eq!(obstacle(&|frame| frame.bytes[23] = 47), (Obstacle::Protocol, 0), "GRE has no ports");
        assert_eq!(obstacle(&|frame| frame.bytes.truncate(36)), (Obstacle::Malformed, 0));
    }

    #[test]
    fn an_ipv6_segment_gives_all_its_numbers() {
        let family = sample::Family::V6;
        let packet = parsed(family.tcp(tcp::SYN, b"")).unwrap();
        assert_eq!((packet.src, packet.dst), (family.client(), family.service()));
        assert_eq!((packet.src_port.number(), packet.dst_port.number()), (40_000, 80));
        assert_eq!((packet.flags, packet.seq, packet.ack), (tcp::SYN, 1_000, 2_000));
        assert_eq!((packet.proto, packet.ttl, packet.length, packet.obstacle), (6, 64, 60, Obstacle::None));
    }

    #[test]
    fn nothing_of_the_packet_before_is_left() {
        let mut packet = Packet::EMPTY;
        assert!(parse(&mut sample::Family::V6.tcp(tcp::SYN, b""), &mut packet));
        assert_eq!(packet.transport_header(), TCP_HEADER);
        let mut gre = sample::udp(b"", true);
        gre.bytes[23] = 47;
        assert!(parse(&mut gre, &mut packet));
        assert_eq!((packet.transport_header(), packet.flags, packet.src_port), (0, 0, Port::ANY));
    }

    #[test]
    fn an_ipv6_packet_with_a_mapped_address_is_nobodys() {
        for at in [22, 38] {
            let mut frame = sample::Family::V6.udp(b"x", true);
            frame.bytes[at..at + 16].copy_from_slice(Addr::from_v4(sample::SERVICE).bytes());
            assert_eq!(parsed(frame), None, "it would be taken for an IPv4 packet");
        }
    }

    #[test]
    fn the_transport_header_behind_options_is_found() {
        let mut frame = sample::udp(b"", true);
        (frame.bytes[14], frame.bytes[17]) = (0x46, 32);
        frame.bytes.splice(34..34, [1, 1, 1, 1]);
        let packet = parsed(frame).unwrap();
        assert_eq!((packet.obstacle, packet.dst_port.number(), packet.l4()), (Obstacle::None, 80, 38));
    }

    /// What comes of an IPv6 datagram with these headers before the UDP header: each the first byte of its own, which is
    /// filled in here, and the rest.
    fn behind(headers: &[(u8, &[u8])]) -> (Obstacle, u16) {
        let mut frame = sample::Family::V6.udp(b"0123456789", true);
        let mut bytes = std::vec::Vec::new();
        let numbers: std::vec::Vec<u8> = headers.iter().map(|(number, _)| *number).chain([17]).collect();
        for (at, (_, rest)) in headers.iter().enumerate() {
            bytes.push(numbers[at + 1]);
            bytes.extend(*rest);
        }
        frame.bytes[20] = numbers[0];
        frame.bytes[19] += bytes.len() as u8;
        frame.bytes.splice(54..54, bytes);
        let packet = parsed(frame).unwrap();
        (packet.obstacle, packet.dst_port.number())
    }

    #[test]
    fn the_transport_header_behind_extension_headers_is_found() {
        // P21.
        let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
        let routing: &[u8] = &[0, 4, 0, 0, 0, 0, 0];
        let (longer, longest) = ([&[1][..], &[0; 14]].concat(), [&[15][..], &[0; 126]].concat());
        assert_eq!(behind(&[(0, options)]), (Obstacle::None, 80));
        assert_eq!(
            behind(&[(0, options), (60, &longer), (43, routing), (60, options)]),
            (Obstacle::None, 80)
        );
        assert_eq!(behind(&[(60, &longest)]), (Obstacle::None, 80), "128 bytes");
        assert_eq!(behind(&[(60, &longest), (0, options)]), (Obstacle::Extensions, 0), "136 bytes");
        assert_eq!(behind(&[(0, options); 5]), (Obstacle::Extensions, 0), "five headers");
        assert_eq!(behind(&[(43, &[0, 2, 1, 0, 0, 0, 0])]), (Obstacle::Extensions, 0), "segments left");
    }

    #[test]
    fn fragments_of_ipv6_are_told_apart() {
        // RFC 8200 section 4.5; RFC 6946: a fragment that is the whole packet is none.
        let fragment = |high: u8, low: u8| behind(&[(44, &[0, high, low, 0, 0, 0, 9])]);
        assert_eq!(fragment(0, 0), (Obstacle::None, 80));
        assert_eq!(fragment(0, 1), (Obstacle::FirstFragment, 80), "the first");
        assert_eq!(fragment(0, 8), (Obstacle::LaterFragment, 0), "a later one has no ports");
        assert_eq!(fragment(1, 1), (Obstacle::LaterFragment, 0));
        let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
        assert_eq!(behind(&[(44, &[0, 0, 1, 0, 0, 0, 9]), (60, options)]), (Obstacle::FirstFragment, 80));
        let first: &[u8] = &[0, 0, 1, 0, 0, 0, 9];
        let many = [(44, first), (60, options), (60, options), (60, options), (60, options)];
        assert_eq!(behind(&many), (Obstacle::Extensions, 0), "more headers than are followed");
    }

    #[test]
    fn a_first_fragment_has_the_transport_header() {
        // P20: what lies behind its end is padding, not its header.
        for (length, obstacle) in [(27, Obstacle::Malformed), (28, Obstacle::FirstFragment)] {
            let mut frame = sample::udp(b"0123456789", true);
            (frame.bytes[17], frame.bytes[20]) = (length, 0x20);
            assert_eq!(parsed(frame).unwrap().obstacle, obstacle);
        }
    }

    #[test]
    fn what_is_cut_short_in_an_ipv6_packet_is_said() {
        let obstacle = |change: &dyn Fn(&mut SliceFrame)| {
            let mut frame = sample::Family::V6.udp(b"0123456789", true);
            change(&mut frame);
            let packet = parsed(frame).unwrap();
            (packet.obstacle, packet.dst_port.number())
        };
        assert_eq!(
            obstacle(&|frame| frame.bytes[19] += 1),
            (Obstacle::Malformed, 80),
            "longer than the frame"
        );
        assert_eq!(obstacle(&|frame| frame.bytes[59] = 7), (Obstacle::Malformed, 80), "a UDP length under 8");
        assert_eq!(obstacle(&|frame| frame.bytes.truncate(56)), (Obstacle::Malformed, 0));
        assert_eq!(obstacle(&|frame| frame.bytes[20] = 59), (Obstacle::Protocol, 0), "no next header");
        let cut = |frame: &mut SliceFrame| {
            frame.bytes[20] = 60;
            frame.bytes.truncate(56);
        };
        assert_eq!(obstacle(&cut), (Obstacle::Malformed, 0));
        let short = |frame: &mut SliceFrame| (frame.bytes[20], frame.bytes[55]) = (60, 14);
        assert_eq!(obstacle(&short).0, Obstacle::Malformed, "a header past the end");
    }

    #[test]
    fn link_padding_is_not_part_of_the_packet() {
        let mut frame = sample::udp(b"", true);
        frame.bytes.resize(60, 0);
        let packet = parsed(frame).unwrap();
        assert_eq!((packet.length, packet.obstacle), (28, Obstacle::None));
    }
}
