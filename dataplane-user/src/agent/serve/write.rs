//! Tables into the kernel: what was written, what found no room, and what the kernel refused.

use super::{RETRY, Service};
use crate::agent::dataplane::{Flushed, Trigger};
use crate::agent::notify::{State, notify};
use crate::kernel::maps::MapError;
use crate::memory;
use crate::model::{Kind, ObjectName, Reference};
use crate::sync::{Outcome, Refused};
use crate::watch::events::reason;
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

/// How many Services that find no room at the same time are named.
const NAMED: usize = 10;

/// How long the node waits for its own routes to Services before it is said to be ready without them.
const ROUTES_WITHIN: Duration = Duration::from_secs(5);

impl Service {
    /// Writes what waits, unless the kernel refused a moment ago.
    pub(super) fn flush(&mut self) {
        if self.backs_off() {
            return;
        }
        if self.dataplane.is_writable() && self.dataplane.is_dirty() {
            self.metrics.queued.set_now();
        }
        let begun = Instant::now();
        match self.dataplane.flush(begun) {
            Ok(None) => {}
            Ok(Some(flushed)) => self.flushed(flushed, begun.elapsed()),
            Err(error) => self.failed(&error),
        }
        if self.dataplane.is_complete() && !self.dataplane.is_dirty() {
            let (taken, at) = self.taken;
            self.health.updated(taken, at);
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
        for Trigger { ipv6, time } in flushed.triggers {
            self.metrics.programming[usize::from(ipv6)].observe(now.duration_since(time).unwrap_or_default());
        }
        tracing::debug!(
            "{} entries in {} calls and {} µs",
            flushed.outcome.ops,
            flushed.outcome.calls,
            took.as_micros()
        );
        let ranges = self.dataplane.service_sources();
        self.routes.send_if_modified(|wanted| {
            let changed = wanted.ranges != ranges;
            wanted.ranges = ranges;
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
            self.finish_upgrade();
            self.ready = true;
            self.names_changed = true;
            let (ports, backends, frontends) = self.dataplane.mirror().0.sizes();
            tracing::info!(
                "{ports} service ports, {backends} backends and {frontends} frontends in {} ms",
                took.as_millis()
            );
            // Lists and their tables were whole in memory.
            memory::give_back();
            self.announcing = Some(Instant::now());
            self.announce();
        }
    }

    /// Says that the node is served, as soon as what it sends itself is as well.
    pub(super) fn announce(&mut self) {
        let Some(since) = self.announcing else { return };
        let routed =
            self.routes.is_closed() || self.routes.borrow().ranges.is_empty() || *self.routed.borrow();
        if routed || since.elapsed() >= ROUTES_WITHIN {
            self.announcing = None;
            self.health.following();
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
        let waiting: BTreeSet<_> = self.dataplane.mirror().0.waiting().cloned().collect();
        self.metrics.waiting.set(waiting.len() as u64);
        self.health.waiting(waiting.len());
        self.tell_who_waits(&outcome.refused, waiting);
    }

    /// Tells each Service that finds no room once: what the node serves beside it does not suffer (Z5), so health does not either.
    fn tell_who_waits(&mut self, refused: &[Refused], waiting: BTreeSet<ObjectName>) {
        let news: Vec<_> =
            refused.iter().filter(|refused| !self.refused.contains(&refused.service)).collect();
        for Refused { service, error } in news.iter().take(NAMED) {
            let note = format!("{error}; what was served of it goes on");
            tracing::error!("Service {service} waits: {note}");
            let object = Reference { kind: Kind::Service, name: service.clone() };
            self.tell_about(&object, reason::NO_ROOM, format!("its changes wait: {note}"));
        }
        if news.len() > NAMED {
            tracing::error!("{} Services wait for room", waiting.len());
        }
        self.refused = waiting;
    }

    /// Tries again what found no room, and after a refusal everything.
    pub(super) fn try_again(&mut self) {
        if self.backs_off() || (self.refused.is_empty() && self.backoff.is_none()) {
            return;
        }
        let (mirror, maps) = self.dataplane.mirror();
        match mirror.tick(maps, Instant::now()) {
            Ok(outcome) => {
                self.backoff = None;
                self.account(outcome);
            }
            Err(error) => self.failed(&error),
        }
    }

    pub(super) fn failed(&mut self, error: &MapError) {
        let [first, longest] = RETRY;
        let wait = self.backoff.map_or(first, |(wait, _)| (wait * 2).min(longest));
        self.backoff = Some((wait, Instant::now() + wait));
        self.metrics.sync_errors.add(1);
        self.health.refused(error.to_string());
        tracing::error!("{error}; trying again in {} ms, what is in the kernel stays", wait.as_millis());
    }
}
