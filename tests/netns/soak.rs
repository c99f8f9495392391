//! An agent under churn for a short while; `cargo xtask bench soak` does it for hours.

use dataplane_tests::soak::soak;
use std::time::Duration;

/// C3: Services, endpoints, pods, interfaces and the API server come and go: nothing that the agent holds grows, and what nothing
/// happens to is served all the time.
#[test]
fn nothing_grows_under_churn_and_no_call_fails() {
    let measured = soak(Duration::from_secs(40), 16, |_| {}).unwrap();
    assert_eq!(measured.faults(), [] as [String; 0], "{:#?}", measured.samples);
    let changes = measured.samples.last().unwrap().changes;
    assert!(changes > 100, "{changes} changes say nothing");
}
