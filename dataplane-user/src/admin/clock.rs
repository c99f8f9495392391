//! The kernel's clock without a program: jiffies as `/proc/timer_list` tells them to root, or as they follow from the time
//! since the start. Containers are not shown that file.

use crate::expire::Clock;
use crate::kernel::clock::{jiffy, shift, tick_length};
use dataplane_common::flow::tick;
use std::io;
use std::time::Duration;

/// Jiffies begin so long before their lower 32 bits wrap (`INITIAL_JIFFIES`).
const BEGIN: Duration = Duration::from_secs(300);

/// The clock now, if it can be read.
pub fn read() -> Option<Clock> {
    let jiffy = jiffy().ok()?;
    let told = || parse(&std::fs::read_to_string("/proc/timer_list").ok()?);
    let jiffies = told().or_else(|| Some(since_start(uptime().ok()?, jiffy)))?;
    Some(Clock { now: tick(jiffies, shift(jiffy)), tick: tick_length(jiffy) })
}

/// The jiffies, as the file tells them.
fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("jiffies:")?.trim().parse().ok())
}

/// The jiffies that there should be so long after the start. They begin to count a moment later than the clock does.
fn since_start(uptime: Duration, jiffy: Duration) -> u64 {
    let jiffies = |time: Duration| (time.as_nanos() / jiffy.as_nanos()) as u64;
    (1 << 32) - jiffies(BEGIN) + jiffies(uptime)
}

/// The time since the start, without that in which the machine slept.
fn uptime() -> io::Result<Duration> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is as long as the kernel expects and outlives the call.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(now.tv_sec.try_into().unwrap_or_default(), now.tv_nsec.try_into().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jiffies_are_read_from_the_kernels_list() {
        let text = "Timer List Version: v0.10\nnow at 3907980000000 nsecs\n\njiffies: 4295869229\n";
        assert_eq!(parse(text), Some(4_295_869_229));
        assert_eq!(parse("nothing"), None);
    }

    /// The numbers are those of a real machine with 250 Hz.
    #[test]
    fn without_the_list_jiffies_follow_from_the_time_since_the_start() {
        let estimate = since_start(Duration::from_nanos(3_907_980_000_000), Duration::from_millis(4));
        let lag = estimate - 4_295_869_229;
        assert!(lag < 250, "{lag} jiffies");
        let years = Duration::from_secs(100 * 365 * 24 * 3_600);
        let jiffies = (1 << 32) + 100 * 365 * 24 * 3_600 * 1_000 - 300_000;
        assert_eq!(since_start(years, Duration::from_millis(1)), jiffies);
    }
}
