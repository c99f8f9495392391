//! How often something took how long.

use super::family::{Family, Text};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of the buckets of all durations, in seconds.
/// The last ones are kube-proxy's: what takes longer than five minutes is lost.
const BOUNDS: [f64; 20] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 15.0,
    60.0, 120.0, 180.0, 300.0,
];

/// How often something took how long.
#[derive(Debug, Default)]
pub struct Histogram {
    state: Mutex<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    /// One more.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            state.buckets[bucket] += 1;
        }
        state.count += 1;
        state.sum += seconds;
    }

    /// Its lines below the head of the family, whose only label has this value.
    pub(super) fn write(&self, text: &mut Text, family: &Family, value: &str) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let own = family.labels.iter().map(|label| (*label, value)).collect::<Vec<_>>();
        let mut sum = 0;
        for (bound, bucket) in BOUNDS.iter().zip(state.buckets) {
            sum += bucket;
            text.line(family.name, "_bucket", &[&own[..], &[("le", &bound.to_string())]].concat(), sum);
        }
        text.line(family.name, "_bucket", &[&own[..], &[("le", "+Inf")]].concat(), state.count);
        text.line(family.name, "_sum", &own, state.sum);
        text.line(family.name, "_count", &own, state.count);
    }
}
