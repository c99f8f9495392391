//! The packet by which a client opens a connection, as it would come in.

use dataplane_common::checksum::Sum;
use dataplane_common::flow::FlowKey;
use dataplane_common::{Addr, Protocol};
use std::net::{IpAddr, SocketAddr};

/// The payload of a datagram.
const PAYLOAD: &[u8] = b"portolan explain";
const TTL: u8 = 64;

/// The first packet of a connection or a flow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    pub(super) protocol: Protocol,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
}

impl Opening {
    /// Its five-tuple.
    pub(super) fn key(&self) -> FlowKey {
        let end = |end: SocketAddr| (Addr::from(end.ip()), dataplane_common::Port::new(end.port()));
        let ((src, src_port), (dst, dst_port)) = (end(self.from), end(self.to));
        FlowKey::new(src, src_port, dst, dst_port, self.protocol.number())
    }

    /// It as bytes, behind an Ethernet header with these addresses (destination, source) or behind none.
    pub(super) fn bytes(&self, link: Option<[[u8; 6]; 2]>) -> Vec<u8> {
        let transport = self.transport();
        let (kind, network) = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                ([0x08, 0x00], self.ipv4(from.octets(), to.octets(), transport.len()))
            }
            (from, to) => ([0x86, 0xdd], self.ipv6(octets(from), octets(to), transport.len())),
        };
        let mut bytes = Vec::new();
        if let Some(link) = link {
            bytes.extend(link.concat());
            bytes.extend(kind);
        }
        bytes.extend(network);
        bytes.extend(transport);
        bytes
    }

    fn ipv4(&self, from: [u8; 4], to: [u8; 4], payload: usize) -> Vec<u8> {
        let [high, low] = (20 + payload as u16).to_be_bytes();
        let mut header = vec![0x45, 0, high, low, 0, 1, 0x40, 0, TTL, self.protocol.number(), 0, 0];
        header.extend(from);
        header.extend(to);
        let checksum = Sum::default().plus(&header).checksum();
        header[10..12].copy_from_slice(&checksum);
        header
    }

    fn ipv6(&self, from: [u8; 16], to: [u8; 16], payload: usize) -> Vec<u8> {
        let [high, low] = (payload as u16).to_be_bytes();
        let mut header = vec![0x60, 0, 0, 0, high, low, self.protocol.number(), TTL];
        header.extend(from);
        header.extend(to);
        header
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [self.from.port(), self.to.port()].iter().flat_map(|port| port.to_be_bytes()).collect();
        let checksum_at = match self.protocol {
            Protocol::Tcp => {
                // Sequence and acknowledgement number; header length and SYN; window; checksum and urgent pointer.
                bytes.extend([0, 0, 0x10, 0, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
                16
            }
            Protocol::Udp => {
                bytes.extend((8 + PAYLOAD.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(PAYLOAD);
                6
            }
            Protocol::Sctp => {
                // No tag, a checksum that no router looks at, and an INIT chunk of 20 bytes.
                bytes.extend([0; 8]);
                bytes.extend([1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
                return bytes;
            }
        };
        let length = (bytes.len() as u32).to_be_bytes();
        let pseudo = Sum::default()
            .plus(&octets(self.from.ip()))
            .plus(&octets(self.to.ip()))
            .plus(&length)
            .plus(&[0, self.protocol.number()]);
        let checksum = pseudo.plus(&bytes).checksum();
        bytes[checksum_at..checksum_at + 2].copy_from_slice(&checksum);
        bytes
    }
}

/// An IPv4 address in the first four bytes of zeros: they add nothing to a sum.
fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&ip.octets());
            bytes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opening(protocol: Protocol, from: &str, to: &str) -> Opening {
        Opening { protocol, from: from.parse().unwrap(), to: to.parse().unwrap() }
    }

    #[test]
    fn headers_have_right_checksums_and_lengths() {
        let tcp = opening(Protocol::Tcp, "10.0.0.1:40000", "10.96.0.1:80").bytes(None);
        assert_eq!((tcp.len(), &tcp[2..4]), (40, &[0, 40][..]));
        assert_eq!(
            Sum::default().plus(&tcp[..20]).fold(),
            0xffff,
            "a header with its checksum sums to all ones"
        );
        let pseudo = |bytes: &[u8], proto: u8| {
            Sum::default()
                .plus(&bytes[12..20])
                .plus(&[0, proto])
                .plus(&(bytes.len() as u16 - 20).to_be_bytes())
        };
        assert_eq!(pseudo(&tcp, 6).plus(&tcp[20..]).fold(), 0xffff);
        let udp = opening(Protocol::Udp, "10.0.0.1:40000", "10.96.0.1:53").bytes(None);
        assert_eq!(pseudo(&udp, 17).plus(&udp[20..]).fold(), 0xffff);
        let six = opening(Protocol::Sctp, "[fd00::1]:40000", "[fd00::2]:80").bytes(Some([[2; 6], [4; 6]]));
        assert_eq!((six.len(), &six[..6], &six[12..14]), (14 + 40 + 32, &[2; 6][..], &[0x86, 0xdd][..]));
    }
}
