//! The filter in front of the hash tables: how often each bit is needed, and which bits linger.
//!
//! A bit that no table needs any more is not cleared at once, for packets of established flows must still pass the
//! filter. It lingers until a sweep of the flow tables finds no flow that needs it.

use super::{Op, REST};
use dataplane_common::filter::{FILTER_WORDS, FilterBit};
use dataplane_common::flow::FlowKey;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Instant;

/// A bit's place in the whole filter.
type Place = u32;

fn place(bit: FilterBit) -> Place {
    bit.word() * u64::BITS + bit.mask().trailing_zeros()
}

fn word_and_mask(place: Place) -> (u32, u64) {
    (place / u64::BITS, 1 << (place % u64::BITS))
}

/// What the filter holds and why.
#[derive(Debug)]
pub(super) struct Filter {
    words: Vec<u64>,
    counts: HashMap<Place, u32>,
    lingering: HashMap<Place, Instant>,
    /// Words that the kernel does not have yet.
    changed: BTreeSet<u32>,
}

impl Filter {
    /// The filter that the kernel holds; nothing is known to need its bits.
    pub(super) fn new(words: impl IntoIterator<Item = (u32, u64)>) -> Self {
        let mut filter = Self {
            words: vec![0; FILTER_WORDS],
            counts: HashMap::new(),
            lingering: HashMap::new(),
            changed: BTreeSet::new(),
        };
        for (word, bits) in words {
            if let Some(to) = filter.words.get_mut(word as usize) {
                *to = bits;
            }
        }
        filter
    }

    /// One more entry needs the bit.
    pub(super) fn add(&mut self, bit: FilterBit) {
        let place = place(bit);
        *self.counts.entry(place).or_insert(0) += 1;
        self.lingering.remove(&place);
        let word = &mut self.words[bit.word() as usize];
        if *word & bit.mask() == 0 {
            *word |= bit.mask();
            self.changed.insert(bit.word());
        }
    }

    /// One entry less needs the bit. It lingers if that was the last.
    pub(super) fn remove(&mut self, bit: FilterBit, now: Instant) {
        let place = place(bit);
        if let Some(count) = self.counts.get_mut(&place) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&place);
                self.lingering.insert(place, now);
            }
        }
    }

    /// From now on every set bit that nothing needs lingers: bits of tables that an earlier agent wrote.
    pub(super) fn linger_unknown(&mut self, now: Instant) {
        for (word, bits) in (0..).zip(&self.words) {
            let mut bits = *bits;
            while bits != 0 {
                let place = word * u64::BITS + bits.trailing_zeros();
                bits &= bits - 1;
                if !self.counts.contains_key(&place) {
                    self.lingering.entry(place).or_insert(now);
                }
            }
        }
    }

    /// Bits that linger since before every program that runs now began.
    pub(super) fn lingering(&self, now: Instant) -> LingeringBits {
        let rested = |since: &Instant| now.saturating_duration_since(*since) >= REST;
        LingeringBits(self.lingering.iter().filter(|(_, since)| rested(since)).map(|(bit, _)| *bit).collect())
    }

    /// Clears those bits that still linger.
    pub(super) fn clear(&mut self, bits: &LingeringBits) {
        for &place in &bits.0 {
            if self.lingering.remove(&place).is_some() {
                let (word, mask) = word_and_mask(place);
                self.words[word as usize] &= !mask;
                self.changed.insert(word);
            }
        }
    }

    /// The ops that bring the kernel's filter up to date.
    pub(super) fn take_ops(&mut self) -> Vec<Op> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|word| Op::Filter(word, self.words[word as usize])).collect()
    }

    /// Compares with what the kernel holds; words that differ are written with the next ops. Returns how many.
    pub(super) fn compare(&mut self, kernel: &[u64]) -> usize {
        let differing = (0..).zip(self.words.iter().zip(kernel)).filter(|(_, (a, b))| a != b);
        let differing: Vec<u32> = differing.map(|(word, _)| word).collect();
        self.changed.extend(&differing);
        differing.len()
    }
}

/// Filter bits that no table needs any more; a flow may.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LingeringBits(HashSet<Place>);

impl LingeringBits {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes those bits out that packets of the flow must find set.
    pub fn keep_for(&mut self, key: &FlowKey) {
        if self.0.is_empty() {
            return;
        }
        let needed = [
            FilterBit::service_address(&key.dst),
            FilterBit::node_port(&key.dst, key.dst_port, key.proto()),
            FilterBit::backend(&key.src, key.src_port, key.proto()),
            FilterBit::node_address(&key.dst),
        ];
        for bit in needed {
            self.0.remove(&place(bit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane_common::{Addr, Port};

    const CLIENT: Addr = Addr::from_v4([10, 0, 0, 9]);
    const CLUSTER_IP: Addr = Addr::from_v4([10, 96, 0, 1]);

    #[test]
    fn a_bit_stays_while_an_entry_or_a_flow_needs_it() {
        let (bit, now) = (FilterBit::service_address(&CLUSTER_IP), Instant::now());
        let mut filter = Filter::new([]);
        filter.add(bit);
        filter.add(bit);
        assert_eq!(filter.take_ops(), [Op::Filter(bit.word(), bit.mask())]);
        filter.remove(bit, now);
        assert!(filter.lingering(now + REST).is_empty());
        filter.remove(bit, now);
        assert!(filter.lingering(now).is_empty(), "a program may just be about to make a flow");
        let mut lingering = filter.lingering(now + REST);
        assert_eq!(lingering.len(), 1);
        lingering.keep_for(&FlowKey::new(CLIENT, Port::new(40_000), CLUSTER_IP, Port::new(80), 6));
        assert!(lingering.is_empty());
        filter.clear(&filter.lingering(now + REST));
        assert_eq!(filter.take_ops(), [Op::Filter(bit.word(), 0)]);
    }

    #[test]
    fn a_bit_that_is_needed_again_is_not_cleared() {
        let (bit, now) = (FilterBit::service_address(&CLUSTER_IP), Instant::now());
        let mut filter = Filter::new([]);
        filter.add(bit);
        filter.remove(bit, now);
        let lingering = filter.lingering(now + REST);
        filter.add(bit);
        filter.take_ops();
        filter.clear(&lingering);
        assert!(filter.take_ops().is_empty());
    }

    #[test]
    fn bits_that_an_earlier_agent_left_linger() {
        let (bit, now) = (FilterBit::service_address(&CLUSTER_IP), Instant::now());
        let mut filter = Filter::new([(bit.word(), bit.mask()), (0, 0)]);
        filter.linger_unknown(now);
        assert_eq!(filter.lingering(now + REST).len(), 1);
    }
}
