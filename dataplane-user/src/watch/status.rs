//! How a source is: what has been listed, what is connected, and what went wrong last.

use super::KINDS;
use crate::model::Kind;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// How the source of one kind is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindStatus {
    /// Whether all objects of this kind were told once.
    pub synced: bool,
    /// Whether changes are being followed right now.
    pub connected: bool,
    /// Since when that is so without a failure.
    pub since: Option<SystemTime>,
    /// When the source last told anything, if only that nothing changed.
    pub heard: Option<SystemTime>,
    /// Whether the source does not have this kind, or does not let us read it, and the agent does without.
    pub unavailable: bool,
    /// What is wrong now, and what to check.
    pub error: Option<String>,
    /// How often the kind was listed.
    pub lists: u64,
    /// How many errors there were.
    pub errors: u64,
}

impl KindStatus {
    fn connect(&mut self) {
        let now = SystemTime::now();
        self.connected = true;
        self.heard = Some(now);
        self.since.get_or_insert(now);
    }
}

/// A handle to the state of a source; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Status {
    kinds: Arc<Mutex<BTreeMap<Kind, KindStatus>>>,
    place: Arc<Mutex<Arc<str>>>,
}

impl Status {
    /// Where the source is, in words; empty before the first question to it.
    pub fn place(&self) -> Arc<str> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes where the source is.
    pub(super) fn set_place(&self, place: impl Into<Arc<str>>) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place.into();
    }

    /// How the source of `kind` is.
    pub fn of(&self, kind: Kind) -> KindStatus {
        self.all().remove(&kind).unwrap_or_default()
    }

    /// How the source of each kind is.
    pub fn all(&self) -> BTreeMap<Kind, KindStatus> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether all objects of every kind were told once.
    pub fn is_synced(&self) -> bool {
        let all = self.all();
        KINDS.iter().all(|kind| all.get(kind).is_some_and(|status| status.synced))
    }

    /// What is wrong with any kind but those that the agent does without.
    pub fn trouble(&self) -> Option<String> {
        self.all().into_values().filter(|status| !status.unavailable).find_map(|status| status.error)
    }

    pub(super) fn change(&self, kind: Kind, change: impl FnOnce(&mut KindStatus)) {
        change(self.kinds.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default());
    }

    /// Notes that all objects of `kind` were told.
    pub(super) fn listed(&self, kind: Kind) {
        self.change(kind, |status| {
            status.lists += 1;
            status.connect();
            (status.synced, status.unavailable) = (true, false);
        });
    }

    /// Notes that the source said something.
    pub(super) fn heard(&self, kind: Kind) {
        self.change(kind, |status| status.heard = Some(SystemTime::now()));
    }

    /// Notes that `action` failed, and why. Gives back whether the log should say so: not if the same was said before,
    /// of this kind or of another.
    pub(super) fn failed(&self, kind: Kind, action: &str, why: &str) -> bool {
        let is_known =
            self.all().values().any(|status| status.error.as_deref().is_some_and(|e| e.ends_with(why)));
        self.change(kind, |status| {
            status.errors += 1;
            (status.connected, status.since) = (false, None);
            status.error = Some(format!("{action}: {why}"));
        });
        !is_known
    }

    /// Notes that the source answers. Gives back whether that is news: something failed, and nothing does any more.
    pub(super) fn answered(&self, kind: Kind) -> bool {
        let mut was_failing = false;
        self.change(kind, |status| {
            was_failing = status.error.take().is_some();
            status.connect();
        });
        was_failing && self.all().values().all(|status| status.error.is_none() || status.unavailable)
    }
}
