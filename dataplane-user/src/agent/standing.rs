//! The agent's own page for the command line (`portolan status`): what its parts know, put together when somebody asks.

use super::scrape::Scrape;
use crate::http::{Page, Pages, now};
use crate::model::ObjectName;
use crate::status::endpoints::{self, ServiceEndpoints};
use crate::status::{
    self, AgentStatus, Count, InterfaceStatus, SnapshotStatus, Source, WatchStatus, timestamp,
};
use crate::version;
use crate::watch::KindStatus;
use crate::watch::cluster::Answered;
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, oneshot};

/// How long the loop may take to answer.
const PATIENCE: Duration = Duration::from_secs(4);

/// A question to the loop, which alone has the objects.
pub(super) struct Question {
    /// The Service.
    pub(super) service: ObjectName,
    /// Where its endpoints are told; none if there is no such Service.
    pub(super) answer: oneshot::Sender<Option<ServiceEndpoints>>,
}

/// What is told to whoever asks by the agent's socket.
pub(super) struct Standing {
    pub(super) scrape: Arc<Scrape>,
    pub(super) node_name: Arc<str>,
    /// The API server that answered, where one is looked for.
    pub(super) found: Answered,
    pub(super) started: SystemTime,
    pub(super) questions: mpsc::Sender<Question>,
}

impl Standing {
    /// All pages of the socket.
    pub(super) fn pages(self) -> Pages {
        Arc::new(move |path| {
            let service = path.strip_prefix(endpoints::PATH).and_then(|name| name.split_once('/'));
            match (path, service) {
                (status::PATH, _) => now(json(&self.status())),
                (_, Some((namespace, name))) => {
                    let (service, questions) = (ObjectName::new(namespace, name), self.questions.clone());
                    Box::pin(async move { Arc::new(ask(questions, service).await) })
                }
                (_, None) => now(Page::not_found()),
            }
        })
    }

    fn status(&self) -> AgentStatus {
        let Scrape { metrics, health, .. } = &*self.scrape;
        let pending = [&metrics.service_changes_pending, &metrics.endpoint_changes_pending];
        let hanging = health.silent().into_iter();
        AgentStatus {
            version: version::text().to_owned(),
            pid: std::process::id(),
            started: timestamp(self.started),
            node: self.node_name.to_string(),
            trouble: health.trouble(),
            warnings: health.warnings(),
            node_eligible: health.is_eligible(),
            hanging: hanging.map(|(part, time)| format!("{part}, for {} s", time.as_secs())).collect(),
            source: self.source(),
            pending_changes: pending.iter().map(|number| number.get()).sum(),
            synced: moment(metrics.synced.get()),
            waiting_services: metrics.waiting.get(),
            complaints: self.complaints(),
            interfaces: self.interfaces(),
            pod_interfaces: metrics.pod_interfaces(),
            unattached_programs: health.count_unattached(),
            snapshot: SnapshotStatus {
                kept: moment(metrics.snapshot_kept.get()),
                served: metrics.snapshot_served.get() == 1,
                errors: metrics.snapshot_errors.get(),
            },
            private_pins: metrics.private_pins.get() == 1,
        }
    }

    fn source(&self) -> Source {
        let Some(source) = self.scrape.status.get() else { return Source::default() };
        let place = self.found.get().unwrap_or_else(|| source.place().to_string());
        let watch = |(kind, status): (_, KindStatus)| WatchStatus {
            kind: format!("{kind}"),
            listed: status.synced,
            connected_since: status.since.and_then(timestamp),
            last_heard: status.heard.and_then(timestamp),
            errors: status.errors,
            error: status.error,
            unavailable: status.unavailable,
        };
        Source { place, watches: source.all().into_iter().map(watch).collect() }
    }

    fn complaints(&self) -> Vec<Count> {
        let all = self.scrape.metrics.complaints().into_iter().filter(|(_, count)| *count > 0);
        all.map(|(reason, count)| Count { reason: reason.to_owned(), count }).collect()
    }

    fn interfaces(&self) -> Vec<InterfaceStatus> {
        let roles = self.scrape.metrics.interface_roles().into_iter();
        roles
            .map(|told| InterfaceStatus {
                interface: told.interface,
                role: told.role.to_owned(),
                reason: told.reason.to_owned(),
            })
            .collect()
    }
}

fn json(value: &impl Serialize) -> Page {
    match serde_json::to_value(value) {
        Ok(value) => Page::json(200, &value),
        Err(error) => Page::text(500, error.to_string()),
    }
}

async fn ask(questions: mpsc::Sender<Question>, service: ObjectName) -> Page {
    let (answer, answered) = oneshot::channel();
    let asked = async {
        questions.send(Question { service, answer }).await.ok()?;
        answered.await.ok()
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Some(Some(endpoints))) => json(&endpoints),
        Ok(Some(None)) => Page::not_found(),
        Ok(None) | Err(_) => Page::text(503, "the event loop does not answer\n"),
    }
}

/// A moment in seconds since 1970; 0: it never was.
fn moment(seconds: u64) -> Option<String> {
    (seconds > 0).then(|| timestamp(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))).flatten()
}
