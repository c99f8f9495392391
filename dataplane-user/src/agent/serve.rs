//! The loop: changes in, tables written, signals heard. Everything that waits is tried again; only a signal ends it.

use super::dataplane::{Dataplane, Flushed};
use super::keep::Keeping;
use super::notify::{State, notify};
use crate::admin::names::Names;
use crate::compile::Complaint;
use crate::config::AgentArgs;
use crate::expire::{self, IdleTimes, Sweep};
use crate::health::{AUTOSCALER_TAINT, Health};
use crate::health_checks::HealthChecks;
use crate::kernel::clock::Clock;
use crate::kernel::links::{Choice, Interfaces};
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::sockets::{self, SocketError};
use crate::metrics::{Metrics, Ports, SERIES};
use crate::model::{Change, Kind, Object, Reference};
use crate::sync::{LingeringBits, Outcome};
use crate::watch::Watch;
use crate::watch::events::{Event, Severity};
use anyhow::{Result, bail};
use dataplane_common::tables::{
    self, Backends, Closing, Established, Frontends, HalfOpen, SocketPeers, Table as _, TableKind,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

/// How many changes are taken in before their tables are written.
const BATCH: usize = 256;
/// Time between tries of what found no room, and between looks at what is due.
const TICK: Duration = Duration::from_secs(1);
/// Time between two sweeps of the flow tables.
const SWEEP: Duration = Duration::from_secs(15);
/// Time to the next audit after one that had to repair something.
const AUDIT_AGAIN: Duration = Duration::from_secs(10);
/// The first and the longest wait after the kernel refused a write.
const RETRY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// Filter bits that nothing needs, and how many entries each table has that was walked.
type Sweeping = JoinHandle<Result<(LingeringBits, Vec<(&'static str, usize)>), MapError>>;

/// The dataplane and all that is told about it.
pub(super) struct Service {
    dataplane: Dataplane<KernelMaps>,
    watch: Watch,
    keeping: Keeping,
    health: Arc<Health>,
    health_checks: Arc<HealthChecks>,
    metrics: Arc<Metrics>,
    clock: Arc<Clock>,
    idle: IdleTimes,
    audit_period: Duration,
    audited: Instant,
    /// The last audit had to repair something: the next tells whether that goes on (H2).
    audit_soon: bool,
    swept: Instant,
    sweeping: Option<Sweeping>,
    /// After a refusal: how long to wait, and until when.
    backoff: Option<(Duration, Instant)>,
    ready: bool,
    /// The kernel held nothing when this agent began: after a boot.
    booted: bool,
    /// The pin folder, by which the command line finds the names of service ports.
    bpffs: PathBuf,
    names_changed: bool,
    /// `--metrics-max-series`.
    max_series: usize,
    /// The Services that found no room, as far as that was told.
    refused: usize,
    /// Endpoints changed since sockets were last looked through.
    sockets_due: bool,
}

/// Who is told what becomes of the dataplane.
pub(super) struct Told {
    pub(super) health: Arc<Health>,
    pub(super) health_checks: Arc<HealthChecks>,
    pub(super) metrics: Arc<Metrics>,
}

impl Service {
    pub(super) fn new(
        mut dataplane: Dataplane<KernelMaps>,
        watch: Watch,
        keeping: Keeping,
        Told { health, health_checks, metrics }: Told,
        clock: Clock,
        args: &AgentArgs,
    ) -> Self {
        let (_, _, frontends) = dataplane.mirror().0.sizes();
        if frontends > 0 {
            tracing::info!("{frontends} frontends of an earlier agent are in the kernel and served");
            health.serving();
        }
        let idle = IdleTimes {
            established: args.conntrack_tcp_timeout_established,
            udp: args.conntrack_udp_timeout_stream,
            ..IdleTimes::default()
        };
        Self {
            dataplane,
            watch,
            keeping,
            health,
            health_checks,
            metrics,
            clock: Arc::new(clock),
            idle,
            audit_period: args.audit_period,
            audited: Instant::now(),
            audit_soon: false,
            swept: Instant::now(),
            sweeping: None,
            backoff: None,
            ready: false,
            booted: frontends == 0,
            bpffs: args.bpffs.clone(),
            names_changed: false,
            max_series: args.metrics_max_series,
            refused: 0,
            sockets_due: true,
        }
    }

    /// Until SIGTERM or SIGINT.
    pub(super) async fn run(
        mut self,
        mut changes: mpsc::Receiver<Change>,
        mut interfaces: watch::Receiver<Interfaces>,
        choice: Choice,
    ) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            tokio::select! {
                biased;
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {
                    notify(State::Reloading);
                    self.audit();
                    notify(State::Ready);
                }
                _ = tick.tick() => self.tick().await,
                changed = interfaces.changed() => {
                    changed?;
                    let addresses = super::own_addresses(&interfaces.borrow_and_update(), &choice);
                    self.dataplane.set_addresses(addresses);
                    self.flush();
                }
                count = changes.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        bail!("the source of objects ended: this is a fault of portolan");
                    }
                    batch.drain(..).for_each(|change| self.take_in(change));
                    self.flush();
                }
            }
        }
        notify(State::Stopping);
        if self.dataplane.is_current() {
            self.keeping.end(self.dataplane.store()).await;
        }
        tracing::info!("ending; the programs and their tables stay");
        Ok(())
    }

    fn take_in(&mut self, change: Change) {
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
    fn follow_node(&self, before: Option<&crate::model::Node>) {
        let node = self.dataplane.store().own_node();
        if node != before {
            let goes = |node: &crate::model::Node| {
                node.deleting || node.taints.iter().any(|taint| **taint == *AUTOSCALER_TAINT)
            };
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

    /// Writes what waits, unless the kernel refused a moment ago.
    fn flush(&mut self) {
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
        self.health_checks.set(flushed.health_checks);
        if let Some(addresses) = flushed.node_port_addresses {
            self.health_checks.set_addresses(addresses);
        }
        self.sockets_due |= flushed.outcome.ops > 0;
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
            println!("ready");
            notify(State::Ready);
        }
    }

    /// Takes over what `sync` says, and tells who found no room.
    fn account(&mut self, outcome: Outcome) {
        self.metrics.ops.add(outcome.ops as u64);
        self.metrics.calls.add(outcome.calls);
        self.metrics.repairs.add(outcome.repaired as u64);
        self.metrics.synced.set_now();
        self.names_changed |= outcome.names_changed;
        let (ports, backends, frontends) = self.dataplane.mirror().0.sizes();
        for (number, size) in self.metrics.sizes.iter().zip([ports, backends, frontends]) {
            number.set(size as u64);
        }
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

    fn failed(&mut self, error: &MapError) {
        let [first, longest] = RETRY;
        let wait = self.backoff.map_or(first, |(wait, _)| (wait * 2).min(longest));
        self.backoff = Some((wait, Instant::now() + wait));
        self.metrics.sync_errors.add(1);
        self.health.fault(error.to_string());
        tracing::error!("{error}; trying again in {} ms, what is in the kernel stays", wait.as_millis());
    }

    fn complain(&self, complaint: &Complaint) {
        tracing::warn!("{complaint}");
        self.tell_about(&complaint.object, complaint.reason.label(), complaint.text.clone());
    }

    /// Publishes an Event about an object that somebody got wrong (Z5).
    fn tell_about(&self, object: &Reference, reason: &'static str, note: String) {
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

    fn count_complaints(&self) {
        let mut counts: BTreeMap<_, u64> = BTreeMap::new();
        for complaint in self.dataplane.complaints() {
            *counts.entry(complaint.reason.label()).or_default() += 1;
        }
        *self.metrics.complaints.lock().unwrap_or_else(PoisonError::into_inner) =
            counts.into_iter().collect();
    }

    /// After a boot, while the API server is away: serves what was known before.
    fn serve_snapshot(&mut self) {
        let error = self.watch.status().all().into_values().find_map(|status| status.error);
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

    async fn tick(&mut self) {
        if self.booted && !self.dataplane.is_complete() && !self.dataplane.is_current() {
            self.serve_snapshot();
        }
        self.flush();
        if !self.dataplane.is_complete() || self.backoff.is_some_and(|(_, until)| Instant::now() < until) {
            return;
        }
        if self.refused > 0 || self.backoff.is_some() {
            let (mirror, maps) = self.dataplane.mirror();
            match mirror.tick(maps, Instant::now()) {
                Ok(outcome) => {
                    self.backoff = None;
                    self.account(outcome);
                }
                Err(error) => return self.failed(&error),
            }
        }
        let due = if self.audit_soon { AUDIT_AGAIN.min(self.audit_period) } else { self.audit_period };
        if !due.is_zero() && self.audited.elapsed() >= due {
            self.audit();
        }
        if self.names_changed {
            self.names_changed = false;
            self.write_names();
            let names = self.dataplane.mirror().0.names();
            let ports = Ports::new(names, self.max_series / SERIES);
            self.metrics.set_ports(ports);
            self.fill(&[]);
        }
        if std::mem::take(&mut self.sockets_due) {
            let lacking = self.dataplane.mirror().0.without_local_endpoints();
            for (number, lacking) in self.metrics.without_local_endpoints.iter().zip(lacking) {
                number.set(lacking as u64);
            }
            self.close_orphans();
        }
        self.sweep().await;
        if self.dataplane.is_current() {
            self.keeping.keep(self.dataplane.store()).await;
        }
    }

    /// Beside the loop: a node's own UDP sockets do not follow their endpoints by themselves (C1).
    fn close_orphans(&mut self) {
        let maps = self.dataplane.mirror().1.clone();
        tokio::task::spawn_blocking(move || {
            let closed = maps
                .map::<SocketPeers>()
                .and_then(|peers| Ok((peers, maps.map::<Backends>()?)))
                .map_err(SocketError::from)
                .and_then(|(peers, backends)| sockets::close_orphans(&peers, &backends));
            match closed {
                Ok(0) => {}
                Ok(closed) => tracing::info!("closed {closed} UDP sockets whose endpoint is gone"),
                Err(error) => tracing::warn!("{error}"),
            }
        });
    }

    /// Beside the loop, and not for every change: people read it.
    fn write_names(&mut self) {
        let names = Names::new(self.dataplane.mirror().0.names());
        let bpffs = self.bpffs.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = names.write(&bpffs) {
                tracing::warn!("cannot write the names of Services for the command line: {error}");
            }
        });
    }

    /// Reads the kernel's tables again and repairs what differs (H2).
    fn audit(&mut self) {
        self.audited = Instant::now();
        let (mirror, maps) = self.dataplane.mirror();
        let begun = Instant::now();
        let result = mirror.audit(maps, begun);
        if let Ok(repaired) = result {
            self.health.audited(repaired);
            self.audit_soon = repaired > 0;
        }
        match result {
            Ok(0) => tracing::debug!("audit: nothing to repair, {} ms", begun.elapsed().as_millis()),
            Ok(repaired) => {
                tracing::warn!("audit: repaired {repaired} entries. Does something else write the maps?");
                self.metrics.repairs.add(repaired as u64);
            }
            Err(error) => return self.failed(&error),
        }
        self.metrics.audits.add(1);
    }

    /// Removes idle flows from time to time, beside the loop; and clears the filter bits that nothing needs any more.
    async fn sweep(&mut self) {
        match self.sweeping.take() {
            Some(sweeping) if !sweeping.is_finished() => self.sweeping = Some(sweeping),
            Some(sweeping) => match sweeping.await {
                Ok(Ok((bits, counts))) => {
                    self.fill(&counts);
                    let (mirror, maps) = self.dataplane.mirror();
                    match mirror.clear_bits(maps, &bits, Instant::now()) {
                        Ok(outcome) => self.metrics.calls.add(outcome.calls),
                        Err(error) => self.failed(&error),
                    }
                }
                Ok(Err(error)) => tracing::warn!("sweep of the flow tables: {error}"),
                Err(error) => tracing::error!("sweep of the flow tables: {error}"),
            },
            None if self.swept.elapsed() >= SWEEP => self.start_sweep(),
            None => {}
        }
    }

    fn start_sweep(&mut self) {
        self.swept = Instant::now();
        let (mirror, maps) = self.dataplane.mirror();
        let (mut bits, maps) = (mirror.lingering_bits(Instant::now()), maps.clone());
        let (idle, clock) = (self.idle, self.clock.clone());
        self.sweeping = Some(tokio::task::spawn_blocking(move || {
            let swept = expire::sweep(&maps, &idle, || clock.tick(), clock.ticks_per_second(), &mut bits)?;
            tracing::debug!("{swept:?}");
            let counts = count(&maps, &swept)?;
            Ok((bits, counts))
        }));
    }

    /// Takes over how full the tables are; warns of those that soon are full.
    fn fill(&mut self, counts: &[(&'static str, usize)]) {
        let (mirror, maps) = self.dataplane.mirror();
        let rooms: BTreeMap<_, _> = maps.iter().map(|(name, map)| (name, map.shape().max_entries)).collect();
        let counted = counts.iter().filter_map(|(name, count)| Some((*name, *count, *rooms.get(name)?)));
        for (table, entries, room) in mirror.fill().into_iter().chain(counted) {
            self.metrics.filled(table, entries, room);
        }
    }
}

/// How many entries the hash tables have: the flow tables as they were swept, all others counted, but for what `sync`
/// keeps count of.
fn count(maps: &KernelMaps, swept: &Sweep) -> Result<Vec<(&'static str, usize)>, MapError> {
    let mut counts = vec![
        (HalfOpen::NAME, swept.half_open.entries),
        (Established::NAME, swept.established.entries),
        (Closing::NAME, swept.closing.entries),
    ];
    for (name, kind, _) in tables::ALL {
        let uncounted = match kind {
            TableKind::Hash | TableKind::LruHash => *name != Frontends::NAME,
            // Arrays have all their elements; a trie is written by the agent alone.
            TableKind::Array | TableKind::PerCpuArray | TableKind::LpmTrie => false,
        };
        if uncounted && !counts.iter().any(|(counted, _)| counted == name) {
            counts.push((name, maps.count(name)?));
        }
    }
    Ok(counts)
}
