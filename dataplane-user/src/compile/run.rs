//! Runs of slots: in which of the slots of a set each endpoint lies, as its algorithm asks (L2, L3). Pure.

use super::tables::Endpoint;
use dataplane_common::hash::mix;
use dataplane_common::service::Algorithm;

/// How many slots a run has at most.
const LONGEST: u32 = 65_537;

/// How many slots there are for an endpoint at least where they are counted out, as far as [`LONGEST`] goes: then no share differs from
/// what its weight asks for by more than a hundredth of an even share. It is the number of endpoints that counts, not their weights, or one
/// Service could take the room of all others by a word.
const FINE: u32 = 100;

/// The lengths of tables. They are prime, so that every step goes through all slots (Eisenbud et al. 2016, section 3.4); few, because
/// most clients move where the number of endpoints changes the length. Between the last two one more would do for the shares, but not
/// for how few move where an endpoint goes: that needs some 400 slots for each of a hundred endpoints.
const LENGTHS: [u32; 4] = [251, 1_021, 4_093, LONGEST];

/// An endpoint that a set holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it is.
    pub endpoint: Endpoint,
    /// Its backend's id.
    pub id: u32,
    /// Its weight, never 0.
    pub weight: u16,
}

/// The ids in the slots of a set. `seed` is the same on all nodes, `order` this node's own.
pub fn run(algorithm: Algorithm, members: &[Member], seed: u64, order: u64) -> Box<[u32]> {
    if let [only] = members {
        return [only.id].into();
    }
    match algorithm {
        Algorithm::Random | Algorithm::LeastConnections => {
            let mut ids = spread(members);
            // In this order a run says what it holds, whatever it is compared with.
            ids.sort_unstable();
            ids.into()
        }
        Algorithm::RoundRobin => {
            let mut members = members.to_vec();
            members.sort_unstable_by_key(|member| (hash(&member.endpoint, order), member.endpoint));
            spread(&members).into()
        }
        Algorithm::Maglev | Algorithm::SourceHash => table(members, seed),
    }
}

fn hash(endpoint: &Endpoint, salt: u64) -> u64 {
    let [first, second] = endpoint.addr.words();
    mix([first, second, u64::from(endpoint.port.number())], salt)
}

/// Each id as often as its weight asks for, evenly apart: of two with one place the first comes first.
fn spread(members: &[Member]) -> Vec<u32> {
    let shares = shares(members);
    let mut places: Vec<(u64, usize)> = Vec::new();
    for (at, share) in shares.iter().enumerate() {
        // In the middle of its part of the run, in parts of 2^32.
        let place = |turn: u64| (((2 * turn + 1) << 31) / u64::from(*share), at);
        places.extend((0..u64::from(*share)).map(place));
    }
    places.sort_unstable();
    places.into_iter().filter_map(|(_, at)| members.get(at)).map(|member| member.id).collect()
}

/// How many slots each gets: its weight, in lowest terms; or as many as tell its share, where that takes less.
fn shares(members: &[Member]) -> Vec<u32> {
    let total: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
    let common = members.iter().fold(0, |common, member| divisor(common, u64::from(member.weight))).max(1);
    let exact = total / common;
    let enough = u64::from(slots_for(members.len())).max(members.len() as u64);
    if exact <= enough {
        return members.iter().map(|member| (u64::from(member.weight) / common) as u32).collect();
    }
    let share = |member: &Member| ((u64::from(member.weight) * enough + total / 2) / total).max(1) as u32;
    members.iter().map(share).collect()
}

/// How many slots are enough for so many endpoints.
fn slots_for(members: usize) -> u32 {
    u32::try_from(members).unwrap_or(u32::MAX).saturating_mul(FINE).min(LONGEST)
}

/// The greatest common divisor.
fn divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// A lookup table in which few slots change hands where an endpoint comes or goes. As in Maglev (Eisenbud et al., NSDI 2016), endpoints
/// ask for slots in turn, each in an order of its own. But one whose slot is taken waits for its next turn instead of taking the next
/// that is free: so a slot goes to whoever asks for it earliest, whoever else there is, and less than half as many move that need not.
fn table(members: &[Member], seed: u64) -> Box<[u32]> {
    let total: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
    let wanted = slots_for(members.len());
    let length = LENGTHS.into_iter().find(|length| *length >= wanted).unwrap_or(LONGEST);
    // Of two in one turn the first is the same on all nodes, which have given out other ids.
    let mut members = members.to_vec();
    members.sort_unstable_by_key(|member| (hash(&member.endpoint, seed), member.endpoint));
    let parts = parts(&members, total, length);
    let mut asking: Vec<_> =
        members.iter().zip(parts).map(|(member, part)| Asking::new(member, part, seed, length)).collect();
    let mut slots = if members.is_empty() { Vec::new() } else { vec![FREE; length as usize] };
    while !asking.is_empty() {
        asking.retain_mut(|asking| {
            if asking.part > 0 {
                asking.ask(&mut slots);
            }
            asking.part > 0
        });
    }
    slots.into()
}

/// The parts of a table by weight, which make up all of it. Each has a slot, which the heavier give where it is too little for one; what
/// is left over by whole slots goes to whom it lacks most.
fn parts(members: &[Member], total: u64, length: u32) -> Vec<u32> {
    // Of more endpoints than slots some have none.
    let least = u32::from(members.len() <= length as usize);
    let exact = |member: &Member| u64::from(member.weight) * u64::from(length);
    let mut parts: Vec<u32> =
        members.iter().map(|member| ((exact(member) / total) as u32).max(least)).collect();
    let sum: u32 = parts.iter().sum();
    let mut lacking: Vec<(u64, usize)> =
        members.iter().enumerate().map(|(at, member)| (total - exact(member) % total, at)).collect();
    lacking.sort_unstable();
    for (_, at) in lacking.into_iter().take(length.saturating_sub(sum) as usize) {
        if let Some(part) = parts.get_mut(at) {
            *part += 1;
        }
    }
    let mut over = sum.saturating_sub(length);
    while over > 0 {
        for part in parts.iter_mut().filter(|part| **part > 1).take(over as usize) {
            *part -= 1;
            over -= 1;
        }
    }
    parts
}

/// In a slot that no endpoint has yet: an id that is never given out.
const FREE: u32 = 0;

/// An endpoint that asks for slots, one in each turn.
struct Asking {
    id: u32,
    /// How many more it gets.
    part: u32,
    next: usize,
    skip: usize,
}

impl Asking {
    fn new(member: &Member, part: u32, seed: u64, length: u32) -> Self {
        let hash = hash(&member.endpoint, seed);
        let (first, second) = (hash >> 32, hash & u64::from(u32::MAX));
        Self {
            id: member.id,
            part,
            next: (first % u64::from(length)) as usize,
            skip: (second % u64::from(length - 1) + 1) as usize,
        }
    }

    fn ask(&mut self, slots: &mut [u32]) {
        if let Some(slot @ &mut FREE) = slots.get_mut(self.next) {
            *slot = self.id;
            self.part -= 1;
        }
        self.next = (self.next + self.skip) % slots.len().max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane_common::{Addr, Port};
    use std::collections::BTreeMap;

    fn members(weights: &[u16]) -> Vec<Member> {
        let member = |(n, weight): (usize, &u16)| Member {
            endpoint: Endpoint {
                addr: Addr::from_v4([10, 244, (n >> 8) as u8, n as u8]),
                port: Port::new(8080),
            },
            id: n as u32 + 1,
            weight: *weight,
        };
        weights.iter().enumerate().map(member).collect()
    }

    fn shares(run: &[u32]) -> BTreeMap<u32, f64> {
        let mut shares = BTreeMap::new();
        for id in run {
            *shares.entry(*id).or_insert(0.0) += 1.0 / run.len() as f64;
        }
        shares
    }

    const ALL: [&[u16]; 8] = [
        &[1],
        &[1, 1, 1],
        &[3, 1, 1],
        &[700, 300],
        &[1_000, 999, 7],
        &[65_535, 65_534],
        &[100, 1],
        &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    ];

    /// L3
    #[test]
    fn each_has_its_share_within_a_hundredth_of_an_even_one() {
        for algorithm in Algorithm::ALL {
            for weights in ALL {
                let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
                let run = run(algorithm, &members(weights), 7, 9);
                let shares = shares(&run);
                for (id, weight) in (1..).zip(weights) {
                    let (share, asked) = (shares[&id], f64::from(*weight) / total);
                    let error = (share - asked).abs() * weights.len() as f64;
                    assert!(
                        error <= 0.01,
                        "{algorithm:?} {weights:?}: {share} of {asked}, {} slots",
                        run.len()
                    );
                }
            }
        }
    }

    /// L3: equal endpoints need no more slots than there are endpoints, and weights no more than their lowest terms.
    #[test]
    fn runs_are_short() {
        let length = |algorithm, weights: &[u16]| run(algorithm, &members(weights), 7, 9).len();
        for algorithm in [Algorithm::Random, Algorithm::LeastConnections, Algorithm::RoundRobin] {
            assert_eq!(length(algorithm, &[5; 40]), 40);
            assert_eq!(length(algorithm, &[300, 100, 100]), 5);
            assert!(length(algorithm, &[1_000, 999]) < 205);
            assert_eq!(length(algorithm, &[]), 0);
        }
        let lengths = [2, 3, 10, 11, 40, 41, 655, 5_000].map(|n| length(Algorithm::Maglev, &vec![1; n]));
        assert_eq!(lengths, [251, 1_021, 1_021, 4_093, 4_093, 65_537, 65_537, 65_537]);
        assert_eq!(length(Algorithm::Maglev, &[]), 0);
    }

    /// L2: between two turns of one endpoint each other of its weight has one.
    #[test]
    fn turns_are_evenly_apart_and_begin_elsewhere_on_each_node() {
        let run_of = |order| run(Algorithm::RoundRobin, &members(&[2, 1, 1]), 7, order);
        for order in 0..20 {
            let run = run_of(order);
            assert!(run.windows(2).all(|pair| pair[0] != pair[1]) && run.len() == 4, "{run:?}");
        }
        let begins = |order| run(Algorithm::RoundRobin, &members(&[1; 5]), 7, order).to_vec();
        let firsts: std::collections::BTreeSet<_> = (0..40).map(|order| begins(order)[0]).collect();
        assert_eq!(firsts.len(), 5, "{firsts:?}");
        let orders: std::collections::BTreeSet<_> = (0..40).map(begins).collect();
        assert!(orders.len() > 20, "an order of its own, not a start alone");
    }

    /// L2: of three nodes that serve the same Services few begin with the same endpoint, and what each sends comes to the endpoints at
    /// different times.
    #[test]
    fn nodes_do_not_send_their_turns_to_one_endpoint_at_a_time() {
        use crate::compile::selection::order;
        const SERVICES: u64 = 2_000;
        const ENDPOINTS: usize = 10;
        let members = members(&[1; ENDPOINTS]);
        let (mut all_three, mut most) = ([0; ENDPOINTS], 0);
        for seed in 0..SERVICES {
            let runs =
                ["a", "b", "c"].map(|node| run(Algorithm::RoundRobin, &members, seed, order(seed, node)));
            for (turn, met) in all_three.iter_mut().enumerate() {
                *met += u64::from(runs.iter().all(|run| run[turn] == runs[0][turn]));
            }
            most = most.max(
                (0..ENDPOINTS).filter(|turn| runs.iter().all(|run| run[*turn] == runs[0][*turn])).count(),
            );
        }
        // By chance one in a hundred: 20, with a standard deviation of 4.5.
        assert!(all_three.iter().all(|met| (0..45).contains(met)), "{all_three:?}");
        assert!(most < ENDPOINTS / 2, "some Service has one order on all nodes");
    }

    /// L2: one of a hundred goes: who had it moves, and half as many of the others at most.
    #[test]
    fn few_move_where_an_endpoint_goes() {
        for (seed, number) in [(0, 100), (1, 100), (2, 100), (3, 10)] {
            let all = members(&vec![1; number]);
            let before = run(Algorithm::Maglev, &all, seed, 0);
            for gone in [0, number / 3, number - 1] {
                let mut left = all.clone();
                let gone = left.remove(gone).id;
                let after = run(Algorithm::Maglev, &left, seed, 0);
                assert_eq!(before.len(), after.len());
                let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
                let unavoidable = before.iter().filter(|id| **id == gone).count();
                assert!(moved * 2 <= unavoidable * 3, "{moved} of {}, {unavoidable} had to", before.len());
            }
        }
    }

    /// L2: nodes have given out other ids, and know endpoints in another order.
    #[test]
    fn all_nodes_have_one_table_and_services_have_their_own() {
        let here = members(&[1, 2, 1, 1]);
        let mut there: Vec<_> = here.iter().map(|member| Member { id: 90 - member.id, ..*member }).collect();
        there.reverse();
        let (here_run, there_run) =
            (run(Algorithm::Maglev, &here, 7, 1), run(Algorithm::Maglev, &there, 7, 2));
        assert!(here_run.iter().zip(&there_run).all(|(here, there)| *there == 90 - *here));
        let other = run(Algorithm::Maglev, &here, 8, 1);
        let same = here_run.iter().zip(&other).filter(|(one, other)| one == other).count();
        assert!(same < here_run.len() / 2, "{same} of {}", here_run.len());
    }
}
