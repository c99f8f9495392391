//! Ids of service ports and backends. Id 0 is never given out, and a freed id rests.

use super::REST;
use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

/// Which ids are given out.
#[derive(Debug)]
pub(super) struct Ids {
    /// Free ids below `next`, in the order in which they rested.
    free: VecDeque<u32>,
    /// From here on no id was given out yet.
    next: u32,
    /// One past the largest id.
    end: u32,
    resting: VecDeque<(Instant, u32)>,
}

impl Ids {
    /// Ids below `capacity`, of which those in `used` are given out and all others free.
    pub(super) fn new(capacity: usize, used: &BTreeSet<u32>) -> Self {
        let end = u32::try_from(capacity).unwrap_or(u32::MAX);
        let next = used.range(..end).next_back().map_or(1, |last| last + 1).max(1);
        let free = (1..next).rev().filter(|id| !used.contains(id)).collect();
        Self { free, next, end, resting: VecDeque::new() }
    }

    /// How many ids there are, 0 included.
    pub(super) fn capacity(&self) -> usize {
        self.end as usize
    }

    /// An id that is free and has rested: the last one that did.
    pub(super) fn take(&mut self) -> Option<u32> {
        self.free.pop_back().or_else(|| self.take_new())
    }

    /// One that nobody had yet, or else the one that has rested longest: flows that count for the one who had it may live long.
    pub(super) fn take_late(&mut self) -> Option<u32> {
        self.take_new().or_else(|| self.free.pop_front())
    }

    fn take_new(&mut self) -> Option<u32> {
        let id = self.next;
        (id < self.end).then(|| {
            self.next += 1;
            id
        })
    }

    /// Returns an id that no map ever held: it need not rest.
    pub(super) fn give_back(&mut self, id: u32) {
        self.free.push_back(id);
    }

    /// Frees an id after its rest. An id past the end, which a damaged table may hold, is forgotten.
    pub(super) fn release(&mut self, id: u32, now: Instant) {
        if id != 0 && id < self.end {
            self.resting.push_back((now, id));
        }
    }

    /// Ends the rest of what was freed long enough ago.
    pub(super) fn wake(&mut self, now: Instant) {
        while let Some(&(since, id)) = self.resting.front()
            && now.saturating_duration_since(since) >= REST
        {
            self.resting.pop_front();
            self.free.push_back(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_id_rests_before_it_is_given_out_again() {
        let now = Instant::now();
        let mut ids = Ids::new(3, &BTreeSet::new());
        assert_eq!((ids.take(), ids.take(), ids.take()), (Some(1), Some(2), None));
        ids.release(1, now);
        ids.wake(now + REST / 2);
        assert_eq!(ids.take(), None);
        ids.wake(now + REST);
        assert_eq!(ids.take(), Some(1));
    }

    #[test]
    fn an_id_that_is_taken_late_is_the_one_that_was_free_for_longest() {
        let now = Instant::now();
        let mut ids = Ids::new(5, &BTreeSet::new());
        assert_eq!((ids.take_late(), ids.take_late(), ids.take_late()), (Some(1), Some(2), Some(3)));
        ids.release(2, now);
        ids.release(1, now);
        ids.wake(now + REST);
        assert_eq!(
            [ids.take_late(), ids.take_late(), ids.take_late(), ids.take_late()],
            [Some(4), Some(2), Some(1), None]
        );
    }

    #[test]
    fn ids_in_use_are_not_given_out() {
        let mut ids = Ids::new(6, &BTreeSet::from([0, 2, 4, 99]));
        assert_eq!([ids.take(), ids.take(), ids.take(), ids.take()], [Some(1), Some(3), Some(5), None]);
    }
}
