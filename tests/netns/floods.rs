//! Floods, for a short while; `cargo xtask bench flood` does it for a minute, beside kube-proxy.

use dataplane_tests::bench_flood::{FloodArgs, measure};
use dataplane_tests::lab::layout::Proxy;
use std::path::PathBuf;

/// C4, P12: while all CPUs flood, established connections live, who means it is served, far away or near, and half-open flows keep to
/// their room. Questions by UDP through a node port to one endpoint find a port each.
#[test]
fn floods_hurt_nobody_who_means_it() {
    let args = FloodArgs { seconds: 4.0, streams: 200, rate: 2_000, alone: true, records: PathBuf::new() };
    let measured = measure(&args, &[Proxy::Portolan], |line| println!("{line}")).unwrap();
    let [syns] = &measured.syns[..] else { panic!("{measured:?}") };
    assert_eq!(syns.lost, 0, "{syns:?}");
    assert!(syns.sent > 1_000, "{syns:?}");
    assert!(syns.half_open.is_some_and(|number| number <= 131_072), "{syns:?}");
    for honest in &syns.honest {
        assert!(honest.good > 0 && honest.failed == 0, "{honest:?}");
    }
    let [questions] = &measured.questions[..] else { panic!("{measured:?}") };
    assert!(questions.good > 1_000 && questions.failed == 0, "{questions:?}");
}
