//! Second tries, in numbers, for a short while; `cargo xtask bench tries` does it for longer, beside kube-proxy.

use dataplane_tests::bench_tries::{Health, TriesArgs, measure};
use std::path::PathBuf;

/// L5: of thousands of clients none fails where two of five endpoints refuse and one is silent, by ClusterIP or by node port, and no question
/// by UDP; and where all of them refuse each client is refused, for at most four packets to endpoints.
#[test]
fn thousands_of_clients_meet_endpoints_that_fail_and_none_does() {
    let args = TriesArgs {
        connects: 2_000,
        rate: 1_000.0,
        dead_rate: 10_000.0,
        dead_seconds: 1.0,
        alone: true,
        records: PathBuf::new(),
    };
    let measured = measure(&args, |line| println!("{line}")).unwrap();
    assert_eq!((measured.legs.len(), measured.dead.len()), (10, 2));
    for leg in &measured.legs {
        let asked = if leg.by_udp { args.connects / 10 } else { args.connects };
        assert_eq!((leg.served, leg.failed()), (asked, 0), "{leg}");
        // It takes a second to tell silence, and a machine that is busy has its time.
        let is_silent = leg.service == Health::Silent;
        assert_eq!(leg.p99_ms >= 900.0, is_silent, "{leg}");
    }
    for dead in &measured.dead {
        assert_eq!(dead.refused, dead.connects, "{dead}");
        assert!(dead.packets <= 4.01 && dead.packets >= 1.0, "{dead}");
    }
}
