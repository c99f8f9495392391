//! The filter in front of the hash tables: one bit per hash of an address, port and protocol.
//!
//! A clear bit proves that a tuple is in no table; a set bit proves nothing. The agent sets a bit before it adds an
//! entry and clears it only when no entry and no flow needs it any more. The filter of replies, `callers`, is marked by programs.

use crate::{Addr, Port};

/// How many bits the filter has, as a power of two: 2^21 bits are 256 KiB, about 7 % full with 150,000 entries.
pub const FILTER_BITS_LOG2: u32 = 21;

/// How many 64-bit words the `filter` array has.
pub const FILTER_WORDS: usize = 1 << (FILTER_BITS_LOG2 - 6);

/// A bit of the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FilterBit(u32);

/// What a tuple with a port stands for; keeps apart tuples that are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Purpose {
    NodePort = 1,
    Backend = 2,
}

impl FilterBit {
    /// The bit of an address that Services have, whatever the port: ClusterIPs, LB IPs and external IPs.
    #[inline(always)]
    pub fn service_address(addr: &Addr) -> Self {
        Self(mix(addr, 0) & !1)
    }

    /// The bit of an address of this node: the neighbour of [`FilterBit::service_address`], in the same word.
    #[inline(always)]
    pub fn node_address(addr: &Addr) -> Self {
        Self(mix(addr, 0) | 1)
    }

    /// The bit of a node port on one of the node's addresses.
    #[inline(always)]
    pub fn node_port(addr: &Addr, port: Port, proto: u8) -> Self {
        Self::tuple(Purpose::NodePort, addr, port, proto)
    }

    /// The bit of a backend: where packets of endpoints come from.
    #[inline(always)]
    pub fn backend(addr: &Addr, port: Port, proto: u8) -> Self {
        Self::tuple(Purpose::Backend, addr, port, proto)
    }

    #[inline(always)]
    fn tuple(purpose: Purpose, addr: &Addr, port: Port, proto: u8) -> Self {
        let port = u16::from_ne_bytes(port.bytes()) as u64;
        Self(mix(addr, (purpose as u64) << 24 | port << 8 | proto as u64))
    }

    /// Index of the word that holds it.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0 >> 6
    }

    /// Its mask within that word.
    #[inline(always)]
    pub const fn mask(self) -> u64 {
        1 << (self.0 & 63)
    }
}

/// How many cells the filter of replies has, as a power of two: 256 KiB.
const CALLER_CELLS_LOG2: u32 = 15;

/// How many 64-bit cells the `callers` array has.
pub const CALLER_CELLS: usize = 1 << CALLER_CELLS_LOG2;

/// The cell of `callers` for what is sent to `addr`: the tick at which a flow whose replies go there was last begun
/// ([`caller_mark`]), 0 if none is in the table.
///
/// A cell that is 0 proves that no packet to the address is a reply of a flow; any other proves nothing.
#[inline(always)]
pub fn caller_cell(addr: &Addr, proto: u8) -> u32 {
    mix(addr, proto as u64) >> (FILTER_BITS_LOG2 - CALLER_CELLS_LOG2)
}

/// What a cell of `callers` holds after a flow was begun at `tick`: never 0.
#[inline(always)]
pub const fn caller_mark(tick: u32) -> u64 {
    1 << 32 | tick as u64
}

/// The tick of a mark in `callers`.
#[inline(always)]
pub const fn caller_tick(mark: u64) -> u32 {
    mark as u32
}

/// Mixes an address and 32 bits into the number of a bit: two multiplications (after splitmix64, Steele, Lea and Flood
/// 2014), a few cycles, no table.
#[inline(always)]
fn mix(addr: &Addr, tail: u64) -> u32 {
    let [high, low] = addr.words();
    // The bytes that differ between IPv4 addresses move to the lower half, from where a multiplication spreads them.
    let mut h = low.rotate_left(32) ^ high.rotate_left(11) ^ tail << 32;
    h = h.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h = (h ^ (h >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (h >> (64 - FILTER_BITS_LOG2)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn neighbouring_tuples_spread_over_the_filter() {
        let mut bits = HashSet::new();
        for host in 0..=255u8 {
            for port in 0..64u16 {
                bits.insert(FilterBit::backend(&Addr::from_v4([10, 96, 0, host]), Port::new(8000 + port), 6));
            }
        }
        // 16,384 tuples into 2^21 bits: a random spread loses about 64 to collisions.
        assert!(bits.len() > 16_384 - 128, "{}", bits.len());
        assert!(bits.iter().all(|bit| (bit.word() as usize) < FILTER_WORDS));
    }
    #[test]
    fn neighbouring_addresses_of_both_families_spread_over_the_filter() {
        let v4 = (0..=u16::MAX).map(|host| Addr::from_v4([10, 96, (host >> 8) as u8, host as u8]));
        let v6 = (0..=u16::MAX).map(|host| {
            let [a, b] = host.to_be_bytes();
            Addr::from_bytes([0xfd, 0, 0, 0x10, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, a, b])
        });
        for addresses in [v4.collect::<std::vec::Vec<_>>(), v6.collect()] {
            let bits: HashSet<_> = addresses.iter().map(FilterBit::service_address).collect();
            // 65,536 addresses into 2^20 pairs: a random spread loses about 2,000 to collisions.
            assert!(bits.len() > 65_536 - 3_000, "{}", bits.len());
        }
    }

    #[test]
    fn both_bits_of_an_address_lie_in_one_word() {
        let addr = Addr::from_v4([192, 0, 2, 1]);
        let (service, node) = (FilterBit::service_address(&addr), FilterBit::node_address(&addr));
        assert_eq!(service.word(), node.word());
        assert_ne!(service.mask(), node.mask());
    }
}
