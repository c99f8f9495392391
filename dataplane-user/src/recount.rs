//! Holds the counts of what is open (L2) against the flows and sockets that there are. Pure.
//!
//! Flows begin and end while they are counted, so a count is wrong for certain only where it differs by more than what began and ended
//! meanwhile, as the counts themselves tell. And only if two recounts in a row find it: a program may be between a flow and its count.

use dataplane_common::counter::Open;
use std::collections::HashMap;

/// How many flows and sockets there are of a backend, and of a generation of its id.
pub type Live = HashMap<(u32, u32), u32>;

/// What recounts have found.
#[derive(Clone, Debug, Default)]
pub struct Recount {
    /// By how much counts were too high, or too low (negative), at least, when they were last looked at; by backend.
    suspects: HashMap<u32, i64>,
}

impl Recount {
    /// By how much each count is to be changed, by backend. Where `live` may not be `all` there is, nothing tells a count that is too high.
    /// `before` and `after` are all counts as they were when `live` was begun to be
    /// counted and when that had ended; `generation` tells that of a backend's id now.
    pub fn corrections(
        &mut self,
        before: &[Open],
        after: &[Open],
        live: &Live,
        all: bool,
        generation: impl Fn(u32) -> Option<u32>,
    ) -> Vec<(u32, i64)> {
        let mut found: HashMap<u32, i64> = HashMap::new();
        for (&(backend, of), number) in live {
            if generation(backend) == Some(of) {
                *found.entry(backend).or_default() += i64::from(*number);
            }
        }
        let mut suspects = HashMap::new();
        let mut corrections = Vec::new();
        for (backend, (before, after)) in (0..).zip(before.iter().zip(after)) {
            let there = found.get(&backend).copied().unwrap_or_default();
            let excess = excess(*before, *after, there);
            let excess = if all { excess } else { excess.min(0) };
            let known = self.suspects.get(&backend).copied().unwrap_or_default();
            if excess != 0 && known.signum() == excess.signum() {
                corrections.push((backend, -excess.signum() * excess.abs().min(known.abs())));
            } else if excess != 0 {
                suspects.insert(backend, excess);
            }
        }
        self.suspects = suspects;
        corrections
    }
}

/// By how much a count was too high at least, or too low (negative); 0 where it may have been right. `there` are as many as were found
/// between two readings.
fn excess(before: Open, after: Open, there: i64) -> i64 {
    let (begun, ended) = after.since(before);
    let counted = i64::from(before.word() as u32 as i32);
    let (least, most) = (counted - there - i64::from(ended), counted - there + i64::from(begun));
    if least > 0 { least } else { most.min(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(begun: u64, ended: u64) -> Open {
        Open::from_word(begun.wrapping_mul(Open::BEGUN).wrapping_add(ended.wrapping_mul(Open::ENDED)))
    }

    fn live(number: u32) -> Live {
        [((1, 7), number)].into()
    }

    /// The corrections of one backend, whose id has the generation 7, in recounts one after the other.
    fn corrections(looks: &[([Open; 2], u32)]) -> Vec<i64> {
        let mut recount = Recount::default();
        looks
            .iter()
            .map(|([before, after], number)| {
                let (before, after) = ([open(0, 0), *before], [open(0, 0), *after]);
                let all = recount.corrections(&before, &after, &live(*number), true, |_| Some(7));
                all.iter().map(|(_, by)| by).sum()
            })
            .collect()
    }

    #[test]
    fn a_count_that_is_wrong_twice_is_put_right() {
        let still = [open(9, 4); 2];
        assert_eq!(corrections(&[(still, 5), (still, 5)]), [0, 0]);
        assert_eq!(corrections(&[(still, 3), (still, 3), ([open(7, 4); 2], 3)]), [0, -2, 0]);
        assert_eq!(corrections(&[(still, 8), (still, 7)]), [0, 2], "by no more than both found");
        assert_eq!(corrections(&[(still, 3), (still, 5), (still, 3)]), [0, 0, 0], "not in a row");
        assert_eq!(corrections(&[(still, 3), (still, 8)]), [0, 0], "too high, then too low");
    }

    #[test]
    fn what_begins_and_ends_meanwhile_is_no_mistake() {
        let moving = [open(9, 4), open(12, 6)];
        for there in 3..=8 {
            assert_eq!(corrections(&[(moving, there), (moving, there)]), [0, 0], "{there}");
        }
        assert_eq!(corrections(&[(moving, 2), (moving, 2)]), [0, -1]);
        assert_eq!(corrections(&[(moving, 9), (moving, 9)]), [0, 1]);
    }

    #[test]
    fn flows_of_an_endpoint_that_had_the_id_before_do_not_count() {
        let mut recount = Recount::default();
        let counts = [open(0, 0), open(2, 0)];
        let mut there = live(2);
        there.insert((1, 6), 40);
        for _ in 0..3 {
            assert!(recount.corrections(&counts, &counts, &there, true, |_| Some(7)).is_empty());
        }
    }

    #[test]
    fn where_there_may_be_more_a_count_can_only_be_too_low() {
        let counts = [open(0, 0), open(4, 0)];
        for (there, by) in [(2, None), (4, None), (7, Some((1, 3)))] {
            let mut recount = Recount::default();
            let mut look = || recount.corrections(&counts, &counts, &live(there), false, |_| Some(7));
            assert!(look().is_empty());
            assert_eq!(look().first().copied(), by);
        }
    }
}
