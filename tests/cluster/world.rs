//! What the tests of this tier share.

use std::time::{Duration, Instant};

/// How long a change may take to come through API server, controllers and agent.
const ARRIVAL: Duration = Duration::from_secs(180);

/// Waits until something is so.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + ARRIVAL;
    while !condition() {
        assert!(Instant::now() < end, "after {ARRIVAL:?} it is not so that {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
