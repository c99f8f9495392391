//! What the tests of this tier share.

use dataplane_tests::lab::{Client, Node, at};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// How long a change may take to come through API server, controllers and agent.
const ARRIVAL: Duration = Duration::from_secs(180);
const METRICS: u16 = 10_249;

/// Waits until something is so.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + ARRIVAL;
    while !condition() {
        assert!(Instant::now() < end, "after {ARRIVAL:?} it is not so that {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The value of a line of the metrics of a node's agent.
pub(crate) fn metric(node: &Node, line: &str) -> Option<f64> {
    let mut stream = Client::at(node.place()).connect(at(Ipv4Addr::LOCALHOST, METRICS)).ok()?;
    let (_, text) = stream.get("/metrics").ok()?;
    text.lines().find_map(|other| other.strip_prefix(line)?.trim().parse().ok())
}
