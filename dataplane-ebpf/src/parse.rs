//! From bytes to a [`Packet`]. The only place, beside `nat` and `reject`, where the two families differ.
//!
//! Parsing never decides: what is wrong with a packet is said in it, and counts only if the packet is ours.

use crate::frame::{ETHERNET, Frame};
use dataplane_common::{Addr, Port, Protocol};

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const IPV4_HEADER: u32 = 20;
const TCP_HEADER: u32 = 20;
const UDP_HEADER: u32 = 8;

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

/// What stands in the way of translating a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Obstacle {
    /// Nothing.
    None,
    /// It is a fragment.
    Fragment,
    /// It has IP options.
    Options,
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
    /// TCP flags; 0 otherwise.
    pub flags: u8,
    /// Time to live.
    pub ttl: u8,
    /// What stands in the way of translating it.
    pub obstacle: Obstacle,
    /// TCP sequence number, host order.
    pub seq: u32,
    /// TCP acknowledgement number, host order.
    pub ack: u32,
    /// Bytes from the network header to the packet's end, link padding not counted.
    pub length: u32,
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
    };

    /// Whether the TCP flags in `mask` are exactly `wanted`.
    #[inline(always)]
    pub const fn tcp(&self, mask: u8, wanted: u8) -> bool {
        self.proto == Protocol::Tcp as u8 && self.flags & mask == wanted
    }

    /// Offset of the network header. A constant, which the verifier can follow.
    #[inline(always)]
    pub const fn l3(&self) -> u32 {
        ETHERNET
    }

    /// Offset of the transport header, where no obstacle is in the way.
    #[inline(always)]
    pub const fn l4(&self) -> u32 {
        self.l3() + IPV4_HEADER
    }

    /// Offset of the transport checksum.
    #[inline(always)]
    pub const fn checksum_offset(&self) -> u32 {
        self.l4() + if self.proto == Protocol::Tcp as u8 { 16 } else { 6 }
    }
}

/// Reads the headers of the packet in `frame`; false if it is not IP, or too short to say.
#[inline(always)]
pub fn parse<F: Frame>(frame: &mut F, packet: &mut Packet) -> bool {
    frame.read::<2>(ETHERNET - 2) == Some(ETHERTYPE_IPV4) && ipv4(frame, packet).is_some()
}

#[inline(always)]
fn ipv4<F: Frame>(frame: &mut F, packet: &mut Packet) -> Option<()> {
    let [version_ihl, _, len0, len1, _, _, frag0, frag1, ttl, proto, _, _] = frame.read::<12>(ETHERNET)?;
    let [s0, s1, s2, s3, d0, d1, d2, d3] = frame.read::<8>(ETHERNET + 12)?;
    if version_ihl >> 4 != 4 {
        return None;
    }
    (packet.src, packet.dst) = (Addr::from_v4([s0, s1, s2, s3]), Addr::from_v4([d0, d1, d2, d3]));
    (packet.src_port, packet.dst_port) = (Port::ANY, Port::ANY);
    (packet.proto, packet.ttl, packet.flags) = (proto, ttl, 0);
    let header_length = ((version_ihl & 0x0f) as u32) * 4;
    let available = frame.length() - ETHERNET;
    packet.length = u16::from_be_bytes([len0, len1]) as u32;
    if packet.length == 0 && frame.segment_size() != 0 {
        // A segment train longer than the field can say ("BIG TCP").
        packet.length = available;
    }
    // Bit 13 says that more fragments follow, the lower 13 bits where this one begins (RFC 791 section 3.1).
    let more_fragments = frag0 & 0x20 != 0;
    let later_fragment = frag0 & 0x1f != 0 || frag1 != 0;
    packet.obstacle = Obstacle::None;
    if later_fragment {
        packet.obstacle = Obstacle::Fragment;
        return Some(());
    }
    if header_length > IPV4_HEADER {
        packet.obstacle = Obstacle::Options;
        ports_behind_options(frame, packet, header_length);
        return Some(());
    }
    transport(frame, packet);
    if header_length < IPV4_HEADER || packet.length < header_length || packet.length > available {
        packet.obstacle = Obstacle::Malformed;
    } else if more_fragments {
        packet.obstacle = Obstacle::Fragment;
    }
    Some(())
}

/// Reads ports, flags and numbers of a transport header right behind the network header.
#[inline(always)]
fn transport<F: Frame>(frame: &mut F, packet: &mut Packet) {
    let payload = packet.length.saturating_sub(packet.l4() - packet.l3());
    packet.obstacle = Obstacle::Malformed;
    if packet.proto == Protocol::Tcp as u8 {
        let Some(header) = frame.read::<14>(packet.l4()) else { return };
        let [a, b, c, d, s0, s1, s2, s3, a0, a1, a2, a3, offset, flags] = header;
        (packet.src_port, packet.dst_port) = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
        packet.flags = flags;
        packet.seq = u32::from_be_bytes([s0, s1, s2, s3]);
        packet.ack = u32::from_be_bytes([a0, a1, a2, a3]);
        let header_length = ((offset >> 4) as u32) * 4;
        if header_length >= TCP_HEADER && header_length <= payload {
            packet.obstacle = Obstacle::None;
        }
    } else if packet.proto == Protocol::Udp as u8 {
        let Some([a, b, c, d, e, f]) = frame.read::<6>(packet.l4()) else { return };
        (packet.src_port, packet.dst_port) = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
        let length = u16::from_be_bytes([e, f]) as u32;
        if length >= UDP_HEADER && (length <= payload || frame.segment_size() != 0) {
            packet.obstacle = Obstacle::None;
        }
    } else {
        packet.obstacle = Obstacle::Protocol;
    }
}

/// Reads the ports behind IPv4 options, only to tell whether the packet is ours.
#[inline(always)]
fn ports_behind_options<F: Frame>(frame: &mut F, packet: &mut Packet, header_length: u32) {
    if packet.proto != Protocol::Tcp as u8 && packet.proto != Protocol::Udp as u8 {
        return;
    }
    // At most 60 bytes: the mask tells the verifier what the four bits of the field already promise.
    let l4 = ETHERNET + (header_length & 0x3c);
    if let Some([a, b, c, d]) = frame.read::<4>(l4) {
        (packet.src_port, packet.dst_port) = (Port::from_bytes([a, b]), Port::from_bytes([c, d]));
    }
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
        assert_eq!(obstacle(&|frame| frame.bytes[20] = 0x20), (Obstacle::Fragment, 80));
        assert_eq!(
            obstacle(&|frame| frame.bytes[21] = 1),
            (Obstacle::Fragment, 0),
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
    fn ports_behind_options_are_found() {
        let mut frame = sample::udp(b"", true);
        frame.bytes[14] = 0x46;
        frame.bytes.splice(34..34, [1, 1, 1, 1]);
        let packet = parsed(frame).unwrap();
        assert_eq!((packet.obstacle, packet.dst_port.number()), (Obstacle::Options, 80));
    }

    #[test]
    fn link_padding_is_not_part_of_the_packet() {
        let mut frame = sample::udp(b"", true);
        frame.bytes.resize(60, 0);
        let packet = parsed(frame).unwrap();
        assert_eq!((packet.length, packet.obstacle), (28, Obstacle::None));
    }
}
