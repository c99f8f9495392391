//! Whether the agent is alive (H5): each of its parts shows that it is at work, and one that shows nothing for too long is named.
//!
//! It is about what a restart cures, a call that never returns, and about nothing else: what the kernel or the API server
//! refuses is no part of it.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A part at work.
#[derive(Clone, Copy, Debug)]
struct Sign {
    name: &'static str,
    /// When it last showed something.
    last: Instant,
    /// How many times longer than others it may show nothing.
    times: u32,
}

#[derive(Debug, Default)]
struct State {
    signs: BTreeMap<u64, Sign>,
    next: u64,
}

/// The parts that are at work; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Heartbeat(Arc<Mutex<State>>);

impl Heartbeat {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A part is at work from now on, until what is given back is dropped. It may show nothing for `times` the time that others
    /// may.
    pub fn part(&self, name: &'static str, times: u32) -> Beat {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.signs.insert(id, Sign { name, last: Instant::now(), times });
        Beat { heartbeat: self.clone(), id }
    }

    /// The parts that have shown nothing for longer than they may, and for how long.
    pub fn silent(&self, now: Instant, patience: Duration) -> Vec<(&'static str, Duration)> {
        let silence = |sign: &Sign| now.saturating_duration_since(sign.last);
        let is_silent = |sign: &&Sign| silence(sign) > patience.saturating_mul(sign.times);
        self.state().signs.values().filter(is_silent).map(|sign| (sign.name, silence(sign))).collect()
    }
}

/// A part at work.
#[derive(Debug)]
pub struct Beat {
    heartbeat: Heartbeat,
    id: u64,
}

impl Beat {
    /// The part shows that it goes on.
    pub fn beat(&self) {
        if let Some(sign) = self.heartbeat.state().signs.get_mut(&self.id) {
            sign.last = Instant::now();
        }
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.heartbeat.state().signs.remove(&self.id);
    }
}

static LOG: LazyLock<Heartbeat> = LazyLock::new(Heartbeat::default);

/// The writes to the log that are under way.
pub fn log() -> &'static Heartbeat {
    &LOG
}

/// Standard error, whose reader may stop to read: a write that hangs shows in [`log()`].
#[derive(Debug)]
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _under_way = LOG.part("a write to the log", 1);
        io::stderr().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// H5
    #[test]
    fn a_part_that_shows_nothing_for_too_long_is_named() {
        const SECOND: Duration = Duration::from_secs(1);
        let heartbeat = Heartbeat::default();
        let (quick, slow) = (heartbeat.part("quick", 1), heartbeat.part("slow", 5));
        let soon = Instant::now() + 2 * SECOND;
        assert!(heartbeat.silent(Instant::now(), SECOND).is_empty());
        let silent = heartbeat.silent(soon, SECOND);
        assert!(matches!(silent[..], [("quick", silence)] if silence > SECOND), "{silent:?}");
        quick.beat();
        assert!(heartbeat.silent(Instant::now(), SECOND).is_empty());
        let again = heartbeat.part("quick", 1);
        drop(again);
        assert_eq!(heartbeat.silent(soon, SECOND).len(), 1, "another of the same name has ended");
        drop((quick, slow));
        assert!(heartbeat.silent(soon, SECOND).is_empty(), "what has ended need not show anything");
    }
}
