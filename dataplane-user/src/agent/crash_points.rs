//! The agent dies before and after each write of a cold start, an update and a delete: at that moment every frontend leads to
//! the old endpoints or to the new ones, and the next agent ends where a cold start does.

use super::histories::{Step, World, change, settings};
use crate::compile::Endpoint;
use crate::model::Kind;
use crate::sync::checks::{check, view};
use dataplane_common::frontend::FrontendKey;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// Random states, each with a random change.
const STATES: u64 = 40;

type View = BTreeMap<FrontendKey, [BTreeSet<Endpoint>; 2]>;

/// What is so before the change, and the change; the first state is that of a cold start.
fn story(seed: u64) -> (Vec<Step>, Vec<Step>) {
    let puts = |first: u64, count: u64, kinds: &[Kind]| -> Vec<Step> {
        kinds.iter().flat_map(|kind| (0..count).map(move |at| change(*kind, first + at))).collect()
    };
    let objects = [Kind::Service, Kind::EndpointSlice];
    let node = puts(seed, 1, &[Kind::Node, Kind::ServiceCidr]);
    let before = [node, puts(seed * 1_000, 10, &objects)].concat();
    match seed % 3 {
        0 => (Vec::new(), before),
        1 => (before, puts(seed * 1_000 + 500, 3, &objects)),
        _ => {
            let delete = |kind| (0..3).map(move |object| Step::Delete { kind, object });
            (before, objects.into_iter().flat_map(delete).collect())
        }
    }
}

/// A world in which the first part has happened and was told.
fn begin(steps: &[Step]) -> World {
    let mut world = World::new(&settings());
    steps.iter().for_each(|step| world.perform(*step));
    if !steps.is_empty() {
        world.tell_all();
        assert!(world.agent.is_complete());
    }
    world
}

/// Tells the second part, which is written in one go; whether the agent came to its end.
fn go_on(world: &mut World, steps: &[Step], dies_after: Option<usize>) -> bool {
    steps.iter().for_each(|step| world.perform(*step));
    world.die_after(dies_after);
    world.tell_at_once();
    !world.died
}

/// C3
#[test]
fn every_write_is_one_at_which_the_agent_may_die() {
    let mut points = 0;
    for seed in 0..STATES {
        let (before, then) = story(seed);
        for entries in 0.. {
            let mut world = begin(&before);
            let ended = go_on(&mut world, &then, Some(entries));
            check(&*world.maps);
            points += 1;
            world.settle();
            world.compare_objects();
            world.compare_tables();
            if ended {
                break;
            }
        }
    }
    assert!(points > 500, "only {points} points");
}

/// C3, Z1
#[test]
fn no_packet_meets_a_half_written_service() {
    let mut moments = 0;
    for seed in 0..STATES {
        let (before, then) = story(seed);
        let old: View = view(&*begin(&before).maps);
        let mut world = begin(&before);
        assert!(go_on(&mut world, &then, None));
        let new: View = view(&*world.maps);
        let mut world = begin(&before);
        let seen = Arc::new(Mutex::new(0));
        let (count, ends) = (seen.clone(), [old.clone(), new.clone()]);
        world.maps.watch(Some(Box::new(move |maps| {
            check(maps);
            *count.lock().unwrap() += 1;
            let now = view(maps);
            for key in ends.iter().flat_map(BTreeMap::keys) {
                let now = now.get(key);
                assert!(ends.iter().any(|end| end.get(key) == now), "seed {seed}: {key:?} leads to {now:?}");
            }
            assert!(now.keys().all(|key| ends.iter().any(|end| end.contains_key(key))));
        })));
        assert!(go_on(&mut world, &then, None));
        moments += *seen.lock().unwrap();
    }
    assert!(moments > 500, "only {moments} moments");
}
