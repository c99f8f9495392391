//! Addresses by kind, and ranges of them.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// A range of addresses, such as `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    address: IpAddr,
    length: u8,
}

impl Range {
    /// A single address.
    pub const fn one(address: IpAddr) -> Self {
        Self { address, length: if address.is_ipv6() { 128 } else { 32 } }
    }

    /// How many leading bits are given.
    pub const fn length(&self) -> u8 {
        self.length
    }

    /// Whether it is a range of IPv6 addresses.
    pub const fn is_v6(&self) -> bool {
        self.address.is_ipv6()
    }

    /// Whether an address lies in the range. Never, if it is of the other family.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.address.is_ipv6() == ip.is_ipv6()
            && bits(self.address)
                .into_iter()
                .zip(bits(ip))
                .take(usize::from(self.length))
                .all(|(a, b)| a == b)
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is no range");
        let (address, length) = text.trim().split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let length: u8 = length.parse().map_err(|_| wrong())?;
        if length > if address.is_ipv6() { 128 } else { 32 } {
            return Err(wrong());
        }
        Ok(Self { address, length })
    }
}

/// The bits of an address, the first first.
fn bits(ip: IpAddr) -> Vec<bool> {
    let bytes = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte & (0x80 >> bit) != 0)).collect()
}

/// Multicast, or the broadcast address of all networks.
pub fn is_multicast_or_broadcast(ip: IpAddr) -> bool {
    ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST)
}

/// Loopback, link-local, multicast, broadcast or unspecified: what Z1 and Z2 name.
pub fn is_nobodys(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    ip.is_loopback() || link_local || is_multicast_or_broadcast(ip) || ip.is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_what_begins_with_its_bits() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let range: Range = " 10.96.0.0/12 ".parse().unwrap();
        assert!(range.contains(ip("10.111.255.255")) && !range.contains(ip("10.112.0.0")));
        let all: Range = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains(ip("1.2.3.4")) && !all.contains(ip("::1")));
        assert!("10.0.0.0/33".parse::<Range>().is_err());
    }
}
