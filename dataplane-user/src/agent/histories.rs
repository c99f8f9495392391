//! Random histories of an API server's objects, of the watches that tell them late, twice or not at all, and of agents that
//! die: whatever happened, the tables are in the end those of a cold start.
//!
//! `PORTOLAN_HISTORIES` says how many (10,000 unless told), `PORTOLAN_HISTORY_SEED` replays one. A history that fails is cut
//! down to the steps that matter and printed.

use super::dataplane::Dataplane;
use super::settings::Settings;
use crate::compile::HealthCheck;
use crate::config::{Cli, Command};
use crate::model::samples::Seed;
use crate::model::{Change, Kind, Object, ObjectName, Reference};
use crate::snapshot::{self, Owner};
use crate::sync::REST;
use crate::sync::checks::{CheckedMaps, check, meaning};
use crate::watch::KINDS;
use crate::watch::names::Names;
use crate::watch::objects::{
    HEADLESS_LABEL, PROXY_NAME_LABEL, Written, WrittenEndpointSlice, WrittenNode, WrittenService,
    WrittenServiceCidr,
};
use clap::Parser as _;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Cursor;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Histories, unless told otherwise.
const HISTORIES: u64 = 10_000;
/// The most steps of one.
const STEPS: usize = 40;
/// Services, and twice as many slices.
const SERVICES: u64 = 5;
/// Room that no history needs, in place of the defaults, which take long to make.
const ROOM: [(&str, usize); 4] =
    [("services", 1_024), ("backends", 4_096), ("slots", 8_192), ("frontends", 1_024)];

/// Something that happens. Each stands for itself, so that any of them can be left out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// An object is created or changed at the API server.
    Put { kind: Kind, object: u64, variant: u64 },
    /// An object is deleted there.
    Delete { kind: Kind, object: u64 },
    /// The watch of a kind tells so many events; if it was not listed yet, the list.
    Tell { kind: Kind, events: u64 },
    /// It tells again what it told last.
    Repeat { kind: Kind, events: u64 },
    /// Its next two events come in the other order, if they are about two objects.
    Swap { kind: Kind },
    /// The watch breaks: what happens until the next list is never told (410).
    Break { kind: Kind },
    /// The addresses on the node's interfaces are others.
    Addresses { variant: u64 },
    /// Time passes, and idle filter bits are cleared.
    Wait { milliseconds: u64 },
    /// The kernel refuses writes after so many entries, so many times.
    Refuse { entries: usize, times: usize },
    /// The agent dies after so many entries of the next writes, and another takes its place.
    Die { entries: usize },
    /// Another agent takes its place.
    Restart,
    /// The objects are kept on disk.
    Keep,
    /// The kernel forgets everything; a new agent begins with the snapshot, if there is one.
    Reboot,
    /// The kernel's tables are compared with what they should be.
    Audit,
}

fn steps(seed: u64) -> Vec<Step> {
    let mut seed = Seed(seed);
    let count = 4 + seed.below(STEPS - 3);
    (0..count).map(|_| step(&mut seed)).collect()
}

fn step(seed: &mut Seed) -> Step {
    let kind = [Kind::Service, Kind::Service, Kind::EndpointSlice, Kind::EndpointSlice, Kind::Node]
        .get(seed.below(6))
        .copied()
        .unwrap_or(Kind::ServiceCidr);
    let object = seed.below(2 * SERVICES as usize) as u64;
    let variant = seed.below(1 << 40) as u64;
    let events = 1 + seed.below(4) as u64;
    let entries = seed.below(24);
    match seed.below(40) {
        0..=12 => Step::Put { kind, object, variant },
        13..=16 => Step::Delete { kind, object },
        17..=26 => Step::Tell { kind, events },
        27 => Step::Refuse { entries: seed.below(6), times: 1 + seed.below(3) },
        28..=29 => Step::Repeat { kind, events },
        30 => Step::Swap { kind },
        31..=32 => Step::Break { kind },
        33 => Step::Addresses { variant },
        34 => Step::Wait { milliseconds: seed.below(3_000) as u64 },
        35 => Step::Refuse { entries, times: 1 },
        36 => Step::Die { entries },
        37 => Step::Restart,
        38 => {
            if seed.flip() {
                Step::Keep
            } else {
                Step::Audit
            }
        }
        _ => {
            if seed.flip() {
                Step::Keep
            } else {
                Step::Reboot
            }
        }
    }
}

/// An object of this kind is created or changed in some way.
pub(super) fn change(kind: Kind, number: u64) -> Step {
    let mut seed = Seed(number);
    Step::Put { kind, object: seed.below(2 * SERVICES as usize) as u64, variant: seed.below(1 << 40) as u64 }
}

/// An object as an API server might hold it; some are broken.
fn written(kind: Kind, object: u64, variant: u64) -> Value {
    let mut seed = Seed(variant);
    match kind {
        Kind::Service => service(object % SERVICES, &mut seed),
        Kind::EndpointSlice => slice(object, &mut seed),
        Kind::Node => node(&mut seed),
        Kind::ServiceCidr => json!({
            "metadata": {"name": format!("cidr-{}", object % 2)},
            "spec": {"cidrs": [one(&mut seed, &["10.96.0.0/16", "10.97.0.0/16", "fd00::/108", "no range"])]},
        }),
    }
}

fn one<'a>(seed: &mut Seed, of: &[&'a str]) -> &'a str {
    of[seed.below(of.len())]
}

fn service(number: u64, seed: &mut Seed) -> Value {
    let mut cluster_ips = vec![json!(format!("10.96.0.{}", number + 1))];
    if seed.flip() {
        cluster_ips.push(json!(format!("fd00::{}", number + 1)));
    }
    if seed.below(8) == 0 {
        cluster_ips = vec![json!(one(seed, &["None", "", "10.96.0.300"]))];
    }
    let port = |seed: &mut Seed, index: u64| {
        let mut port = json!({
            "name": format!("p{index}"), "port": 80 + index,
            "protocol": one(seed, &["TCP", "UDP", "SCTP"]),
        });
        if seed.below(3) == 0 {
            port["nodePort"] = json!(30_000 + seed.below(4));
        }
        if seed.below(40) == 0 {
            port["port"] = json!(70_000);
        }
        port
    };
    let ports: Vec<_> = (0..seed.below(3) as u64).map(|index| port(seed, index)).collect();
    let policy = |seed: &mut Seed| one(seed, &["Cluster", "Local"]);
    let mut labels = json!({});
    if seed.below(6) == 0 {
        labels[PROXY_NAME_LABEL] = json!("other");
    }
    let mut spec = json!({
        "type": one(seed, &["ClusterIP", "NodePort", "LoadBalancer", "ClusterIP", "NodePort", "ExternalName"]),
        "clusterIPs": cluster_ips, "ports": ports,
        "internalTrafficPolicy": policy(seed), "externalTrafficPolicy": policy(seed),
    });
    if seed.below(3) == 0 {
        // Few addresses, so that Services are rivals (Z1), and one on an interface of the node (P16).
        spec["externalIPs"] = json!([one(seed, &["192.0.2.50", "192.0.2.51", "10.96.0.2"])]);
    }
    if seed.below(4) == 0 {
        spec["sessionAffinity"] = json!("ClientIP");
    }
    if seed.below(30) == 0 {
        spec["ports"] = json!("none");
    }
    let mut status = json!({});
    if seed.below(4) == 0 {
        status = json!({"loadBalancer": {"ingress": [{"ip": one(seed, &["192.0.2.60", "192.0.2.2"])}]}});
        spec["loadBalancerSourceRanges"] = json!([one(seed, &["10.0.0.0/8", "0.0.0.0/0"])]);
    }
    let created = format!("2026-01-01T00:00:{:02}Z", seed.below(3));
    let metadata = json!({
        "name": format!("s{number}"), "namespace": "d", "labels": labels, "creationTimestamp": created,
    });
    json!({"metadata": metadata, "spec": spec, "status": status})
}

fn slice(number: u64, seed: &mut Seed) -> Value {
    let ipv6 = seed.below(3) == 0;
    let address = |seed: &mut Seed| match (seed.below(20), ipv6) {
        (0, _) => "127.0.0.1".to_owned(),
        (1, _) => "pod".to_owned(),
        (_, true) => format!("fd01::{}", 1 + seed.below(6)),
        (_, false) => format!("10.244.0.{}", 1 + seed.below(6)),
    };
    let endpoint = |seed: &mut Seed| {
        let mut endpoint = json!({
            "addresses": [address(seed)], "nodeName": one(seed, &["n", "other"]),
            "conditions": {
                "ready": seed.below(4) != 0, "serving": seed.below(4) != 0, "terminating": seed.below(4) == 0,
            },
        });
        if seed.below(3) == 0 {
            endpoint["hints"] = json!({"forZones": [{"name": one(seed, &["z1", "z2"])}]});
        }
        endpoint
    };
    let endpoints: Vec<_> = (0..seed.below(4)).map(|_| endpoint(seed)).collect();
    let ports: Vec<_> = (0..3)
        .map(|index| {
            let protocol = one(seed, &["TCP", "UDP", "SCTP"]);
            json!({"name": format!("p{index}"), "port": 8080 + index, "protocol": protocol})
        })
        .collect();
    let mut labels = json!({"kubernetes.io/service-name": format!("s{}", seed.below(SERVICES as usize))});
    if seed.below(8) == 0 {
        labels[HEADLESS_LABEL] = json!("");
    }
    json!({
        "metadata": {"name": format!("e{number}"), "namespace": "d", "labels": labels},
        "addressType": if ipv6 { "IPv6" } else { "IPv4" }, "ports": ports, "endpoints": endpoints,
    })
}

fn node(seed: &mut Seed) -> Value {
    json!({
        "metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": one(seed, &["z1", "z2"])}},
        "spec": {"podCIDRs": [one(seed, &["10.244.0.0/24", "192.0.2.48/28"])]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

fn addresses(variant: u64) -> Vec<IpAddr> {
    let all = ["192.0.2.1", "192.0.2.2", "10.96.0.2", "2001:db8::1"];
    let chosen = all.iter().enumerate().filter(|(at, _)| *at == 0 || variant >> at & 1 == 1);
    chosen.map(|(_, text)| text.parse().unwrap()).collect()
}

/// As the watches read objects.
fn read(kind: Kind, value: &Value) -> Result<Object, (Reference, String)> {
    fn typed<W: Written>(value: &Value) -> Result<Object, String> {
        let written: W = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
        written.convert(&mut Names::default()).map_err(|error| error.to_string())
    }
    let object = match kind {
        Kind::Service => typed::<WrittenService>(value),
        Kind::EndpointSlice => typed::<WrittenEndpointSlice>(value),
        Kind::Node => typed::<WrittenNode>(value),
        Kind::ServiceCidr => typed::<WrittenServiceCidr>(value),
    };
    object.map_err(|error| (reference(kind, value), error))
}

fn reference(kind: Kind, value: &Value) -> Reference {
    let text = |field: &str| value["metadata"][field].as_str().unwrap_or_default().to_owned();
    Reference { kind, name: ObjectName::new(text("namespace"), text("name")) }
}

/// Whether the label selector of the watch lets it through (F2, F3).
fn is_selected(value: &Value) -> bool {
    let labels = &value["metadata"]["labels"];
    labels[PROXY_NAME_LABEL].is_null() && labels[HEADLESS_LABEL].is_null()
}

/// The watch of one kind.
#[derive(Debug, Default)]
struct WatchOfKind {
    /// `None`: it must list first.
    queue: Option<VecDeque<Change>>,
    /// What it told since the list, the last first.
    told: Vec<Change>,
}

type Agent = Dataplane<Arc<CheckedMaps>>;

/// An API server, a kernel, and the agent between them.
pub(super) struct World {
    settings: Settings,
    pub(super) maps: Arc<CheckedMaps>,
    pub(super) agent: Agent,
    /// What the API server holds.
    objects: BTreeMap<Reference, Value>,
    /// Every version of an object that could be read.
    good: BTreeMap<Reference, Vec<Object>>,
    watches: BTreeMap<Kind, WatchOfKind>,
    addresses: Vec<IpAddr>,
    checks: BTreeMap<ObjectName, HealthCheck>,
    kept: Option<Vec<Object>>,
    now: Instant,
    /// After how many entries further writes fail.
    refusals: Vec<usize>,
    dies: bool,
    /// An agent died.
    pub(super) died: bool,
}

fn open(settings: &Settings, maps: &Arc<CheckedMaps>, addresses: &[IpAddr]) -> Agent {
    Dataplane::open(settings.clone(), maps.clone(), addresses.to_vec().into()).unwrap()
}

impl World {
    pub(super) fn new(settings: &Settings) -> Self {
        let maps = Arc::new(CheckedMaps::unchecked(&ROOM));
        let addresses = addresses(0);
        Self {
            agent: open(settings, &maps, &addresses),
            settings: settings.clone(),
            maps,
            objects: BTreeMap::new(),
            good: BTreeMap::new(),
            watches: KINDS.iter().map(|kind| (*kind, WatchOfKind::default())).collect(),
            addresses,
            checks: BTreeMap::new(),
            kept: None,
            now: Instant::now(),
            refusals: Vec::new(),
            dies: false,
            died: false,
        }
    }

    pub(super) fn perform(&mut self, step: Step) {
        match step {
            Step::Put { kind, object, variant } => self.put(kind, written(kind, object, variant)),
            Step::Delete { kind, object } => self.delete(&reference(kind, &written(kind, object, 0))),
            Step::Tell { kind, events } => self.tell(kind, events),
            Step::Repeat { kind, events } => self.repeat(kind, events),
            Step::Swap { kind } => self.swap(kind),
            Step::Break { kind } => drop(self.watches.insert(kind, WatchOfKind::default())),
            Step::Addresses { variant } => {
                self.addresses = addresses(variant);
                self.agent.set_addresses(self.addresses.clone().into());
                self.flush();
            }
            Step::Wait { milliseconds } => self.wait(Duration::from_millis(milliseconds)),
            Step::Refuse { entries, times } => {
                self.maps.fail_after(Some(entries));
                self.refusals = vec![entries; times - 1];
            }
            Step::Die { entries } => {
                self.maps.fail_after(Some(entries));
                self.refusals.clear();
                self.dies = true;
            }
            Step::Restart => self.restart(),
            Step::Keep => self.keep(),
            Step::Reboot => self.reboot(),
            Step::Audit => {
                let now = self.now;
                let (mirror, maps) = self.agent.mirror();
                let result = mirror.audit(maps, now);
                self.survive(result.is_err());
            }
        }
    }

    fn put(&mut self, kind: Kind, value: Value) {
        let name = reference(kind, &value);
        let before = self.objects.get(&name).is_some_and(is_selected);
        let change = match (before, is_selected(&value)) {
            (_, true) => Some(self.applied(kind, &value)),
            (true, false) => Some(Change::Deleted(name.clone())),
            (false, false) => None,
        };
        self.objects.insert(name, value);
        self.happened(kind, change);
    }

    /// As the watch tells an object.
    fn applied(&mut self, kind: Kind, value: &Value) -> Change {
        match read(kind, value) {
            Ok(object) => {
                self.good.entry(object.reference()).or_default().push(object.clone());
                Change::Applied(object)
            }
            Err((object, error)) => Change::Unreadable { object, error },
        }
    }

    fn delete(&mut self, name: &Reference) {
        let change = self.objects.remove(name).is_some_and(|value| is_selected(&value));
        self.happened(name.kind, change.then(|| Change::Deleted(name.clone())));
    }

    fn happened(&mut self, kind: Kind, change: Option<Change>) {
        if let Some(queue) = &mut self.watch(kind).queue {
            queue.extend(change);
        }
    }

    fn watch(&mut self, kind: Kind) -> &mut WatchOfKind {
        self.watches.entry(kind).or_default()
    }

    fn tell(&mut self, kind: Kind, events: u64) {
        if self.watch(kind).queue.is_none() {
            let list = self.list(kind);
            self.agent.take_in(list);
            *self.watch(kind) = WatchOfKind { queue: Some(VecDeque::new()), told: Vec::new() };
        } else {
            for _ in 0..events {
                let watch = self.watch(kind);
                let Some(change) = watch.queue.as_mut().and_then(VecDeque::pop_front) else { break };
                watch.told.push(change.clone());
                self.agent.take_in(change);
            }
        }
        self.flush();
    }

    fn list(&self, kind: Kind) -> Change {
        let selected = self.objects.iter().filter(|(name, value)| name.kind == kind && is_selected(value));
        let (mut objects, mut unreadable) = (Vec::new(), Vec::new());
        for (_, value) in selected {
            match read(kind, value) {
                Ok(object) => objects.push(object),
                Err((name, _)) => unreadable.push(name),
            }
        }
        Change::Replaced { kind, objects, unreadable }
    }

    /// A watch that is resumed too early tells some events again, and then goes on.
    fn repeat(&mut self, kind: Kind, events: u64) {
        let told = &self.watch(kind).told;
        let again = told.split_at(told.len().saturating_sub(events as usize)).1.to_vec();
        again.into_iter().for_each(|change| self.agent.take_in(change));
        self.flush();
    }

    fn swap(&mut self, kind: Kind) {
        let name = |change: &Change| match change {
            Change::Applied(object) => Some(object.reference()),
            Change::Deleted(name) | Change::Unreadable { object: name, .. } => Some(name.clone()),
            Change::Replaced { .. } => None,
        };
        if let Some(queue) = &mut self.watch(kind).queue
            && queue.len() > 1
            && name(&queue[0]) != name(&queue[1])
        {
            queue.swap(0, 1);
        }
    }

    fn flush(&mut self) {
        match self.agent.flush(self.now) {
            Ok(Some(flushed)) => {
                assert!(flushed.outcome.refused.is_empty(), "there is room");
                for (name, check) in flushed.health_checks {
                    match check {
                        Some(check) => self.checks.insert(name, check),
                        None => self.checks.remove(&name),
                    };
                }
                check(&*self.maps);
            }
            Ok(None) => {}
            Err(_) => self.survive(true),
        }
    }

    /// After a refusal the agent tries again later, unless it died of it.
    fn survive(&mut self, failed: bool) {
        if failed {
            check(&*self.maps);
            self.maps.fail_after(self.refusals.pop());
            if std::mem::take(&mut self.dies) {
                self.died = true;
                self.restart();
            }
        }
    }

    fn restart(&mut self) {
        self.agent = open(&self.settings, &self.maps, &self.addresses);
        self.checks.clear();
        self.watches.values_mut().for_each(|watch| *watch = WatchOfKind::default());
    }

    fn keep(&mut self) {
        if self.agent.is_current() {
            self.kept = Some(objects(&self.agent));
        }
    }

    fn reboot(&mut self) {
        self.maps = Arc::new(CheckedMaps::unchecked(&ROOM));
        self.dies = false;
        self.restart();
        if let Some(kept) = self.kept.clone() {
            self.agent.take_snapshot(kept);
            self.flush();
        }
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        let (mirror, maps) = self.agent.mirror();
        let result = mirror.clear_bits(maps, &mirror.lingering_bits(now), now);
        self.survive(result.is_err());
    }

    /// The agent dies after so many entries of the next writes.
    pub(super) fn die_after(&mut self, entries: Option<usize>) {
        self.maps.fail_after(entries);
        self.dies = entries.is_some();
    }

    /// Everything is told, kind by kind.
    pub(super) fn tell_all(&mut self) {
        for kind in [Kind::EndpointSlice, Kind::Node, Kind::Service, Kind::ServiceCidr] {
            self.tell(kind, 0);
            self.tell(kind, u64::MAX);
        }
    }

    /// Everything is told before anything is written.
    pub(super) fn tell_at_once(&mut self) {
        for kind in KINDS {
            self.take_in_all(kind);
        }
        self.flush();
    }

    fn take_in_all(&mut self, kind: Kind) {
        if self.watch(kind).queue.is_none() {
            let list = self.list(kind);
            self.agent.take_in(list);
            *self.watch(kind) = WatchOfKind { queue: Some(VecDeque::new()), told: Vec::new() };
        }
        while let Some(change) = self.watch(kind).queue.as_mut().and_then(VecDeque::pop_front) {
            self.agent.take_in(change);
        }
    }

    /// All is told, and nothing fails any more.
    pub(super) fn settle(&mut self) {
        let own_node = ObjectName::new("", "n");
        if !self.objects.contains_key(&Reference { kind: Kind::Node, name: own_node }) {
            self.put(Kind::Node, written(Kind::Node, 0, 0));
        }
        self.maps.fail_after(None);
        self.refusals.clear();
        self.dies = false;
        self.tell_all();
        self.flush();
        self.wait(REST);
        self.wait(REST);
        let now = self.now;
        let (mirror, maps) = self.agent.mirror();
        assert_eq!(mirror.audit(maps, now).unwrap(), 0, "an audit found something to repair");
    }

    /// What the agent knows is what the API server holds; of what cannot be read, a version that once could be (Z5).
    pub(super) fn compare_objects(&self) {
        let mut known: BTreeMap<_, _> =
            objects(&self.agent).into_iter().map(|object| (object.reference(), object)).collect();
        for (name, value) in self.objects.iter().filter(|(_, value)| is_selected(value)) {
            let known = known.remove(name);
            match read(name.kind, value) {
                Ok(object) => assert_eq!(known, Some(object)),
                Err(_) => assert!(known.is_none_or(|known| self.good[name].contains(&known)), "{name}"),
            }
        }
        assert!(known.is_empty(), "known and not there: {known:?}");
    }

    /// The tables, the complaints and the health checks are those of a cold start with the same objects.
    pub(super) fn compare_tables(&mut self) {
        let mut cold = Self::new(&self.settings);
        cold.addresses.clone_from(&self.addresses);
        cold.now = self.now;
        cold.restart();
        let mut objects: BTreeMap<Kind, Vec<Object>> = KINDS.map(|kind| (kind, Vec::new())).into();
        for object in self::objects(&self.agent) {
            objects.entry(object.reference().kind).or_default().push(object);
        }
        for (kind, objects) in objects {
            cold.agent.take_in(Change::replaced(kind, objects));
        }
        cold.flush();
        cold.wait(REST);
        cold.wait(REST);
        assert_eq!(meaning(&*self.maps), meaning(&*cold.maps), "the tables");
        let complaints = |agent: &Agent| agent.complaints().cloned().collect::<BTreeSet<_>>();
        assert_eq!(complaints(&self.agent), complaints(&cold.agent), "the complaints");
        assert_eq!(self.checks, cold.checks, "the health checks");
    }
}

/// All objects that an agent knows, as a snapshot on disk gives them back.
fn objects(agent: &Agent) -> Vec<Object> {
    let owner = Owner { node: "n".into(), proxy_name: None };
    let mut bytes = Vec::new();
    snapshot::write(&mut bytes, &owner, SystemTime::UNIX_EPOCH, &agent.store().share()).unwrap();
    snapshot::read(Cursor::new(bytes), &owner).unwrap().unwrap().1
}

pub(super) fn settings() -> Settings {
    let flags = ["portolan", "agent", "--node-name", "n", "--kubeconfig", "unused"];
    let Command::Agent(args) = Cli::try_parse_from(flags).unwrap().command else { panic!("not the agent") };
    Settings::new(&args, 1, true)
}

/// Lives through a history; says what is wrong in the end.
fn live(settings: &Settings, steps: &[Step]) -> Result<(), String> {
    let lived = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(settings);
        steps.iter().for_each(|step| world.perform(*step));
        world.settle();
        world.compare_objects();
        world.compare_tables();
    }));
    lived.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
    })
}

/// The steps without those that do not matter.
fn shrink(settings: &Settings, mut steps: Vec<Step>) -> Vec<Step> {
    let mut size = steps.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < steps.len() {
            let mut fewer = steps.clone();
            fewer.drain(at..(at + size).min(steps.len()));
            if live(settings, &fewer).is_err() { steps = fewer } else { at += size }
        }
        size /= 2;
    }
    steps
}

fn run(seeds: impl Iterator<Item = u64>) {
    let settings = settings();
    for seed in seeds {
        let steps = steps(seed);
        if live(&settings, &steps).is_err() {
            let few = shrink(&settings, steps);
            let error = live(&settings, &few).unwrap_err();
            panic!("PORTOLAN_HISTORY_SEED={seed} fails with the steps\n{few:#?}\n{error}");
        }
    }
}

fn histories() -> u64 {
    std::env::var("PORTOLAN_HISTORIES").map_or(HISTORIES, |count| count.parse().expect("a number"))
}

/// The seeds of one half, or the one that was asked for.
fn seeds(half: u64) -> Box<dyn Iterator<Item = u64>> {
    match std::env::var("PORTOLAN_HISTORY_SEED") {
        Ok(seed) => Box::new([seed.parse().expect("a number")].into_iter()),
        Err(_) => Box::new((0..histories()).filter(move |seed| seed % 2 == half)),
    }
}

/// F1, F2, F3, Z1, Z5, C3
#[test]
fn every_history_ends_in_the_tables_of_a_cold_start() {
    run(seeds(0));
}

/// F1, F2, F3, Z1, Z5, C3: the other half, on another processor.
#[test]
fn every_other_history_ends_in_the_tables_of_a_cold_start() {
    run(seeds(1));
}
