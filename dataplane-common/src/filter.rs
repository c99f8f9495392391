//! The filter in front of the hash tables: one bit per hash of an address, port and protocol.
//!
//! A clear bit proves that a tuple is in no table; a set bit proves nothing. The agent sets a bit before it adds an
//! entry and clears it only when no entry and no flow needs it any more.

use crate::{Addr, Port};

/// How many bits the filter has, as a power of two: 2^21 bits are 256 KiB, about 7 % full with 150,000 entries.
pub const FILTER_BITS_LOG2: u32 = 21;

/// How many 64-bit words the `filter` array has.
pub const FILTER_WORDS: usize = 1 << (FILTER_BITS_LOG2 - 6);

/// A bit of the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FilterBit(u32);

/// What a bit stands for; keeps apart tuples that are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Purpose {
    Frontend = 1,
    Backend = 2,
    NodeAddress = 3,
    ClosedAddress = 4,
}

impl FilterBit {
    /// The bit of a frontend: what packets of clients are addressed to. A node port has one for each node address.
    #[inline(always)]
    pub fn frontend(addr: &Addr, port: Port, proto: u8) -> Self {
        Self::mix(Purpose::Frontend, addr, port, proto)
    }

    /// The bit of a backend: where packets of endpoints come from.
    #[inline(always)]
    pub fn backend(addr: &Addr, port: Port, proto: u8) -> Self {
        Self::mix(Purpose::Backend, addr, port, proto)
    }

    /// The bit of an address of this node.
    #[inline(always)]
    pub fn node_address(addr: &Addr) -> Self {
        Self::mix(Purpose::NodeAddress, addr, Port::ANY, 0)
    }

    /// The bit of a ClusterIP, for the ports that no Service has (P13).
    #[inline(always)]
    pub fn closed_address(addr: &Addr) -> Self {
        Self::mix(Purpose::ClosedAddress, addr, Port::ANY, 0)
    }

    /// A multiply-mix of the words (after splitmix64, Steele, Lea and Flood 2014): a few cycles, no table.
    #[inline(always)]
    fn mix(purpose: Purpose, addr: &Addr, port: Port, proto: u8) -> Self {
        let [high, low] = addr.words();
        let [p, q] = port.bytes();
        let tail = (purpose as u64) << 24 | (p as u64) << 16 | (q as u64) << 8 | proto as u64;
        let mut h = low ^ high.rotate_left(23) ^ tail.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((h >> (64 - FILTER_BITS_LOG2)) as u32)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn neighbouring_tuples_spread_over_the_filter() {
        let mut bits = HashSet::new();
        for host in 0..=255u8 {
            for port in 0..64u16 {
                bits.insert(FilterBit::frontend(
                    &Addr::from_v4([10, 96, 0, host]),
                    Port::new(8000 + port),
                    6,
                ));
            }
        }
        // 16,384 tuples into 2^21 bits: a random spread loses about 64 to collisions.
        assert!(bits.len() > 16_384 - 128, "{}", bits.len());
        assert!(bits.iter().all(|bit| (bit.word() as usize) < FILTER_WORDS));
    }
}
