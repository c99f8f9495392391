//! Packets for the tests on the host.

use super::slice::SliceFrame;
use dataplane_common::Addr;
use dataplane_common::checksum::Sum;
use std::vec::Vec;

/// Client of the sample packets.
pub(crate) const CLIENT: [u8; 4] = [192, 0, 2, 7];
/// Destination of the sample packets.
pub(crate) const SERVICE: [u8; 4] = [10, 96, 0, 1];

/// The families of the sample packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// Both families.
pub(crate) const BOTH: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    /// Client of the sample packets.
    pub(crate) fn client(self) -> Addr {
        self.addr(CLIENT)
    }

    /// Destination of the sample packets.
    pub(crate) fn service(self) -> Addr {
        self.addr(SERVICE)
    }

    /// An IPv4 address, or the IPv6 address that ends in the same bytes.
    pub(crate) fn addr(self, [a, b, c, d]: [u8; 4]) -> Addr {
        match self {
            Self::V4 => Addr::from_v4([a, b, c, d]),
            Self::V6 => Addr::from_bytes([0x20, 1, 0xd, 0xb8, 0xff, 0xff, 0, 1, 0, 2, 0, 3, a, b, c, d]),
        }
    }

    /// Bytes of the network header.
    pub(crate) const fn header(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }

    /// Offset of the transport header.
    pub(crate) const fn l4(self) -> usize {
        14 + self.header()
    }

    /// The address as it stands in a packet.
    fn wire(self, addr: Addr) -> Vec<u8> {
        match self {
            Self::V4 => addr.v4_octets().to_vec(),
            Self::V6 => addr.bytes().to_vec(),
        }
    }

    fn pseudo(self, proto: u8, length: usize) -> Sum {
        let [high, low] = (length as u16).to_be_bytes();
        Sum::default()
            .plus(&self.wire(self.client()))
            .plus(&self.wire(self.service()))
            .plus(&[0, proto, high, low])
    }

    /// An Ethernet frame around a packet from [`Family::client`] port 40,000 to [`Family::service`] port 80, checksums complete.
    fn packet(self, proto: u8, transport: &[u8]) -> SliceFrame {
        let mut bytes = std::vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        let [high, low] = (transport.len() as u16).to_be_bytes();
        match self {
            Self::V4 => {
                let [h, l] = (20 + transport.len() as u16).to_be_bytes();
                let mut header = std::vec![0x45, 0, h, l, 0, 1, 0x40, 0, 64, proto, 0, 0];
                header.extend(CLIENT);
                header.extend(SERVICE);
                let checksum = Sum::default().plus(&header).checksum();
                header[10..12].copy_from_slice(&checksum);
                bytes.extend([8, 0]);
                bytes.extend(header);
            }
            Self::V6 => {
                bytes.extend([0x86, 0xdd, 0x61, 2, 3, 4, high, low, proto, 64]);
                bytes.extend(self.client().bytes());
                bytes.extend(self.service().bytes());
            }
        }
        bytes.extend(transport);
        SliceFrame::new(bytes)
    }

    /// A TCP segment with these flags, sequence number 1,000 and acknowledgement number 2,000.
    pub(crate) fn tcp(self, flags: u8, data: &[u8]) -> SliceFrame {
        let mut segment = std::vec![
            0x9c, 0x40, 0, 80, 0, 0, 0x03, 0xe8, 0, 0, 0x07, 0xd0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0
        ];
        segment.extend(data);
        let checksum = self.pseudo(6, segment.len()).plus(&segment).checksum();
        segment[16..18].copy_from_slice(&checksum);
        self.packet(6, &segment)
    }

    /// A UDP datagram, with a checksum or with none.
    pub(crate) fn udp(self, data: &[u8], checksum: bool) -> SliceFrame {
        let mut datagram = std::vec![0x9c, 0x40, 0, 80, 0, 0, 0, 0];
        datagram.extend(data);
        let length = (datagram.len() as u16).to_be_bytes();
        datagram[4..6].copy_from_slice(&length);
        if checksum {
            let checksum = self.pseudo(17, datagram.len()).plus(&datagram).checksum();
            datagram[6..8].copy_from_slice(&checksum);
        }
        self.packet(17, &datagram)
    }
}

/// As [`Family::tcp`] over IPv4.
pub(crate) fn tcp(flags: u8, data: &[u8]) -> SliceFrame {
    Family::V4.tcp(flags, data)
}

/// As [`Family::udp`] over IPv4.
pub(crate) fn udp(data: &[u8], checksum: bool) -> SliceFrame {
    Family::V4.udp(data, checksum)
}

/// Whether the network header and the transport segment sum right, of a packet that has nothing in between.
pub(crate) fn sums_right(frame: &SliceFrame) -> bool {
    const ICMP: u8 = 1;
    let packet = &frame.bytes[14..];
    let v4 = packet[0] >> 4 == 4;
    let (header, segment) = packet.split_at(if v4 { 20 } else { 40 });
    let (proto, addresses) = if v4 { (header[9], &header[12..]) } else { (header[6], &header[8..]) };
    let mut pseudo: Vec<u8> = addresses.to_vec();
    pseudo.extend([0, proto]);
    pseudo.extend((segment.len() as u16).to_be_bytes());
    let sum = if proto == ICMP { Sum::default() } else { Sum::default().plus(&pseudo) };
    (!v4 || Sum::default().plus(header).fold() == 0xffff) && sum.plus(segment).fold() == 0xffff
}
