//! The loop: changes in, tables written, signals heard. Everything that waits is tried again; only a signal ends it.

mod take_in;
pub(super) mod take_over;
mod upkeep;
mod write;

use super::dataplane::Dataplane;
use super::keep::Keeping;
use super::notify::{State, notify};
use crate::config::AgentArgs;
use crate::expire::IdleTimes;
use crate::health::Health;
use crate::health_checks::HealthChecks;
use crate::kernel::clock::Clock;
use crate::kernel::links::{Choice, Interfaces};
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::service_route::Road;
use crate::metrics::{Metrics, Ports, SERIES};
use crate::model::Change;
use crate::sync::LingeringBits;
use crate::watch::Watch;
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use take_over::TakeOver;
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
    /// The road by which the node itself calls Services.
    road: watch::Sender<Road>,
    /// As long as another proxy's connections may run.
    taking_over: Option<TakeOver>,
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
    /// Something was written since Services were last counted and sockets looked through.
    endpoints_changed: bool,
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
        let takes_over = dataplane.takes_over();
        metrics.taking_over.set(takes_over.into());
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
            road: watch::Sender::default(),
            taking_over: takes_over.then(|| TakeOver::new(Instant::now(), args.take_over_limit)),
            backoff: None,
            ready: false,
            booted: frontends == 0,
            bpffs: args.bpffs.clone(),
            names_changed: false,
            max_series: args.metrics_max_series,
            refused: 0,
            endpoints_changed: true,
        }
    }

    /// What road the node itself needs to Services, as it changes.
    pub(super) fn road(&self) -> watch::Receiver<Road> {
        self.road.subscribe()
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
        // All Services are walked for this: once for however many changes.
        if std::mem::take(&mut self.endpoints_changed) {
            let (ports, backends, frontends) = self.dataplane.mirror().0.sizes();
            for (number, size) in self.metrics.sizes.iter().zip([ports, backends, frontends]) {
                number.set(size as u64);
            }
            let lacking = self.dataplane.mirror().0.without_local_endpoints();
            for (number, lacking) in self.metrics.without_local_endpoints.iter().zip(lacking) {
                number.set(lacking as u64);
            }
            self.close_orphans();
        }
        self.sweep().await;
        self.take_over().await;
        if self.dataplane.is_current() {
            self.keeping.keep(self.dataplane.store()).await;
        }
    }
}
