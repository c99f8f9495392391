//! The clock for what lasts many seconds. Flows have ticks of jiffies ([`crate::flow::now`]).

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;

/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;

/// The coarse monotonic clock, in nanoseconds.
#[inline(always)]
pub fn nanoseconds() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}
