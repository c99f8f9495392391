//! How many answers that say no a CPU gives (RFC 4443 section 2.4 f, RFC 1812 section 4.3.2.8): beyond it there is silence, which is
//! counted. A flood is not answered one for one.
//!
//! Each rate is kept by one word, the moment up to which answers have been given, were they given out evenly (the generic cell rate
//! algorithm, ITU-T I.371). It may lie ahead of now by as much as may come at once.

use crate::clock::{SECOND, nanoseconds};
use crate::maps::{ANSWERS, SERVICE_TRIES};
use crate::{atomic, flow};
use dataplane_common::Addr;
use dataplane_common::answers::{ICMP, RESETS, by_source};
use dataplane_common::kept::{TURNED_IN_A_TICK, Tries};

/// A rate.
#[derive(Clone, Copy)]
struct Rate {
    /// Answers in a second.
    per_second: u64,
    /// Answers that may come at once.
    at_once: u64,
}

/// TCP resets of one CPU.
const RESET_RATE: Rate = Rate { per_second: 20_000, at_once: 2_000 };
/// ICMP errors of one CPU.
const ICMP_RATE: Rate = Rate { per_second: 1_000, at_once: 1_000 };
/// Those to the sources of one hash: one of them cannot have all.
const SOURCE_RATE: Rate = Rate { per_second: 250, at_once: 500 };

/// Whether another TCP reset may be sent now.
#[inline(always)]
pub fn allows_reset() -> bool {
    let now = nanoseconds();
    let Some(at) = after(RESETS, RESET_RATE, now) else { return false };
    take(RESETS, at);
    true
}

/// Whether another ICMP error may be sent to this source now.
#[inline(always)]
pub fn allows_icmp(source: &Addr) -> bool {
    let (now, its) = (nanoseconds(), by_source(source));
    let (Some(of_all), Some(of_source)) = (after(ICMP, ICMP_RATE, now), after(its, SOURCE_RATE, now)) else {
        return false;
    };
    take(ICMP, of_all);
    take(its, of_source);
    true
}

/// The moment up to which answers are given with another one; `None` if that is too far ahead.
#[inline(always)]
fn after(index: u32, rate: Rate, now: u64) -> Option<u64> {
    let given = ANSWERS.get_ptr_mut(index)?;
    // SAFETY: an element of this CPU alone.
    let given = unsafe { given.read_volatile() }.max(now);
    let one = SECOND / rate.per_second;
    (given + one <= now + one * rate.at_once).then_some(given + one)
}

/// Whether another refusal of a flow of this service port may be turned round in this tick (L5).
#[inline(always)]
pub fn allows_turn(service: u32) -> bool {
    let Some(tries) = SERVICE_TRIES.get_ptr_mut(&service) else { return true };
    // SAFETY: an element of a map, valid until the program ends; one aligned word.
    unsafe {
        let (word, now) = (&raw mut (*tries).turned, flow::now());
        let seen = word.read_volatile();
        if (seen >> u32::BITS) as u32 != now {
            // Whoever comes second counts on with the first.
            atomic::compare_exchange(word, seen, Tries::in_tick(now, 0));
        }
        (atomic::fetch_add(word, 1) as u32) < TURNED_IN_A_TICK
    }
}

#[inline(always)]
fn take(index: u32, at: u64) {
    if let Some(given) = ANSWERS.get_ptr_mut(index) {
        // SAFETY: an element of this CPU alone.
        unsafe { given.write_volatile(at) };
    }
}
