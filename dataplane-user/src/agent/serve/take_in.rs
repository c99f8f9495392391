//! What comes in: changes of objects, their mistakes, and what stands in for them after a boot.

use super::Service;
use crate::compile::Complaint;
use crate::health::AUTOSCALER_TAINT;
use crate::model::{Change, Kind, Node, Object, Reference};
use crate::watch::events::{Event, Severity};
use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::SystemTime;

impl Service {
    pub(super) fn take_in(&mut self, change: Change) {
        let node_before = self.dataplane.store().own_node().cloned();
        match &change {
            Change::Unreadable { object, error } => {
                tracing::error!("{object}: {error}; what was known of it stays");
                self.metrics.unreadable.add(1);
                self.tell_about(object, "Unreadable", format!("{error}; what was known of it stays"));
            }
            Change::Applied(Object::Service(_)) => self.count_change(Kind::Service),
            Change::Applied(Object::EndpointSlice(_)) => self.count_change(Kind::EndpointSlice),
            Change::Deleted(object) => self.count_change(object.kind),
            Change::Applied(_) | Change::Replaced { .. } => {}
        }
        let was_outdated = self.dataplane.is_outdated();
        self.dataplane.take_in(change);
        if was_outdated && !self.dataplane.is_outdated() {
            tracing::info!("the API server has told everything: the snapshot is no longer served");
            self.metrics.snapshot_served.set(0);
        }
        self.follow_node(node_before.as_ref());
    }

    /// Whether the Node is there to stay (H1).
    fn follow_node(&self, before: Option<&Node>) {
        let node = self.dataplane.store().own_node();
        if node != before {
            let goes =
                |node: &Node| node.deleting || node.taints.iter().any(|taint| **taint == *AUTOSCALER_TAINT);
            // A Node that was there and is gone is deleted.
            self.health.eligible(node.is_some_and(|node| !goes(node)));
        }
    }

    fn count_change(&self, kind: Kind) {
        let metrics = &self.metrics;
        let (total, pending) = match kind {
            Kind::Service => (&metrics.service_changes, &metrics.service_changes_pending),
            Kind::EndpointSlice => (&metrics.endpoint_changes, &metrics.endpoint_changes_pending),
            Kind::Node | Kind::ServiceCidr => return,
        };
        total.add(1);
        pending.add(1);
    }

    pub(super) fn complain(&self, complaint: &Complaint) {
        tracing::warn!("{complaint}");
        self.tell_about(&complaint.object, complaint.reason.label(), complaint.text.clone());
    }

    /// Publishes an Event about an object that somebody got wrong (Z5).
    pub(super) fn tell_about(&self, object: &Reference, reason: &'static str, note: String) {
        let service = self.dataplane.store().service(&object.name);
        let uid = service.filter(|_| object.kind == Kind::Service).map(|service| service.uid.clone());
        self.watch.events().publish(Event {
            kind: object.kind,
            name: object.name.clone(),
            uid: uid.unwrap_or_default(),
            severity: Severity::Warning,
            reason,
            note,
        });
    }

    pub(super) fn count_complaints(&self) {
        let mut counts: BTreeMap<_, u64> = BTreeMap::new();
        for complaint in self.dataplane.complaints() {
            *counts.entry(complaint.reason.label()).or_default() += 1;
        }
        *self.metrics.complaints.lock().unwrap_or_else(PoisonError::into_inner) =
            counts.into_iter().collect();
    }

    /// After a boot, while the API server is away: serves what was known before.
    pub(super) fn serve_snapshot(&mut self) {
        let error = self.watch.status().trouble();
        let Some(snapshot) = self.keeping.ask(error.is_some()) else { return };
        let age = SystemTime::now().duration_since(snapshot.taken).unwrap_or_default();
        tracing::warn!(
            "serving {} objects of the snapshot {}, {} minutes old, until the API server has told everything: {}",
            snapshot.objects.len(),
            self.keeping.path(),
            age.as_secs() / 60,
            error.as_deref().unwrap_or("it takes long")
        );
        let node_before = self.dataplane.store().own_node().cloned();
        self.dataplane.take_snapshot(snapshot.objects);
        self.metrics.snapshot_served.set(1);
        self.follow_node(node_before.as_ref());
    }
}
