//! Many packets on one world: its node can be made another, and tables and flows forgotten, without loading programs
//! anew; a packet costs little more than the call that runs it.

use super::{Hook, Verdict, World};
use anyhow::{Context as _, Result, bail};
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::counter::{Open, Traffic};
use dataplane_common::drop::Reason;
use dataplane_common::filter::caller_tick;
use dataplane_common::flow::{Counted, Flow, FlowKey, Numbers, Stage, TICK_MASK};
use dataplane_common::kept::{TURNED_IN_A_TICK, Tries};
use dataplane_common::service::EndpointSet;
use dataplane_common::tables::{self, Table as _};
use dataplane_common::{Addr, Port, Protocol};
use dataplane_user::compile::{self, Context, NodeSettings};
use dataplane_user::expire::{self, Accounts, Clock, IdleTimes};
use dataplane_user::kernel::bpf;
use dataplane_user::kernel::callers::{CallerCells, OldMarks};
use dataplane_user::kernel::fold::Fold;
use dataplane_user::kernel::pins::Pins;
use dataplane_user::kernel::rehearsal::{self, Arrival, Rehearsal, Trial};
use dataplane_user::kernel::traffic::InFlows;
use dataplane_user::model::{Change, Dirty, Kind};
use dataplane_user::sync::LingeringBits;
use dataplane_user::watch::manifests;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What an agent knows of its node beside the objects.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// What its flags say.
    pub settings: NodeSettings,
    /// The addresses on its interfaces.
    pub interfaces: Vec<IpAddr>,
    /// The pod ranges given by flag.
    pub cluster_cidrs: Vec<IpNet>,
    /// The name it goes by (F2).
    pub proxy_name: Option<String>,
}

impl World {
    /// Brings the tables to what these manifests say on this node, at the moment `now`, and clears the filter bits that
    /// nothing needs any more: what an agent does sooner or later. Returns what could not be read.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn bring(&mut self, yaml: &str, facts: &NodeFacts, now: Instant) -> Result<Vec<String>> {
        let (objects, errors) = manifests::parse(yaml, "test");
        let mut dirty = Dirty::default();
        for kind in [Kind::Node, Kind::ServiceCidr, Kind::Service, Kind::EndpointSlice] {
            let of_kind = objects.iter().filter(|object| object.reference().kind == kind);
            dirty.merge(self.store.apply(Change::replaced(kind, of_kind.cloned().collect())));
        }
        let addresses: BTreeSet<Addr> = facts.interfaces.iter().map(|ip| Addr::from(*ip)).collect();
        let proxy_name = facts.proxy_name.as_deref().map(Into::into);
        let interfaces = facts.interfaces.clone().into();
        let context = Context::new(&self.store, proxy_name, &facts.cluster_cidrs, &interfaces);
        let all: BTreeSet<_> = self.store.services().map(|service| service.name.clone()).collect();
        dirty.services.extend(all);
        let update = self.compiler.update(&self.store, &dirty.services, &context);
        let lb_ips = self.compiler.load_balancer_ips(&addresses);
        let (node, _) = compile::node(&facts.settings, self.store.own_node(), &interfaces, &lb_ips);
        self.mirror.set_node(&self.maps, &node, now)?;
        let changes = update.services.iter().map(|(name, compiled)| (name, Some(&compiled.tables)));
        let outcome = self.mirror.change(&self.maps, changes, now)?;
        if let Some(refused) = outcome.refused.first() {
            bail!("Service {} found no room: {}", refused.service, refused.error);
        }
        let later = now + dataplane_user::sync::REST;
        let mut bits = self.mirror.lingering_bits(later);
        let clock = Clock { now: 0, tick: Duration::from_secs(1) };
        expire::sweep(&self.maps, &NEVER, clock, &mut bits, &mut OldMarks::default(), &mut ())?;
        self.mirror.clear_bits(&self.maps, &bits, later)?;
        Ok(errors.iter().map(ToString::to_string).collect())
    }

    /// Clears what no flow needs of the filter of replies, as an agent does long after the last flow began. How many cells are
    /// marked then.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep_callers(&self) -> Result<usize> {
        let table = self.maps.map::<tables::Callers>()?;
        let marks: Vec<_> =
            table.entries()?.into_iter().map(|(_, mark)| mark).filter(|mark| *mark != 0).collect();
        let cells = CallerCells::map(&table)?;
        let last = marks.iter().map(|mark| caller_tick(*mark)).max().unwrap_or_default();
        let clock = Clock { now: (last + 100) & TICK_MASK, tick: Duration::from_secs(1) };
        let mut old = cells.old(clock.now);
        expire::sweep(&self.maps, &NEVER, clock, &mut LingeringBits::default(), &mut old, &mut ())?;
        cells.clear(&old);
        Ok(table.entries()?.into_iter().filter(|(_, mark)| *mark != 0).count())
    }

    /// Brings what is counted in flows to the totals, as the agent's sweep does.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn fold(&self) -> Result<()> {
        let keys: Vec<_> =
            self.maps.map::<tables::Flows>()?.entries()?.into_iter().map(|(key, _)| key).collect();
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Fold::new(&mut object)?.fold(&keys)?)
    }

    /// The totals of service ports and of backends, without what is counted in flows still.
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn totals(&self) -> Result<[Traffic; 2]> {
        let sum = |traffic: Vec<(u32, Traffic)>| {
            traffic.into_iter().fold(Traffic::default(), |mut total, (_, traffic)| {
                total += traffic;
                total
            })
        };
        Ok([
            sum(self.maps.map::<tables::ServiceTraffic>()?.entries()?),
            sum(self.maps.map::<tables::BackendTraffic>()?.entries()?),
        ])
    }

    /// Has each half of a flow have counted as much as it can before it brings that to the totals by itself.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn fill_counters(&self) -> Result<Counted> {
        let table = self.maps.map::<tables::Flows>()?;
        let full = Counted::from_word(1 << (u64::BITS - 1));
        for (key, mut flow) in table.entries()? {
            flow.counted = full;
            table.insert(&key, &flow, 0)?;
        }
        Ok(full)
    }

    /// Removes all flows as the agent's sweep does those that are idle.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep_all(&self) -> Result<()> {
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        let mut accounts = Ending { fold: Fold::new(&mut object)?, failed: None };
        let clock = Clock { now: super::Clock::new(&mut object)?.tick(), tick: Duration::from_secs(1) };
        let (mut bits, mut marks) = (LingeringBits::default(), OldMarks::default());
        expire::sweep(&self.maps, &AT_ONCE, clock, &mut bits, &mut marks, &mut accounts)?;
        accounts.failed.map_or(Ok(()), Err)
    }

    /// How many flows of each endpoint are counted as open, without those that have none.
    ///
    /// # Errors
    /// If a table cannot be read.
    pub fn open(&self) -> Result<BTreeMap<IpAddr, u32>> {
        let open = self.maps.map::<tables::OpenCounts>()?;
        let mut counts = BTreeMap::new();
        for (id, backend) in self.serving()? {
            let count = open.get(&id)?.unwrap_or_default().count();
            if count > 0 {
                *counts.entry(backend.addr().to_ip()).or_default() += count;
            }
        }
        Ok(counts)
    }

    /// How many flows of each endpoint there are that did not end.
    ///
    /// # Errors
    /// If a table cannot be read.
    pub fn live(&self) -> Result<BTreeMap<IpAddr, u32>> {
        let serving: BTreeMap<_, _> = self.serving()?.into_iter().collect();
        let mut counts = BTreeMap::new();
        for (_, flow) in self.maps.map::<tables::Flows>()?.entries()? {
            if flow.has(Flow::REPLY) || flow.stage() == Stage::Closing {
                continue;
            }
            if let Some(backend) = serving.get(&flow.backend)
                && backend.status().generation() == flow.generation
            {
                *counts.entry(backend.addr().to_ip()).or_default() += 1;
            }
        }
        Ok(counts)
    }

    fn serving(&self) -> Result<Vec<(u32, Backend)>> {
        let mut backends = self.maps.map::<tables::Backends>()?.entries()?;
        backends.retain(|(_, backend)| backend.status().has(BackendStatus::SERVING));
        Ok(backends)
    }

    /// Counts nothing as open.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget_open(&self) -> Result<()> {
        let open = self.maps.map::<tables::OpenCounts>()?;
        let none: Vec<_> = (0..open.capacity() as u32).map(|id| (id, Open::default())).collect();
        Ok(open.insert_batch(&none)?)
    }

    /// Makes all flows so many ticks older than they are.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn age_flows(&self, ticks: u32) -> Result<()> {
        let table = self.maps.map::<tables::Flows>()?;
        for (key, mut flow) in table.entries()? {
            let older = |tick: u32| tick.wrapping_sub(ticks) & TICK_MASK;
            flow.last_seen = older(flow.last_seen);
            if key.proto() == Protocol::Udp as u8 && flow.has(Flow::ANSWERED) {
                flow.detail = older(flow.detail);
            }
            table.insert(&key, &flow, 0)?;
        }
        Ok(())
    }

    /// Has all flows that are half-open established.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn establish_flows(&self) -> Result<()> {
        let table = self.maps.map::<tables::Flows>()?;
        let half_open = table.entries()?.into_iter().filter(|(_, flow)| flow.stage() == Stage::HalfOpen);
        for (key, mut flow) in half_open {
            // As if they had been picked up in their middle: nothing is known of their numbers.
            flow.set(Flow::CONFIRMED);
            flow.numbers = Numbers::default();
            table.insert(&key, &flow, 0)?;
        }
        Ok(())
    }

    /// Marks these cells of the filter of replies and clears all others. What was marked before.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn swap_callers(&self, marks: &[(u32, u64)]) -> Result<Vec<(u32, u64)>> {
        let table = self.maps.map::<tables::Callers>()?;
        let before: Vec<_> = table.entries()?.into_iter().filter(|(_, mark)| *mark != 0).collect();
        for (cell, mark) in before.iter().map(|(cell, _)| (*cell, 0)).chain(marks.iter().copied()) {
            table.insert(&cell, &mark, 0)?;
        }
        Ok(before)
    }

    /// How many connections of others are noted, of which packets left from a node port.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn outgoing(&self) -> Result<usize> {
        Ok(self.maps.map::<tables::Outgoings>()?.entries()?.len())
    }

    /// Notes a connection of others by its answers: TCP from the first end to the second.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn note_answers(&self, from: SocketAddr, to: SocketAddr) -> Result<()> {
        let [from, to] = [from, to].map(|end| (end.ip().into(), Port::new(end.port())));
        let key = FlowKey::new(from.0, from.1, to.0, to.1, Protocol::Tcp as u8);
        Ok(self.maps.map::<tables::Outgoings>()?.insert(&key, &0, 0)?)
    }

    /// Runs a packet so many times through the program at a hook, while another CPU turns the cluster set of every service port
    /// between that which it has and one of `other` slots that hold its first endpoint as well. What was counted.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn run_while_sets_turn(
        &self,
        hook: Hook,
        data: &[u8],
        times: u32,
        other: u32,
    ) -> Result<BTreeMap<Reason, u64>> {
        let (services, slots) = (self.maps.map::<tables::Services>()?, self.maps.map::<tables::Slots>()?);
        let all: Vec<_> =
            services.entries()?.into_iter().filter(|(_, service)| service.cluster.count() != 0).collect();
        let begin = tables::Slots::CAPACITY as u32 / 2;
        let mut turned = all.clone();
        for (at, (_, service)) in turned.iter_mut().enumerate() {
            let first = slots.get(&service.cluster.base())?.unwrap_or_default();
            let base = begin + at as u32 * other;
            (base..base + other).try_for_each(|slot| slots.insert(&slot, &first, 0))?;
            service.cluster = EndpointSet::new(base, other);
        }
        let before = self.reasons()?;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let turning = scope.spawn(|| -> Result<()> {
                while !done.load(Ordering::Relaxed) {
                    for (id, service) in turned.iter().chain(&all) {
                        services.insert(id, service, 0)?;
                    }
                }
                Ok(())
            });
            let ran = self.run_times(hook, data, times);
            done.store(true, Ordering::Relaxed);
            let turned = turning.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            ran.and(turned)
        })?;
        let moved = self.reasons()?.into_iter().map(|(reason, count)| {
            let earlier = before.iter().find(|(known, _)| *known == reason).map_or(0, |(_, count)| *count);
            (reason, count - earlier)
        });
        Ok(moved.filter(|(_, count)| *count != 0).collect())
    }

    /// Removes all flows, and all that is remembered of clients, datagrams and what left.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget_flows(&self) -> Result<()> {
        let flows = self.maps.map::<tables::Flows>()?;
        let keys: Vec<_> = flows.entries()?.into_iter().map(|(key, _)| key).collect();
        flows.remove_batch(&keys)?;
        self.forget_open()?;
        let (affinities, fragments) =
            (self.maps.map::<tables::Affinities>()?, self.maps.map::<tables::Fragments>()?);
        let outgoings = self.maps.map::<tables::Outgoings>()?;
        let answers: Vec<_> = outgoings.entries()?.into_iter().map(|(key, _)| key).collect();
        outgoings.remove_batch(&answers)?;
        let clients: Vec<_> = affinities.entries()?.into_iter().map(|(key, _)| key).collect();
        let datagrams: Vec<_> = fragments.entries()?.into_iter().map(|(key, _)| key).collect();
        affinities.remove_batch(&clients)?;
        let moved = self.maps.map::<tables::Moved>()?;
        let keys: Vec<_> = moved.entries()?.into_iter().map(|(key, _)| key).collect();
        moved.remove_batch(&keys)?;
        let newcomers = self.maps.map::<tables::Newcomers>()?;
        let clients: Vec<_> = newcomers.entries()?.into_iter().map(|(key, _)| key).collect();
        newcomers.remove_batch(&clients)?;
        fragments.remove_batch(&datagrams)?;
        self.forget_answers()
    }

    /// Lets all CPUs give as many answers that say no as they may at once.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget_answers(&self) -> Result<()> {
        let (_, answers) =
            self.maps.iter().find(|(name, _)| *name == tables::Answers::NAME).context("answers")?;
        let none = vec![0; answers.copied_size()];
        (0..tables::Answers::CAPACITY as u32)
            .try_for_each(|index| answers.update(&index.to_ne_bytes(), &none, 0))
            .context("answers")
    }

    /// Has each service port have turned round as many refusals as may be in this second and the next ones.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn exhaust_tries(&self) -> Result<()> {
        let tick = self.tick()?;
        let table = self.maps.map::<tables::ServiceTries>()?;
        for (id, tries) in table.entries()? {
            table.insert(&id, &Tries { turned: Tries::in_tick(tick, TURNED_IN_A_TICK), ..tries }, 0)?;
        }
        // The programs may be in the next one by now.
        if self.tick()? == tick { Ok(()) } else { self.exhaust_tries() }
    }

    /// The second tries of all service ports.
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn tries(&self) -> Result<Tries> {
        let mut sum = Tries::default();
        for (_, tries) in self.maps.map::<tables::ServiceTries>()?.entries()? {
            sum.silent += tries.silent;
            sum.refused += tries.refused;
            sum.unreachable += tries.unreachable;
            sum.udp += tries.udp;
            sum.rescued += tries.rescued;
        }
        Ok(sum)
    }

    /// Pins the maps below a folder that is mounted for that, so that a second copy of the programs finds them.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn pin(&self, pins: &Pins) -> Result<()> {
        pins.prepare()?;
        for (name, map) in self.maps.iter() {
            bpf::obj_pin(map.as_fd(), &pins.map(name)).with_context(|| name.to_owned())?;
        }
        Ok(())
    }

    /// Has a second copy of the programs run on a frame at a hook as [`World::send_uncounted`] does, without a trace in the maps
    /// of the first.
    ///
    /// # Errors
    /// If the kernel refuses to run it.
    pub fn rehearse(
        &self,
        rehearsal: &mut Rehearsal,
        hook: Hook,
        data: &[u8],
        key: FlowKey,
    ) -> Result<(Verdict, Trial)> {
        rehearsal.refresh()?;
        let replies: Vec<_> =
            self.maps.map::<tables::Flows>()?.entries()?.into_iter().map(|(key, _)| key).collect();
        let interface = match hook {
            Hook::Xdp | Hook::UplinkIn | Hook::UplinkOut => self.uplink,
            Hook::BareIn | Hook::BareOut => self.bare,
            Hook::PodIn | Hook::PodOut => self.pod,
        };
        let arrival = Arrival { program: hook.program(), interface, data, key, replies: &replies };
        let trial = rehearsal.trial(&arrival)?;
        Ok((super::verdict(hook, trial.action)?, trial))
    }

    /// Sends these bytes, and counts nothing: the verdict, what left, and its mark.
    ///
    /// # Errors
    /// If the kernel refuses to run it.
    pub fn send_uncounted(&self, hook: Hook, data: &[u8]) -> Result<(Verdict, Vec<u8>, u32)> {
        let (verdict, result) = self.run(hook, hook.program(), data, 0)?;
        Ok((verdict, result.data, rehearsal::mark_of(&result.context)))
    }

    /// The addresses of the endpoints in the slots of a service port's cluster set, slot by slot.
    ///
    /// # Errors
    /// If there is no such port, or a table cannot be read.
    pub fn slots_of(&self, name: &str) -> Result<Vec<IpAddr>> {
        let id = self.mirror.names().find(|(_, known)| known.to_string() == name).map(|(id, _)| id);
        let services = self.maps.map::<tables::Services>()?;
        let set = services.get(&id.context("no such service port")?)?.unwrap_or_default().cluster;
        let (slots, backends) = (self.maps.map::<tables::Slots>()?, self.maps.map::<tables::Backends>()?);
        let address = |slot| {
            let id = slots.get(&slot)?.context("no such slot")?;
            Ok(backends.get(&id)?.context("no such backend")?.addr().to_ip())
        };
        (set.base()..set.base() + set.count()).map(address).collect()
    }

    /// How often each reason has occurred.
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        let sums = self.maps.map::<tables::Reasons>()?.sums()?;
        let named = |number: u32| u8::try_from(number).ok().and_then(|number| Reason::try_from(number).ok());
        Ok(sums.into_iter().filter_map(|(number, count)| Some((named(number)?, count))).collect())
    }

    /// How many packets all service ports have counted, in both directions: cheaper than [`World::traffic`].
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn packets(&self) -> Result<u64> {
        let in_flows = InFlows::read(&self.maps)?;
        let mut packets = 0;
        self.maps.map::<tables::ServiceTraffic>()?.visit(|id, totals| {
            let totals = totals.iter().map(|total| in_flows.with_service(id, *total));
            packets += totals.map(|total| total.packets_in + total.packets_out).sum::<u64>();
        })?;
        Ok(packets)
    }

    /// The traffic of all service ports, and of all backends.
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn traffic(&self) -> Result<[Traffic; 2]> {
        let mut totals = [Traffic::default(); 2];
        for (total, all) in totals.iter_mut().zip(self.traffic_by_id()?) {
            all.into_iter().for_each(|traffic| *total += traffic);
        }
        Ok(totals)
    }

    /// The traffic of each service port, and of each backend, with what is counted in flows still.
    pub(super) fn traffic_by_id(&self) -> Result<[Vec<Traffic>; 2]> {
        let in_flows = InFlows::read(&self.maps)?;
        let services = self.maps.map::<tables::ServiceTraffic>()?.entries()?;
        let services = services.into_iter().map(|(id, total)| in_flows.with_service(id, total)).collect();
        let known = self.maps.map::<tables::Backends>()?.entries()?;
        let known: BTreeMap<_, _> =
            known.into_iter().map(|(id, backend)| (id, backend.status().generation())).collect();
        let backends = self.maps.map::<tables::BackendTraffic>()?.entries()?;
        let backends = backends
            .into_iter()
            .map(|(id, total)| in_flows.with_backend(id, known.get(&id).copied().unwrap_or_default(), total));
        let backends = backends.collect();
        Ok([services, backends])
    }
}

/// Counts flows off that are removed.
struct Ending {
    fold: Fold,
    failed: Option<anyhow::Error>,
}

impl Accounts for Ending {
    fn fold(&mut self, keys: &[FlowKey]) {
        self.failed = self.fold.fold(keys).err().map(Into::into).or(self.failed.take());
    }

    fn seen(&mut self, _: &Flow) {}

    fn all_seen(&mut self) {}

    fn idle(&mut self, _: &[FlowKey]) {}

    fn ending(&mut self, keys: &[FlowKey]) {
        self.failed = self.fold.end(keys).err().map(Into::into).or(self.failed.take());
    }
}

/// Each flow is idle.
const AT_ONCE: IdleTimes = {
    let none = Duration::ZERO;
    IdleTimes {
        established: none,
        half_closed: none,
        udp: none,
        udp_answered: none,
        udp_unanswered: none,
        half_open: none,
        closing: none,
    }
};

/// No flow is idle for so long.
const NEVER: IdleTimes = {
    let long = Duration::from_secs(1 << 40);
    IdleTimes {
        established: long,
        half_closed: long,
        udp: long,
        udp_answered: long,
        udp_unanswered: long,
        half_open: long,
        closing: long,
    }
};
