//! The packet tier: real programs on one packet at a time (`BPF_PROG_TEST_RUN`). Each case gives the Services, the packet
//! sent, the verdict, the whole packet out and the counters that moved; it fails if any other moved.

mod affinity;
mod choice;
mod errors;
mod events;
mod flows;
mod fragments;
mod half_written;
mod headers;
mod load_balancers;
mod open;
mod policies;
mod refusals;
mod retry;
mod sctp;
mod strays;
mod translation;
mod untouched;

use dataplane_tests::packet::build::Packet;
use dataplane_tests::packet::{Hook, Outcome, Verdict, World};
use std::collections::BTreeMap;

/// Sends a packet and compares all that came of it.
#[track_caller]
fn expect(
    world: &World,
    hook: Hook,
    sent: &Packet,
    verdict: Verdict,
    out: &Packet,
    moved: &BTreeMap<String, u64>,
) {
    expect_marked(world, hook, sent, verdict, (out, 0), moved);
}

/// The same of a packet that leaves with a mark.
#[track_caller]
fn expect_marked(
    world: &World,
    hook: Hook,
    sent: &Packet,
    verdict: Verdict,
    (out, mark): (&Packet, u32),
    moved: &BTreeMap<String, u64>,
) {
    let outcome = world.send(hook, sent).unwrap();
    let expected = Outcome { verdict, packet: out.bytes(), mark, moved: moved.clone() };
    assert_eq!(outcome.verdict, expected.verdict, "{sent:?}: {:?}", outcome.moved);
    assert_eq!(outcome.moved, expected.moved, "counters");
    assert_eq!(outcome.mark, expected.mark, "the mark of {sent:?}");
    assert_eq!(hex(&outcome.packet), hex(&expected.packet), "the packet out");
}

/// Sends a packet that must be gone, for this reason alone.
#[track_caller]
fn expect_drop(world: &World, hook: Hook, sent: &Packet, why: dataplane_common::drop::Reason) {
    let outcome = world.send(hook, sent).unwrap();
    assert_eq!(outcome.verdict, Verdict::Drop, "{sent:?}: {:?}", outcome.moved);
    assert_eq!(outcome.moved, dataplane_tests::packet::reason(why));
}

/// Sends a packet that must leave as it came, with no counter moved.
#[track_caller]
fn expect_untouched(world: &World, hook: Hook, sent: &Packet) {
    expect(world, hook, sent, Verdict::Pass, sent, &BTreeMap::new());
}

/// Bytes for people.
fn hex(bytes: &[u8]) -> String {
    bytes.chunks(16).map(|line| format!("{line:02x?}\n")).collect()
}
