//! Runs of consecutive slots for endpoint sets.
//!
//! Lengths are rounded up to classes, so that a freed run fits others of about its size, and a run is taken from the
//! smallest gap that holds it: small runs from the gap's low end, large ones from its high end. Neighbouring gaps join.

use super::REST;
use dataplane_common::service::EndpointSet;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

/// Runs from this length on are taken from the high end of a gap.
const LARGE: u32 = 256;

/// Which slots are taken.
#[derive(Debug)]
pub(super) struct Slots {
    /// Gaps: base to length.
    gaps: BTreeMap<u32, u32>,
    /// The same gaps: length, then base.
    by_length: BTreeSet<(u32, u32)>,
    resting: VecDeque<(Instant, EndpointSet)>,
    capacity: usize,
}

/// The length that is really taken for a set of `count`: at most an eighth more.
fn class(count: u32) -> u32 {
    if count <= 8 { count } else { count.next_multiple_of(count.next_power_of_two() / 16) }
}

impl Slots {
    /// All of `capacity` slots are free.
    pub(super) fn new(capacity: usize) -> Self {
        let mut slots =
            Self { gaps: BTreeMap::new(), by_length: BTreeSet::new(), resting: VecDeque::new(), capacity };
        slots.add_gap(0, u32::try_from(capacity).unwrap_or(u32::MAX));
        slots
    }

    /// How many slots there are.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many of them are taken, or rest.
    pub(super) fn used(&self) -> usize {
        let free: usize = self.gaps.values().map(|length| *length as usize).sum();
        self.capacity.saturating_sub(free)
    }

    fn add_gap(&mut self, base: u32, length: u32) {
        if length > 0 {
            self.gaps.insert(base, length);
            self.by_length.insert((length, base));
        }
    }

    fn take_gap(&mut self, base: u32) -> Option<u32> {
        let length = self.gaps.remove(&base)?;
        self.by_length.remove(&(length, base));
        Some(length)
    }

    /// Takes a run for `count` slots; the empty set needs none.
    pub(super) fn take(&mut self, count: u32) -> Option<EndpointSet> {
        if count == 0 {
            return Some(EndpointSet::EMPTY);
        }
        let wanted = class(count);
        let &(length, base) = self.by_length.range((wanted, 0)..).next()?;
        self.take_gap(base);
        if wanted >= LARGE {
            self.add_gap(base, length - wanted);
            return Some(EndpointSet::new(base + length - wanted, count));
        }
        self.add_gap(base + wanted, length - wanted);
        Some(EndpointSet::new(base, count))
    }

    /// Takes the run that the kernel holds; `false` if it lies outside of the table or some of it is taken.
    pub(super) fn reserve(&mut self, set: EndpointSet) -> bool {
        if set.count() == 0 {
            return true;
        }
        let gap = self.gaps.range(..=set.base()).next_back().map(|(base, length)| (*base, *length));
        let Some((base, length)) = gap else { return false };
        let wanted = if set.count() > length { return false } else { class(set.count()) };
        let before = set.base() - base;
        let Some(behind) = length.checked_sub(before).and_then(|rest| rest.checked_sub(wanted)) else {
            return false;
        };
        self.take_gap(base);
        self.add_gap(base, before);
        self.add_gap(set.base() + wanted, behind);
        true
    }

    /// Returns a run that no service ever named: it need not rest.
    pub(super) fn give_back(&mut self, set: EndpointSet) {
        if set.count() == 0 {
            return;
        }
        let (mut base, mut length) = (set.base(), class(set.count()));
        let before = self.gaps.range(..base).next_back().map(|(base, length)| (*base, *length));
        if let Some((before, size)) = before
            && before + size == base
        {
            self.take_gap(before);
            (base, length) = (before, size + length);
        }
        if let Some(size) = self.take_gap(base + length) {
            length += size;
        }
        self.add_gap(base, length);
    }

    /// Frees a run after its rest.
    pub(super) fn release(&mut self, set: EndpointSet, now: Instant) {
        if set.count() > 0 {
            self.resting.push_back((now, set));
        }
    }

    /// Ends the rest of what was freed long enough ago.
    pub(super) fn wake(&mut self, now: Instant) {
        while let Some(&(since, set)) = self.resting.front()
            && now.saturating_duration_since(since) >= REST
        {
            self.resting.pop_front();
            self.give_back(set);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn next(seed: &mut u64) -> u64 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *seed >> 33
    }

    #[test]
    fn classes_waste_at_most_an_eighth() {
        for count in 1..10_000 {
            assert!(class(count) >= count && class(count) <= count + count / 8, "{count}");
            assert_eq!(class(class(count)), class(count));
        }
    }

    #[test]
    fn gaps_join_when_their_neighbours_are_freed() {
        let now = Instant::now();
        let mut slots = Slots::new(100);
        let runs: Vec<_> = (0..10).map(|_| slots.take(10).unwrap()).collect();
        assert_eq!(slots.take(1), None);
        for run in [3, 1, 2, 0, 9, 5, 4, 7, 8, 6] {
            slots.release(runs[run], now);
        }
        assert_eq!(slots.take(1), None, "freed runs rest");
        slots.wake(now + REST);
        assert_eq!(slots.gaps, BTreeMap::from([(0, 100)]));
    }

    #[test]
    fn a_run_that_the_kernel_holds_is_taken_once_and_only_inside_of_the_table() {
        let mut slots = Slots::new(100);
        assert!(slots.reserve(EndpointSet::new(40, 10)));
        assert!(!slots.reserve(EndpointSet::new(45, 2)) && !slots.reserve(EndpointSet::new(35, 6)));
        assert!(!slots.reserve(EndpointSet::new(95, 6)) && !slots.reserve(EndpointSet::new(u32::MAX, 6)));
        assert!(!slots.reserve(EndpointSet::new(0, u32::MAX)));
        for (base, count) in [(50, 48), (98, 2), (0, 40)] {
            assert!(slots.reserve(EndpointSet::new(base, count)));
        }
        assert_eq!(slots.take(1), None);
    }

    /// The default size holds 120,000 endpoints through any number of changes, Services of 5,000 endpoints among them.
    #[test]
    fn random_histories_do_not_break_the_table_into_pieces() {
        let mut slots = Slots::new(262_144);
        let (mut seed, mut now) = (7, Instant::now());
        let mut runs: Vec<EndpointSet> = Vec::new();
        let mut held = 0;
        for _ in 0..300_000 {
            now += Duration::from_millis(2);
            slots.wake(now);
            let count = match next(&mut seed) % 1_000 {
                0 => 5_000,
                1..=20 => 50 + (next(&mut seed) % 400) as u32,
                _ => 1 + (next(&mut seed) % 12) as u32,
            };
            while held + count > 120_000 {
                let run = runs.swap_remove(next(&mut seed) as usize % runs.len());
                held -= run.count();
                slots.release(run, now);
            }
            runs.push(slots.take(count).expect("there is room for 120,000 endpoints"));
            held += count;
        }
    }
}
