//! The loop: changes in, tables written, signals heard. Everything that waits is tried again; only a signal ends it.

pub(super) mod accounting;
mod rivals;
mod take_in;
pub(super) mod take_over;
mod upkeep;
mod write;

use super::dataplane::Dataplane;
use super::hooks::{Hooks, Start};
use super::keep::Keeping;
use super::masquerade::Netfilter;
use super::notify::{self, State, notify};
use super::signals::Signals;
use super::sources::SourceLists;
use super::standing::Question;
use crate::config::{AgentArgs, SocketLb};
use crate::expire::IdleTimes;
use crate::health::Health;
use crate::health_checks::HealthChecks;
use crate::kernel::carry::{self, Carried, CarryError};
use crate::kernel::clock::Clock;
use crate::kernel::fold::Fold;
use crate::kernel::links::Interfaces;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::pins::Pins;
use crate::kernel::roles::Choice;
use crate::kernel::service_route::Wanted;
use crate::metrics::{Metrics, Ports, SERIES};
use crate::model::{Change, ObjectName};
use crate::sync::LingeringBits;
use crate::watch::Watch;
use accounting::Recounting;
use anyhow::{Result, bail};
use rivals::Rivals;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use take_over::TakeOver;
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

/// How many times longer than the loop for one round a job beside it may take before the agent counts as dead (H5).
const JOB: u32 = 5;

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
    fold: Arc<Fold>,
    recount: Arc<Recounting>,
    idle: IdleTimes,
    /// How many entries the table of flows had when it was last swept.
    flow_entries: usize,
    /// Who may call from outside.
    sources: SourceLists,
    audit_period: Duration,
    audited: Instant,
    /// The last audit had to repair something: the next tells whether that goes on (H2).
    audit_soon: bool,
    swept: Instant,
    sweeping: Option<Sweeping>,
    /// The routes by which the node itself calls Services, and whether they are there or cannot be.
    routes: watch::Sender<Wanted>,
    routed: watch::Sender<bool>,
    /// All is written and nobody was told yet, since when.
    announcing: Option<Instant>,
    /// The last look through sockets, and the last writing of names: the next begins when it has ended.
    closing: Option<JoinHandle<()>>,
    naming: Option<JoinHandle<()>>,
    /// Tasks that never end, by what they do.
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    /// Programs that wait for the first snapshot.
    hooks: Option<(Hooks, Pins)>,
    /// As long as another proxy's connections may run.
    taking_over: Option<TakeOver>,
    /// Other proxies on this node.
    rivals: Rivals,
    /// After a refusal: how long to wait, and until when.
    backoff: Option<(Duration, Instant)>,
    /// How many changes were taken in, and when the last of them.
    taken: (u64, Instant),
    ready: bool,
    /// systemd waits for signs of life.
    watched: bool,
    /// The kernel held nothing when this agent began: after a boot.
    booted: bool,
    /// The pin folder, by which the command line finds the names of service ports.
    bpffs: PathBuf,
    names_changed: bool,
    /// `--metrics-max-series`.
    max_series: usize,
    /// The Services that wait for room, as far as that was told.
    refused: BTreeSet<ObjectName>,
    /// Something was written since Services were last counted and sockets looked through.
    endpoints_changed: bool,
}

/// Who is told what becomes of the dataplane.
pub(super) struct Told {
    pub(super) health: Arc<Health>,
    pub(super) health_checks: Arc<HealthChecks>,
    pub(super) metrics: Arc<Metrics>,
}

/// What the loop hears.
pub(super) struct Inputs {
    /// Of the objects.
    pub(super) changes: mpsc::Receiver<Change>,
    /// Of the node's interfaces.
    pub(super) interfaces: watch::Receiver<Interfaces>,
    /// Of what netfilter does for the programs.
    pub(super) netfilter: watch::Receiver<Netfilter>,
    /// By the command line.
    pub(super) questions: mpsc::Receiver<Question>,
    /// From whoever started it.
    pub(super) signals: Signals,
}

impl Service {
    pub(super) fn new(
        mut dataplane: Dataplane<KernelMaps>,
        watch: Watch,
        keeping: Keeping,
        Told { health, health_checks, metrics }: Told,
        (clock, fold): (Clock, Fold),
        args: &AgentArgs,
    ) -> Self {
        let (_, _, frontends) = dataplane.mirror().0.sizes();
        if frontends > 0 {
            tracing::info!("{frontends} frontends of an earlier agent are in the kernel and served");
            health.serving();
        }
        let mut sources = SourceLists::new(args.nodeport_source_ranges.clone(), args.sources_file.clone());
        if let Some(sources) = sources.look() {
            dataplane.set_sources(sources);
        }
        let takes_over = dataplane.takes_over();
        metrics.taking_over.set(takes_over.into());
        let idle = IdleTimes {
            established: args.conntrack.conntrack_tcp_timeout_established,
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
            fold: Arc::new(fold),
            recount: Arc::new(Recounting::new(args.socket_lb != SocketLb::Off)),
            idle,
            flow_entries: 0,
            sources,
            audit_period: args.audit_period,
            audited: Instant::now(),
            audit_soon: false,
            swept: Instant::now(),
            sweeping: None,
            routes: watch::Sender::default(),
            routed: watch::Sender::default(),
            announcing: None,
            closing: None,
            naming: None,
            tasks: Vec::new(),
            hooks: None,
            taking_over: takes_over.then(|| TakeOver::new(Instant::now(), args.take_over_limit)),
            rivals: Rivals::default(),
            backoff: None,
            taken: (0, Instant::now()),
            ready: false,
            watched: notify::is_watched(),
            booted: frontends == 0,
            bpffs: args.bpffs.clone(),
            names_changed: false,
            max_series: args.metrics_max_series,
            refused: BTreeSet::new(),
            endpoints_changed: true,
        }
    }

    /// What routes the node itself needs to Services, as they change, and who is told when they are there.
    pub(super) fn routes(&self) -> (watch::Receiver<Wanted>, watch::Sender<bool>) {
        (self.routes.subscribe(), self.routed.clone())
    }

    /// Has the loop end with an error if the task ends, which it never should.
    pub(super) fn look_after(&mut self, what: &'static str, task: JoinHandle<()>) {
        self.tasks.push((what, task));
    }

    /// Attaches the programs, or has them wait.
    ///
    /// # Errors
    /// If the pin folder cannot be read.
    pub(super) fn start_hooks(&mut self, start: Start) -> Result<()> {
        match start {
            Start::Now(mut hooks) => {
                hooks.start();
                self.follow_interfaces(hooks);
            }
            Start::AfterTheFirstSnapshot(hooks, pins) => {
                tracing::info!(
                    "programs with maps of another layout are attached: they serve on until this version's maps hold all \
                     Services; their flows are carried over then"
                );
                if !pins.pinned_links()?.is_empty() {
                    self.health.serving();
                }
                self.hooks = Some((hooks, pins));
            }
        }
        Ok(())
    }

    fn follow_interfaces(&mut self, hooks: Hooks) {
        self.look_after("the task that attaches programs", tokio::spawn(hooks.run()));
    }

    /// The first snapshot is in this layout's maps: now its programs can take the place of others, whose maps go.
    fn finish_upgrade(&mut self) {
        let Some((mut hooks, pins)) = self.hooks.take() else { return };
        let maps = self.dataplane.mirror().1;
        tokio::task::block_in_place(|| {
            let mut carried = Carried::default();
            let hold_back = |since| carry::hold_back(maps, since).map_err(CarryError::from);
            let before = carried.carry(&pins, maps, self.clock.tick());
            // What of theirs is not here yet meets no program that takes it for somebody else's.
            let held = hold_back(Some(self.clock.tick()));
            hooks.start();
            let held = held.and_then(|()| hold_back(Some(self.clock.tick())));
            // What the other programs began until their last packet.
            let after = carried.carry(&pins, maps, self.clock.tick());
            let released = held.and_then(|()| hold_back(None));
            match before.and_then(|before| Ok(before + after?)).and_then(|entries| released.map(|()| entries))
            {
                Ok(entries) => tracing::info!("{} flows of other layouts were carried over", entries / 2),
                Err(error) => tracing::warn!("flows of other layouts are not carried over: {error}"),
            }
        });
        match pins.remove_other_layouts() {
            Ok(layouts) => {
                layouts.iter().for_each(|layout| tracing::info!("removed the maps of layout {layout}"))
            }
            Err(error) => tracing::warn!("maps of another layout stay: {error}"),
        }
        self.follow_interfaces(hooks);
    }

    /// Until SIGTERM or SIGINT.
    pub(super) async fn run(mut self, inputs: Inputs, choice: Choice) -> Result<()> {
        let Inputs { mut changes, mut interfaces, mut netfilter, mut questions, mut signals } = inputs;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        let mut routed = self.routed.subscribe();
        self.set_route_mtu(interfaces.borrow().uplink_mtu(&choice));
        let beat = self.health.heartbeat().part("the event loop", 1);
        loop {
            beat.beat();
            tokio::select! {
                biased;
                _ = signals.terminate.recv() => break,
                _ = signals.interrupt.recv() => break,
                _ = signals.hangup.recv() => self.reload(),
                _ = tick.tick() => {
                    self.check_tasks()?;
                    self.tick().await;
                }
                // The sender is the loop's own as well.
                Ok(()) = routed.changed() => self.announce(),
                changed = interfaces.changed() => {
                    changed?;
                    let addresses = super::own_addresses(&interfaces.borrow_and_update(), &choice);
                    self.set_route_mtu(interfaces.borrow().uplink_mtu(&choice));
                    self.dataplane.set_addresses(addresses);
                    self.flush();
                }
                Some(question) = questions.recv() => {
                    // Who asked may have left.
                    let _ = question.answer.send(self.dataplane.explain(&question.service));
                }
                changed = netfilter.changed() => {
                    changed?;
                    self.dataplane.set_netfilter(*netfilter.borrow_and_update());
                    self.flush();
                }
                count = changes.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        bail!("the source of objects ended: this is a fault of portolan");
                    }
                    self.taken = (self.taken.0 + count as u64, Instant::now());
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

    fn set_route_mtu(&self, mtu: u32) {
        self.routes.send_if_modified(|wanted| std::mem::replace(&mut wanted.mtu, mtu) != mtu);
    }

    /// A task that ended would be missing in silence.
    fn check_tasks(&self) -> Result<()> {
        if let Some(what) = ended(&self.tasks) {
            bail!("{what} ended: this is a fault of portolan");
        }
        if self.watch.has_ended() {
            bail!("a watch ended: this is a fault of portolan");
        }
        if self.watched && self.health.silent().is_empty() {
            notify(State::Alive);
        }
        Ok(())
    }

    /// SIGHUP.
    fn reload(&mut self) {
        if !self.ready {
            tracing::info!("SIGHUP: there is nothing to audit before the first snapshot is in the kernel");
            return;
        }
        notify(State::Reloading);
        self.audit();
        notify(State::Ready);
    }

    /// Whether the kernel refused a write a moment ago: writes wait, and nothing else does.
    fn backs_off(&self) -> bool {
        self.backoff.is_some_and(|(_, until)| Instant::now() < until)
    }

    async fn tick(&mut self) {
        if self.booted && !self.dataplane.is_complete() && !self.dataplane.is_current() {
            self.serve_snapshot();
        }
        if let Some(sources) = self.sources.look() {
            self.dataplane.set_sources(sources);
        }
        self.flush();
        self.announce();
        if !self.dataplane.is_complete() {
            return;
        }
        self.try_again();
        let due = if self.audit_soon { AUDIT_AGAIN.min(self.audit_period) } else { self.audit_period };
        if !due.is_zero() && self.audited.elapsed() >= due {
            self.audit();
        }
        if self.names_changed && !is_running(self.naming.as_ref()) {
            self.names_changed = false;
            self.write_names();
            let names = self.dataplane.mirror().0.names();
            let ports = Ports::new(names, self.max_series / SERIES);
            self.metrics.set_ports(ports);
            self.fill(&[]);
        }
        // All Services are walked for this: once for however many changes.
        if self.endpoints_changed && !is_running(self.closing.as_ref()) {
            self.endpoints_changed = false;
            let (ports, backends, frontends) = self.dataplane.mirror().0.sizes();
            for (number, size) in self.metrics.sizes.iter().zip([ports, backends, frontends]) {
                number.set(size as u64);
            }
            let lacking = self.dataplane.mirror().0.without_local_endpoints();
            let numbers = self.metrics.without_local_endpoints.iter().flatten();
            for (number, lacking) in numbers.zip(lacking.into_iter().flatten()) {
                number.set(lacking as u64);
            }
            self.close_orphans();
        }
        self.sweep().await;
        self.take_over().await;
        self.look_for_rivals().await;
        if self.dataplane.is_current() {
            self.keeping.keep(self.dataplane.store()).await;
        }
    }
}

/// The first of these tasks that has ended, with a panic or without.
fn ended(tasks: &[(&'static str, JoinHandle<()>)]) -> Option<&'static str> {
    tasks.iter().find(|(_, task)| task.is_finished()).map(|(what, _)| *what)
}

fn is_running(job: Option<&JoinHandle<()>>) -> bool {
    job.is_some_and(|job| !job.is_finished())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// H5
    #[tokio::test]
    async fn a_task_that_ends_without_a_panic_is_noticed() {
        let lives = || tokio::spawn(std::future::pending());
        let mut tasks = vec![("one that lives", lives()), ("another", lives())];
        assert_eq!(ended(&tasks), None);
        tasks.push(("one that ends", tokio::spawn(async {})));
        while !tasks[2].1.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(ended(&tasks), Some("one that ends"));
        tasks[0].1.abort();
        while !tasks[0].1.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(ended(&tasks), Some("one that lives"));
        tasks[1].1.abort();
    }
}
