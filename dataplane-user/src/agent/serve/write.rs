//! Tables into the kernel: what was written, what found no room, and what the kernel refused.

use super::{RETRY, Service};
use crate::agent::dataplane::Flushed;
use crate::agent::notify::{State, notify};
use crate::kernel::maps::MapError;
use crate::memory;
use crate::sync::Outcome;
use std::time::{Duration, Instant, SystemTime};

impl Service {
    /// Writes what waits, unless the kernel refused a moment ago.
    pub(super) fn flush(&mut self) {
        if self.backoff.is_some_and(|(_, until)| Instant::now() < until) {
            return;
        }
        if self.dataplane.is_writable() && self.dataplane.is_dirty() {
            self.health.queued();
            self.metrics.queued.set_now();
        }
        let begun = Instant::now();
        match self.dataplane.flush(begun) {
            Ok(None) => {}
            Ok(Some(flushed)) => self.flushed(flushed, begun.elapsed()),
            Err(error) => self.failed(&error),
        }
        if !self.dataplane.is_dirty() {
            self.metrics.service_changes_pending.set(0);
            self.metrics.endpoint_changes_pending.set(0);
        }
        for complaint in self.dataplane.new_complaints() {
            self.complain(&complaint);
        }
    }

    fn flushed(&mut self, flushed: Flushed, took: Duration) {
        self.backoff = None;
        self.metrics.sync.observe(took);
        let now = SystemTime::now();
        for trigger in flushed.triggers {
            self.metrics.programming.observe(now.duration_since(trigger).unwrap_or_default());
        }
        tracing::debug!(
            "{} entries in {} calls and {} µs",
            flushed.outcome.ops,
            flushed.outcome.calls,
            took.as_micros()
        );
        let ranges = self.dataplane.service_sources();
        self.road.send_if_modified(|road| {
            let changed = road.ranges != ranges;
            road.ranges = ranges;
            changed
        });
        self.health_checks.set(flushed.health_checks);
        if let Some(addresses) = flushed.node_port_addresses {
            self.health_checks.set_addresses(addresses);
        }
        self.endpoints_changed |= flushed.outcome.ops > 0;
        self.account(flushed.outcome);
        self.count_complaints();
        if !self.ready {
            self.ready = true;
            self.names_changed = true;
            let (ports, backends, frontends) = self.dataplane.mirror().0.sizes();
            tracing::info!(
                "{ports} service ports, {backends} backends and {frontends} frontends in {} ms",
                took.as_millis()
            );
            self.health.serving();
            // Lists and their tables were whole in memory.
            memory::give_back();
            println!("ready");
            notify(State::Ready);
        }
    }

    /// Takes over what `sync` says, and tells who found no room.
    pub(super) fn account(&mut self, outcome: Outcome) {
        self.metrics.ops.add(outcome.ops as u64);
        self.metrics.calls.add(outcome.calls);
        self.metrics.repairs.add(outcome.repaired as u64);
        self.metrics.synced.set_now();
        self.names_changed |= outcome.names_changed;
        let waiting = self.dataplane.mirror().0.waiting().count();
        self.metrics.waiting.set(waiting as u64);
        if waiting > self.refused {
            for refused in outcome.refused.iter().take(10) {
                tracing::error!(
                    "Service {} waits: {}; what was served of it goes on",
                    refused.service,
                    refused.error
                );
            }
            if outcome.refused.len() > 10 {
                tracing::error!("{} Services wait for room", outcome.refused.len());
            }
        }
        self.refused = waiting;
        match outcome.refused.first() {
            Some(refused) => self.health.fault(refused.error.to_string()),
            None if waiting == 0 => self.health.updated(),
            None => {}
        }
    }

    pub(super) fn failed(&mut self, error: &MapError) {
        let [first, longest] = RETRY;
        let wait = self.backoff.map_or(first, |(wait, _)| (wait * 2).min(longest));
        self.backoff = Some((wait, Instant::now() + wait));
        self.metrics.sync_errors.add(1);
        self.health.fault(error.to_string());
        tracing::error!("{error}; trying again in {} ms, what is in the kernel stays", wait.as_millis());
    }
}
