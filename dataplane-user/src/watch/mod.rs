//! Where the objects come from: the Kubernetes API, or a folder of manifests.
//!
//! The only place that names `kube`. A source tells [`Change`]s over a channel, and nobody after it can tell which
//! source it was: once, when it has seen all there is, a [`Change::Replaced`] of each [`Kind`], then what changes. A
//! source never tells a deletion because of an error: what was known stays.

pub mod cluster;
pub mod events;
pub mod manifests;
pub mod names;
pub mod objects;
pub mod status;

use crate::model::{Change, Kind};
use crate::pending::Pending;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub use events::Events;
pub use status::{KindStatus, Status};

/// What to add to a log filter: the client reports each failure by itself, again and again, and the source says it once.
pub const LOG_FILTER: &str = "kube_client=off";

/// The kinds that every source tells.
pub const KINDS: [Kind; 4] = [Kind::Node, Kind::ServiceCidr, Kind::Service, Kind::EndpointSlice];

/// Which of the objects are told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of this machine's Node object: the only Node that is told.
    pub node_name: Arc<str>,
    /// Only Services with this value of the label of F2 are told; without it, only those without the label.
    pub service_proxy_name: Option<Arc<str>>,
}

impl Options {
    /// Whether a Service with this value of the label of F2 is this agent's to serve.
    fn serves(&self, proxy_name: Option<&str>) -> bool {
        proxy_name == self.service_proxy_name.as_deref()
    }
}

/// A source at work; it stops when this is dropped.
#[derive(Debug)]
pub struct Watch {
    status: Status,
    events: Events,
    tasks: Vec<JoinHandle<()>>,
}

impl Watch {
    /// How the source is.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Where Kubernetes Events can be published.
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Whether a part of the source has ended, which none ever should.
    pub fn has_ended(&self) -> bool {
        self.tasks.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Where the changes go; clones lead to the same place.
#[derive(Clone, Debug)]
pub struct Changes {
    sender: mpsc::Sender<Change>,
    pending: Pending,
}

/// Nobody listens any more.
#[derive(Debug)]
pub struct Closed;

impl Changes {
    /// Through this channel; `pending` is told of each change before it is sent.
    pub fn new(sender: mpsc::Sender<Change>, pending: Pending) -> Self {
        Self { sender, pending }
    }

    /// Sends a change, when there is room.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn send(&self, change: Change) -> Result<(), Closed> {
        // What waits for room was not sent: what is in the way is older.
        let permit = self.sender.reserve().await.map_err(|_| Closed)?;
        self.pending.sent(Instant::now());
        permit.send(change);
        Ok(())
    }
}

impl From<mpsc::Sender<Change>> for Changes {
    fn from(sender: mpsc::Sender<Change>) -> Self {
        Self::new(sender, Pending::default())
    }
}
