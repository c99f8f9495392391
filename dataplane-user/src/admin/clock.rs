//! The kernel's coarse clock without a program and without a right: what the programs write into flows, worked out from the
//! time since the start. `/proc/timer_list`, which tells jiffies, is masked in containers.

use crate::expire::Clock;
use dataplane_common::flow::{TICK_SHIFT, tick};

/// Jiffies begin so many seconds before they have 2^32 (`INITIAL_JIFFIES`).
const BEGIN_SECONDS: u64 = 300;
const NANOSECONDS: u64 = 1_000_000_000;

/// The clock now, within one tick of what programs read; `None` if the kernel does not tell the time.
///
/// Jiffies are counted from the kernel's monotonic clock, one for each period of its timer, which is the resolution of the
/// coarse clock (`TICK_NSEC`).
pub fn read() -> Option<Clock> {
    let period = nanoseconds(|time| {
        // SAFETY: `time` is a whole `timespec` that outlives the call.
        unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, time) }
    })?;
    let now = nanoseconds(|time| {
        // SAFETY: as above.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, time) }
    })?;
    at(now, period)
}

fn nanoseconds(ask: impl FnOnce(*mut libc::timespec) -> libc::c_int) -> Option<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let (0, Ok(seconds), Ok(rest)) =
        (ask(&raw mut time), u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec))
    else {
        return None;
    };
    Some(seconds * NANOSECONDS + rest)
}

/// The clock so many nanoseconds after the start, with a timer of this period.
fn at(now: u64, period: u64) -> Option<Clock> {
    let jiffies_in = |nanoseconds: u64| nanoseconds.checked_div(period);
    // As an unsigned number of 32 bits, of which the programs take the upper ones too.
    let begin = 0_u32.wrapping_sub(u32::try_from(BEGIN_SECONDS * rate(period)?).ok()?);
    let jiffies = begin.wrapping_add(jiffies_in(now)? as u32);
    let ticks_per_second = NANOSECONDS as f64 / period as f64 / f64::from(1 << TICK_SHIFT);
    Some(Clock { now: tick(jiffies), ticks_per_second })
}

/// `CONFIG_HZ`: the period is that of it, rounded.
fn rate(period: u64) -> Option<u64> {
    (NANOSECONDS + period / 2).checked_div(period)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane_common::flow::TICK_MASK;

    #[test]
    fn the_tick_is_worked_out_from_the_time_since_the_start() {
        // From /proc/timer_list of a machine with 250 Hz: 62 jiffies less than there would be, had they begun at once.
        let clock = at(3_907_980_000_000, 4_000_000).unwrap();
        let there = (4_295_869_229_u64 as u32) >> TICK_SHIFT;
        assert!(clock.now.wrapping_sub(there) & TICK_MASK <= 1, "{} {there}", clock.now);
        assert!((clock.ticks_per_second - 250.0 / 256.0).abs() < 1e-9);
    }

    #[test]
    fn every_rate_is_found_and_jiffies_may_wrap() {
        for (hz, period) in [(100, 10_000_000), (250, 4_000_000), (300, 3_333_333), (1_000, 1_000_000)] {
            assert_eq!(rate(period), Some(hz));
            // They wrap for the first time after five minutes.
            assert!(at(299 * NANOSECONDS, period).unwrap().now > TICK_MASK / 2);
            assert!(at(302 * NANOSECONDS, period).unwrap().now <= 302 * hz as u32 / 256);
        }
        assert!(at(1, 0).is_none());
    }

    #[test]
    fn the_time_is_told_without_any_right() {
        assert!(read().is_some_and(|clock| (0.3..4.0).contains(&clock.ticks_per_second)));
    }
}
