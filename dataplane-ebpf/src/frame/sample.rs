//! Packets for the tests on the host.

use super::slice::SliceFrame;
use dataplane_common::checksum::Sum;
use std::vec::Vec;

/// Client of the sample packets.
pub(crate) const CLIENT: [u8; 4] = [192, 0, 2, 7];
/// Destination of the sample packets.
pub(crate) const SERVICE: [u8; 4] = [10, 96, 0, 1];

/// An Ethernet frame around an IPv4 packet from [`CLIENT`] port 40,000 to [`SERVICE`] port 80, checksums complete.
pub(crate) fn ipv4(proto: u8, transport: &[u8]) -> SliceFrame {
    let mut bytes = std::vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    let length = 20 + transport.len() as u16;
    let mut header = std::vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, proto, 0, 0];
    header[2..4].copy_from_slice(&length.to_be_bytes());
    header.extend(CLIENT);
    header.extend(SERVICE);
    let checksum = Sum::default().plus(&header).checksum();
    header[10..12].copy_from_slice(&checksum);
    bytes.extend(header);
    bytes.extend(transport);
    SliceFrame::new(bytes)
}

/// A TCP segment with these flags, sequence number 1,000 and acknowledgement number 2,000.
pub(crate) fn tcp(flags: u8, data: &[u8]) -> SliceFrame {
    let mut segment =
        std::vec![0x9c, 0x40, 0, 80, 0, 0, 0x03, 0xe8, 0, 0, 0x07, 0xd0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    segment.extend(data);
    let checksum = pseudo(6, &segment).plus(&segment).checksum();
    segment[16..18].copy_from_slice(&checksum);
    ipv4(6, &segment)
}

/// A UDP datagram, with a checksum or with none.
pub(crate) fn udp(data: &[u8], checksum: bool) -> SliceFrame {
    let mut datagram = std::vec![0x9c, 0x40, 0, 80, 0, 0, 0, 0];
    datagram.extend(data);
    let length = (datagram.len() as u16).to_be_bytes();
    datagram[4..6].copy_from_slice(&length);
    if checksum {
        let checksum = pseudo(17, &datagram).plus(&datagram).checksum();
        datagram[6..8].copy_from_slice(&checksum);
    }
    ipv4(17, &datagram)
}

/// Whether the network header and the transport segment of an IPv4 packet without options sum right.
pub(crate) fn sums_right(frame: &SliceFrame) -> bool {
    let packet = &frame.bytes[14..];
    let (header, segment) = packet.split_at(20);
    let mut pseudo: Vec<u8> = header[12..20].to_vec();
    pseudo.extend([0, header[9]]);
    pseudo.extend((segment.len() as u16).to_be_bytes());
    let sum = if header[9] == 1 { Sum::default() } else { Sum::default().plus(&pseudo) };
    Sum::default().plus(header).fold() == 0xffff && sum.plus(segment).fold() == 0xffff
}

fn pseudo(proto: u8, segment: &[u8]) -> Sum {
    let [high, low] = (segment.len() as u16).to_be_bytes();
    Sum::default().plus(&CLIENT).plus(&SERVICE).plus(&[0, proto, high, low])
}
