//! A smaller case that fails as well: fewer steps, then fewer objects.

use crate::run::Bench;
use crate::script::{Script, Step};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// A choice of the programs is random, so a case that fails sometimes is run as often as this.
const TRIES: usize = 4;
/// How long shrinking may take.
const LIMIT: Duration = Duration::from_secs(120);

/// The smallest case found that fails, for people.
pub(crate) fn shrink(bench: &mut Bench, script: &Script) -> String {
    let end = Instant::now() + LIMIT;
    let mut best = script.clone();
    let Some(mut error) = failure(bench, &best) else {
        return "the case does not fail again: it hangs on a random choice of the programs".to_owned();
    };
    loop {
        let before = size(&best);
        for candidates in [fewer_steps, fewer_objects, fewer_parts] {
            let mut number = 0;
            while let Some(candidate) = candidates(&best, number).filter(|_| Instant::now() < end) {
                match failure(bench, &candidate) {
                    Some(why) => (best, error) = (candidate, why),
                    None => number += 1,
                }
            }
        }
        if size(&best) == before || Instant::now() >= end {
            return tell(&best, &error);
        }
    }
}

fn failure(bench: &mut Bench, script: &Script) -> Option<String> {
    (0..TRIES).find_map(|_| bench.run(script).err())
}

fn size(script: &Script) -> usize {
    script.steps.len() + script.states.iter().map(|state| state.manifests().len()).sum::<usize>()
}

/// Without a run of steps: halves first, single steps last. `None` when there is no such candidate.
fn fewer_steps(script: &Script, mut number: usize) -> Option<Script> {
    let length = script.steps.len();
    let mut run = length.next_power_of_two() / 2;
    while run > 0 {
        let runs = length.div_ceil(run);
        if number < runs {
            let (from, to) = (number * run, ((number + 1) * run).min(length));
            let mut smaller = script.clone();
            // The first step says what the cluster is at the beginning.
            smaller.steps =
                script.steps[..from.max(1)].iter().chain(&script.steps[to.max(1)..]).cloned().collect();
            if smaller.steps.len() < length {
                return Some(smaller);
            }
        } else {
            number -= runs;
            run /= 2;
            continue;
        }
        number += 1;
    }
    None
}

/// Without one object of one state.
fn fewer_objects(script: &Script, mut number: usize) -> Option<Script> {
    for (index, state) in script.states.iter().enumerate() {
        let mut smaller = script.clone();
        let counts = [state.cluster.services.len(), state.cluster.slices.len(), state.broken.len()];
        if number < counts[0] {
            smaller.states[index].cluster.services.remove(number);
            return Some(smaller);
        }
        number -= counts[0];
        if number < counts[1] {
            smaller.states[index].cluster.slices.remove(number);
            return Some(smaller);
        }
        number -= counts[1];
        if number < counts[2] {
            smaller.states[index].broken.remove(number);
            return Some(smaller);
        }
        number -= counts[2];
    }
    None
}

/// Without one endpoint or one port of one object.
fn fewer_parts(script: &Script, mut number: usize) -> Option<Script> {
    for index in 0..script.states.len() {
        let mut smaller = script.clone();
        let state = &mut smaller.states[index].cluster;
        let mut done = false;
        for slice in &mut state.slices {
            done =
                done || shorten(&mut slice.endpoints, &mut number) || shorten(&mut slice.ports, &mut number);
        }
        for spec in state.services.iter_mut().filter_map(|service| service.spec.as_mut()) {
            done =
                done || shorten(&mut spec.ports, &mut number) || shorten(&mut spec.external_ips, &mut number);
            done = done || shorten(&mut spec.load_balancer_source_ranges, &mut number);
        }
        if done {
            return Some(smaller);
        }
    }
    None
}

/// Removes the entry of this number, if the list is so long; else counts on behind the list.
fn shorten<T>(list: &mut Option<Vec<T>>, number: &mut usize) -> bool {
    let Some(list) = list else { return false };
    if *number < list.len() {
        list.remove(*number);
        return true;
    }
    *number -= list.len();
    false
}

fn tell(script: &Script, error: &str) -> String {
    let mut text = format!("the smallest case found: {:?}\n", script.flags);
    let used = script
        .steps
        .iter()
        .filter_map(|step| if let Step::State(number) = step { Some(*number) } else { None });
    for number in used {
        let _ = writeln!(text, "state {number}:\n{}", script.states[number].manifests());
    }
    for step in &script.steps {
        let _ = writeln!(text, "{step:?}");
    }
    text + error
}
