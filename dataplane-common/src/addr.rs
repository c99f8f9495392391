//! Addresses, ports and protocol numbers as they lie in keys: one shape for both families.

use bytemuck::{Pod, Zeroable};
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address in its IPv4-mapped form `::ffff:a.b.c.d` (RFC 4291 section 2.5.5.2).
///
/// 16 bytes in network order, aligned to 8 so that the kernel side copies and compares it in two words. The last
/// eight bytes hold all that differs between two IPv4 addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Addr {
    octets: [u8; 16],
}

impl Addr {
    /// `::`, the address of no host.
    pub const UNSPECIFIED: Self = Self { octets: [0; 16] };

    /// The address with these 16 bytes in network order.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self { octets: bytes }
    }

    /// The IPv4-mapped form of four bytes in network order.
    #[inline(always)]
    pub const fn from_v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self::from_words([0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])])
    }

    /// The address whose halves lie in memory as these two words. Whole words are written: a processor waits long for a
    /// word that was written in pieces a moment ago.
    #[inline(always)]
    pub const fn from_words(words: [u64; 2]) -> Self {
        bytemuck::must_cast(words)
    }

    /// The 16 bytes in network order.
    #[inline(always)]
    pub const fn bytes(&self) -> &[u8; 16] {
        &self.octets
    }

    /// The two halves as they lie in memory: cheap to mix and compare, meaningless as numbers.
    #[inline(always)]
    pub const fn words(&self) -> [u64; 2] {
        bytemuck::must_cast(self.octets)
    }

    /// The last four bytes: the IPv4 address, if this is one.
    #[inline(always)]
    pub const fn v4_octets(&self) -> [u8; 4] {
        let b = &self.octets;
        [b[12], b[13], b[14], b[15]]
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        let [high, low] = self.words();
        let [_, mapped] = Self::from_v4([0; 4]).words();
        let mask: u64 = bytemuck::cast([0xff, 0xff, 0xff, 0xff, 0u8, 0, 0, 0]);
        high == 0 && low & mask == mapped
    }

    /// Whether it is `0.0.0.0` or `::`.
    #[inline(always)]
    pub fn is_unspecified(&self) -> bool {
        *self == Self::UNSPECIFIED || *self == Self::from_v4([0; 4])
    }

    /// Whether it is in `127.0.0.0/8`, or `::1`.
    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return self.octets[12] == 127;
        }
        let last: u64 = bytemuck::cast([0, 0, 0, 0, 0, 0, 0, 1u8]);
        self.words() == [0, last]
    }

    /// Whether it is in `fe80::/10`.
    #[inline(always)]
    pub fn is_link_local_v6(&self) -> bool {
        self.octets[0] == 0xfe && self.octets[1] & 0xc0 == 0x80
    }

    /// Whether it is in `224.0.0.0/4`, `ff00::/8`, or the limited broadcast address.
    #[inline(always)]
    pub fn is_multicast_or_broadcast(&self) -> bool {
        if self.is_v4() {
            return self.octets[12] & 0xf0 == 0xe0 || self.v4_octets() == [255; 4];
        }
        self.octets[0] == 0xff
    }

    /// The standard library's form, for people and parsers.
    pub const fn to_ip(self) -> IpAddr {
        let v6 = Ipv6Addr::from_octets(self.octets);
        match v6.to_ipv4_mapped() {
            Some(v4) => IpAddr::V4(v4),
            None => IpAddr::V6(v6),
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4(ip.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        Self { octets: ip.octets() }
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_ip(), f)
    }
}

/// A port number in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct Port {
    bytes: [u8; 2],
}

impl Port {
    /// Port 0, which no packet to a Service has: in keys it means "any port".
    pub const ANY: Self = Self { bytes: [0; 2] };

    /// From a number.
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self { bytes: number.to_be_bytes() }
    }

    /// From the two bytes of a header.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 2]) -> Self {
        Self { bytes }
    }

    /// The two bytes as they stand in a header.
    #[inline(always)]
    pub const fn bytes(self) -> [u8; 2] {
        self.bytes
    }

    /// The number.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be_bytes(self.bytes)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.number(), f)
    }
}

/// A transport protocol that a Service port may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocol {
    /// RFC 9293.
    Tcp = 6,
    /// RFC 768.
    Udp = 17,
    /// RFC 9260.
    Sctp = 132,
}

impl Protocol {
    /// The number in the IP header.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl TryFrom<u8> for Protocol {
    type Error = u8;

    /// Gives the number back if it is none of these protocols.
    #[inline(always)]
    fn try_from(number: u8) -> Result<Self, u8> {
        match number {
            6 => Ok(Self::Tcp),
            17 => Ok(Self::Udp),
            132 => Ok(Self::Sctp),
            other => Err(other),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString as _;

    #[test]
    fn an_ipv4_address_is_kept_in_its_mapped_form() {
        let addr = Addr::from(Ipv4Addr::new(10, 96, 0, 1));
        assert!(addr.is_v4());
        assert_eq!(addr.to_string(), "10.96.0.1");
        assert_eq!(addr, Addr::from("::ffff:10.96.0.1".parse::<Ipv6Addr>().unwrap()));
        assert!(!Addr::from("fd00::1".parse::<Ipv6Addr>().unwrap()).is_v4());
    }

    #[test]
    fn special_addresses_of_both_families_are_told_apart() {
        let addr = |s: &str| Addr::from(s.parse::<IpAddr>().unwrap());
        assert!(addr("127.3.2.1").is_loopback() && addr("::1").is_loopback());
        assert!(
            !addr("128.0.0.1").is_loopback() && !addr("::2").is_loopback() && !addr("1::1").is_loopback()
        );
        assert!(addr("0.0.0.0").is_unspecified() && addr("::").is_unspecified());
        assert!(addr("fe80::1").is_link_local_v6() && addr("febf:ffff::1").is_link_local_v6());
        assert!(!addr("fec0::1").is_link_local_v6() && !addr("fd80::1").is_link_local_v6());
        assert!(addr("224.0.0.1").is_multicast_or_broadcast() && addr("ff02::1").is_multicast_or_broadcast());
        assert!(addr("255.255.255.255").is_multicast_or_broadcast());
        assert!(!addr("223.255.255.255").is_multicast_or_broadcast());
    }

    #[test]
    fn a_port_keeps_its_network_order_in_memory() {
        assert_eq!(Port::new(0x1234).bytes(), [0x12, 0x34]);
        assert_eq!(Port::from_bytes([0x75, 0x32]).number(), 30002);
    }
}
