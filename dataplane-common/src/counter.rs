//! Counters of service ports and backends.

use crate::flow::Flow;
use bytemuck::{Pod, Zeroable};

/// How many flows and connected sockets a backend has that did not end: value of `open`. One word, in which each beginning and each end is
/// one atomic addition.
///
/// It is (begun + ended) × 2^32 + (begun − ended), modulo 2^64. So two readings tell how many began and how many ended between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Open(u64);

impl Open {
    /// What one that begins adds.
    pub const BEGUN: u64 = (1 << u32::BITS) + 1;
    /// What one that ends adds.
    pub const ENDED: u64 = (1 << u32::BITS) - 1;

    /// What a word of the table says.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// As it lies in the table.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// How many are open. One that ends before the processor that began it has counted it is none, not minus one.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        let count = self.0 as u32;
        if (count as i32) < 0 { 0 } else { count }
    }

    /// How many began and how many ended since an earlier reading.
    pub const fn since(self, earlier: Self) -> (u32, u32) {
        let difference = self.0.wrapping_sub(earlier.0);
        let more = difference as u32 as i32;
        let both = (difference.wrapping_sub(more as i64 as u64) >> u32::BITS) as u32;
        (both.wrapping_add(more as u32) / 2, both.wrapping_sub(more as u32) / 2)
    }
}

/// Traffic of a service port or a backend: value of `service_traffic` and `backend_traffic`. 40 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Traffic {
    /// Packets from clients.
    pub packets_in: u64,
    /// Their bytes, from the network header on.
    pub bytes_in: u64,
    /// Packets from endpoints.
    pub packets_out: u64,
    /// Their bytes, from the network header on.
    pub bytes_out: u64,
    /// Flows begun, by packet or at connect time.
    pub new_flows: u64,
}

impl Traffic {
    /// What is counted in a half of a flow and in no total yet.
    pub fn of_half(flow: &Flow) -> Self {
        let (packets, bytes) = (flow.counted.packets(), flow.counted.bytes());
        if flow.has(Flow::REPLY) {
            Self { packets_out: packets, bytes_out: bytes, ..Self::default() }
        } else {
            Self { packets_in: packets, bytes_in: bytes, ..Self::default() }
        }
    }
}

impl core::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.packets_in += other.packets_in;
        self.bytes_in += other.bytes_in;
        self.packets_out += other.packets_out;
        self.bytes_out += other.bytes_out;
        self.new_flows += other.new_flows;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_says_how_many_are_open_and_two_what_happened_between() {
        let mut word = 0_u64;
        let mut add = |number: u32, what: u64| {
            word = word.wrapping_add(what.wrapping_mul(number.into()));
            Open::from_word(word)
        };
        let first = add(7, Open::BEGUN);
        let second = add(5, Open::ENDED);
        assert_eq!((first.count(), second.count(), second.since(first)), (7, 2, (0, 5)));
        let third = add(9, Open::BEGUN);
        assert_eq!((third.count(), third.since(first), third.since(third)), (11, (9, 5), (0, 0)));
        // More ended than began so far: the others are on their way.
        let below = add(12, Open::ENDED);
        assert_eq!((below.count(), below.since(third)), (0, (0, 12)));
        assert_eq!((add(1, Open::BEGUN).count(), add(3, Open::BEGUN).count()), (0, 3));
    }

    #[test]
    fn what_happened_is_told_after_the_word_has_wrapped() {
        let early = Open::from_word(u64::MAX - 3);
        let late = Open::from_word(early.word().wrapping_add(Open::BEGUN * 3).wrapping_add(Open::ENDED * 8));
        assert_eq!(late.since(early), (3, 8));
    }
}
