//! Kubernetes Events about objects, for those who run `kubectl describe`.
//!
//! To publish never waits and never fails: an Event that cannot be sent is dropped, for the same is in the log.

use super::cluster::Access;
use crate::model::{Kind, ObjectName};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{self, EventType, Recorder, Reporter};
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Events that wait to be sent; more are dropped.
const QUEUE: usize = 64;
/// The same Event is not published again for so long.
const REPEAT: Duration = Duration::from_secs(600);
/// Events that may be published at once.
const BURST: u32 = 25;
/// Time after which one more may be.
const REFILL: Duration = Duration::from_secs(2);
/// How long the API server may take for one.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the API allows a note to hold, in bytes.
const NOTE: usize = 1024;

/// Reasons of Events besides those of complaints about objects ([`crate::compile::ComplaintReason`]).
pub mod reason {
    /// A Service finds no room in a table.
    pub const NO_ROOM: &str = "NoRoom";
    /// A program cannot be attached.
    pub const PROGRAM_NOT_ATTACHED: &str = "ProgramNotAttached";
    /// A health check port cannot be had. kube-proxy's name for it.
    pub const HEALTH_CHECK_PORT: &str = "FailedToStartServiceHealthcheck";
    /// Another Service proxy has come to the node.
    pub const ANOTHER_PROXY: &str = "AnotherProxy";
    /// All of them.
    pub const ALL: [&str; 4] = [NO_ROOM, PROGRAM_NOT_ATTACHED, HEALTH_CHECK_PORT, ANOTHER_PROXY];
}

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

    /// To an API server, by the task that is given back.
    pub(super) fn to(access: Access, node_name: &str) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let reporter = Reporter { controller: "portolan".to_owned(), instance: Some(node_name.to_owned()) };
        (Self { sender: Some(sender) }, publish(access, reporter, queue))
    }

    /// Publishes an Event, at some later time, unless the same was published a short while ago or there are too many.
    pub fn publish(&self, event: Event) {
        if let Some(sender) = &self.sender {
            // A full queue means that the API server is slow or away: the log has the line.
            let _ = sender.try_send(event);
        }
    }
}

async fn publish(access: Access, reporter: Reporter, mut queue: mpsc::Receiver<Event>) {
    let mut limit = Limit::new(Instant::now());
    let mut complained = false;
    let mut known: Option<(Arc<str>, Recorder)> = None;
    while let Some(event) = queue.recv().await {
        if !limit.allows(&event, Instant::now()) {
            continue;
        }
        let (event, object) = (described(&event), object(&event));
        let session = access.session().await;
        // It knows what it published: another one is made for another client only.
        if !known.as_ref().is_some_and(|(server, _)| Arc::ptr_eq(server, &session.server)) {
            known = Some((session.server, Recorder::new(session.client, reporter.clone())));
        }
        let Some((_, recorder)) = &known else { continue };
        let error = match tokio::time::timeout(PATIENCE, recorder.publish(&event, &object)).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if !std::mem::replace(&mut complained, true) {
            tracing::warn!(
                "Events are not published: {error}: the role needs the verb create on events.events.k8s.io"
            );
        }
    }
}

/// Which Events are worth sending.
#[derive(Debug)]
struct Limit {
    published: HashMap<u64, Instant>,
    /// The time at which `BURST` would be allowed again, if nothing were published.
    full_at: Instant,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { published: HashMap::new(), full_at: now }
    }

    fn allows(&mut self, event: &Event, now: Instant) -> bool {
        let mut hasher = DefaultHasher::new();
        event.hash(&mut hasher);
        let hash = hasher.finish();
        self.published.retain(|_, published| now.duration_since(*published) < REPEAT);
        let full_at = self.full_at.max(now) + REFILL;
        if self.published.contains_key(&hash) || full_at > now + REFILL * BURST {
            return false;
        }
        self.full_at = full_at;
        self.published.insert(hash, now);
        true
    }
}

fn described(event: &Event) -> events::Event {
    let mut end = event.note.len().min(NOTE);
    while !event.note.is_char_boundary(end) {
        end -= 1;
    }
    events::Event {
        type_: match event.severity {
            Severity::Normal => EventType::Normal,
            Severity::Warning => EventType::Warning,
        },
        reason: event.reason.to_owned(),
        note: Some(event.note[..end].to_owned()),
        action: "Program".to_owned(),
        secondary: None,
    }
}

fn object(event: &Event) -> ObjectReference {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let api_version = match event.kind {
        Kind::Service | Kind::Node => "v1",
        Kind::EndpointSlice => "discovery.k8s.io/v1",
        Kind::ServiceCidr => "networking.k8s.io/v1",
    };
    ObjectReference {
        api_version: Some(api_version.to_owned()),
        kind: Some(event.kind.to_string()),
        name: Some(event.name.name.to_string()),
        namespace: some(&event.name.namespace),
        uid: some(&event.uid),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(note: &str) -> Event {
        Event {
            kind: Kind::Service,
            name: ObjectName::new("shop", "web"),
            uid: "".into(),
            severity: Severity::Warning,
            reason: "Test",
            note: note.to_owned(),
        }
    }

    #[test]
    fn the_same_event_is_published_once_in_a_while() {
        let now = Instant::now();
        let mut limit = Limit::new(now);
        assert!(limit.allows(&event("a"), now));
        assert!(!limit.allows(&event("a"), now + REPEAT / 2));
        assert!(limit.allows(&event("b"), now));
        assert!(limit.allows(&event("a"), now + REPEAT));
    }

    #[test]
    fn a_flood_of_events_is_cut_off() {
        let now = Instant::now();
        let mut limit = Limit::new(now);
        let allowed = |limit: &mut Limit, now| {
            (0..1000).filter(|n| limit.allows(&event(&format!("{n}{now:?}")), now)).count()
        };
        assert_eq!(allowed(&mut limit, now), BURST as usize);
        assert_eq!(allowed(&mut limit, now + 3 * REFILL), 3);
        assert_eq!(allowed(&mut limit, now + 1000 * REFILL), BURST as usize);
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let note = described(&event(&"ä".repeat(NOTE))).note.unwrap();
        assert_eq!(note.len(), NOTE);
        assert_eq!(described(&event(&format!("x{}", "ä".repeat(NOTE)))).note.unwrap().len(), NOTE - 1);
    }

    #[tokio::test]
    async fn to_publish_without_an_api_server_does_nothing() {
        Events::none().publish(event("a"));
    }
}
