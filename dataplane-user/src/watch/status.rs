//! How a source is: what has been listed, what is connected, and what went wrong last.

use super::KINDS;
use crate::model::Kind;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// How the source of one kind is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindStatus {
    /// Whether all objects of this kind were told once.
    pub synced: bool,
    /// Whether changes are being followed right now.
    pub connected: bool,
    /// Whether the source does not have this kind, or does not let us read it, and the agent does without.
    pub unavailable: bool,
    /// What is wrong now, and what to check.
    pub error: Option<String>,
    /// How often the kind was listed.
    pub lists: u64,
    /// How many errors there were.
    pub errors: u64,
}

/// A handle to the state of a source; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<BTreeMap<Kind, KindStatus>>>);

impl Status {
    /// How the source of `kind` is.
    pub fn of(&self, kind: Kind) -> KindStatus {
        self.all().remove(&kind).unwrap_or_default()
    }

    /// How the source of each kind is.
    pub fn all(&self) -> BTreeMap<Kind, KindStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether all objects of every kind were told once.
    pub fn is_synced(&self) -> bool {
        let all = self.all();
        KINDS.iter().all(|kind| all.get(kind).is_some_and(|status| status.synced))
    }

    pub(super) fn change(&self, kind: Kind, change: impl FnOnce(&mut KindStatus)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default());
    }

    /// Notes that all objects of `kind` were told.
    pub(super) fn listed(&self, kind: Kind) {
        self.change(kind, |status| {
            status.lists += 1;
            (status.synced, status.connected, status.unavailable) = (true, true, false);
        });
    }

    /// Notes that `action` failed, and why. Gives back whether the log should say so: not if the same was said before,
    /// of this kind or of another.
    pub(super) fn failed(&self, kind: Kind, action: &str, why: &str) -> bool {
        let is_known =
            self.all().values().any(|status| status.error.as_deref().is_some_and(|e| e.ends_with(why)));
        self.change(kind, |status| {
            status.errors += 1;
            status.connected = false;
            status.error = Some(format!("{action}: {why}"));
        });
        !is_known
    }

    /// Notes that the source answers. Gives back whether that is news: something failed, and nothing does any more.
    pub(super) fn answered(&self, kind: Kind) -> bool {
        let mut was_failing = false;
        self.change(kind, |status| {
            was_failing = status.error.take().is_some();
            status.connected = true;
        });
        was_failing && self.all().values().all(|status| status.error.is_none() || status.unavailable)
    }
}
