//! The kernel's clock without a program: jiffies as `/proc/timer_list` tells them, which only root can read.

use crate::expire::Clock;
use dataplane_common::flow::{TICK_SHIFT, tick};

/// Values of `CONFIG_HZ`: jiffies in a second.
const RATES: [i64; 4] = [100, 250, 300, 1_000];
/// Jiffies begin so many seconds before they have 2^32 (`INITIAL_JIFFIES`).
const BEGIN_SECONDS: i64 = 300;

/// The clock now, if it can be read.
pub(super) fn read() -> Option<Clock> {
    parse(&std::fs::read_to_string("/proc/timer_list").ok()?)
}

fn parse(text: &str) -> Option<Clock> {
    let number = |before: &str, after: &str| -> Option<i64> {
        text.lines().find_map(|line| line.strip_prefix(before)?.strip_suffix(after)?.trim().parse().ok())
    };
    let jiffies = number("jiffies:", "")?;
    let nanoseconds = number("now at ", " nsecs")?;
    // Of the possible rates, the one that fits the time since the start.
    let should_be = |rate: &i64| (1 << 32) - BEGIN_SECONDS * rate + nanoseconds / 1_000 * rate / 1_000_000;
    let rate = RATES.into_iter().min_by_key(|rate| (should_be(rate) - jiffies).abs())?;
    let ticks_per_second = rate as f64 / f64::from(1 << TICK_SHIFT);
    Some(Clock { now: tick(jiffies as u32), ticks_per_second })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_found_from_the_time_since_the_start() {
        let text = "Timer List Version: v0.10\nnow at 3907980000000 nsecs\n\njiffies: 4295869229\n";
        let clock = parse(text).unwrap();
        assert_eq!(clock.now, (4_295_869_229_u64 as u32) >> TICK_SHIFT);
        assert!((clock.ticks_per_second - 250.0 / 256.0).abs() < 1e-9);
        assert!(parse("nothing").is_none());
    }
}
