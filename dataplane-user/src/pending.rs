//! Since when changes are on their way: from the moment at which a source has one to tell to the moment at which it is in the
//! kernel. The source notes the first, so that the wait shows also where the event loop takes up nothing any more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
struct State {
    /// How many were sent.
    sent: u64,
    /// Since when the oldest that is not written may have been waiting.
    oldest: Option<Instant>,
}

/// The changes that are on their way; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Pending(Arc<Mutex<State>>);

impl Pending {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change is sent.
    pub fn sent(&self, now: Instant) {
        let mut state = self.state();
        state.sent += 1;
        state.oldest.get_or_insert(now);
    }

    /// The first `taken` of all changes are written; they were taken up at the moment `at`. What was sent later may have been
    /// waiting since.
    pub fn written(&self, taken: u64, at: Instant) {
        let mut state = self.state();
        state.oldest = (state.sent > taken).then_some(at);
    }

    /// Since when a change has been waiting, if one has.
    pub fn since(&self) -> Option<Instant> {
        self.state().oldest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// H2
    #[test]
    fn the_wait_begins_with_the_sender_and_ends_with_the_last_change_that_is_written() {
        let pending = Pending::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(pending.since(), None);
        pending.sent(at(1));
        pending.sent(at(2));
        assert_eq!(pending.since(), Some(at(1)));
        // Two were taken up; a third came while they were written.
        pending.sent(at(4));
        pending.written(2, at(3));
        assert_eq!(pending.since(), Some(at(3)));
        pending.written(3, at(5));
        assert_eq!(pending.since(), None);
    }
}
