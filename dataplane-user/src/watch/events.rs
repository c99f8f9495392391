//! Kubernetes Events about objects, for those who run `kubectl describe`.
//!
//! To publish never waits and never fails: an Event that cannot be sent is dropped, for the same is in the log.

use crate::model::Kind;
use crate::model::ObjectName;
use std::sync::Arc;
use tokio::sync::mpsc;

/// How serious an Event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// For information.
    Normal,
    /// Something to look at.
    Warning,
}

/// Something to tell about an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    /// The object's kind.
    pub kind: Kind,
    /// Its name.
    pub name: ObjectName,
    /// Its `metadata.uid`, without which `kubectl describe` does not show the Event; empty if it is not known.
    pub uid: Arc<str>,
    /// How serious it is.
    pub severity: Severity,
    /// One word, such as `AddressRefused`.
    pub reason: &'static str,
    /// What happened and what to check.
    pub note: String,
}

/// Where Events are published. Clones share the way out.
#[derive(Clone, Debug, Default)]
pub struct Events {
    sender: Option<mpsc::Sender<Event>>,
}

impl Events {
    /// For a source that has no Events.
    pub fn none() -> Self {
        Self::default()
    }

    /// Publishes an Event, at some later time, unless the same was published a short while ago or there are too many.
    pub fn publish(&self, event: Event) {
        if let Some(sender) = &self.sender {
            // A full queue means that the API server is slow or away: the log has the line.
            let _ = sender.try_send(event);
        }
    }
}
