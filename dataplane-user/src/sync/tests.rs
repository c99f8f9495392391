//! Behaviour of the whole of `sync` on [`MemoryMaps`].

use super::checks::{CheckedMaps, bit_is_set, check, reach, read, view};
use super::{Maps, MemoryMaps, Mirror, Op, REST, apply};
use crate::compile::{Endpoint, NodeTables, PortTables, ServicePortName, ServiceTables};
use crate::kernel::maps::MapError;
use crate::model::ObjectName;
use bytemuck::Zeroable as _;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::counter::{Open, Traffic};
use dataplane_common::filter::FilterBit;
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::node::{Node, NodeAddress, Prefix};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::{Policy, Service};
use dataplane_common::tables::{self, Table};
use dataplane_common::{Addr, Port};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const TCP: u8 = 6;
const ANY_NODE: Addr = Addr::from_v4([0; 4]);
const NODE: Addr = Addr::from_v4([192, 168, 0, 1]);

fn endpoint(n: u8) -> Endpoint {
    Endpoint { addr: Addr::from_v4([10, 244, 0, n]), port: Port::new(8080) }
}

fn cluster_ip(n: u8) -> Addr {
    Addr::from_v4([10, 96, 0, n])
}

fn frontend(n: u8) -> FrontendKey {
    FrontendKey::new(cluster_ip(n), Port::new(80), TCP)
}

fn node_port(number: u16) -> FrontendKey {
    FrontendKey::new(ANY_NODE, Port::new(number), TCP)
}

fn name(n: u8) -> ObjectName {
    ObjectName::new("default", format!("s{n}"))
}

/// Service `n` at its ClusterIP and perhaps a node port, with these endpoints, the odd ones on this node.
fn service(n: u8, endpoints: &[u8], port: Option<u16>) -> ServiceTables {
    let local = |n: &u8| n % 2 == 1;
    let flags = |n: &u8| BackendStatus::SERVING | if local(n) { BackendStatus::LOCAL } else { 0 };
    let mut tables = PortTables {
        policy: Policy::new(if endpoints.is_empty() { 0 } else { Policy::HAS_ENDPOINTS }, 0),
        backends: endpoints.iter().map(|n| (endpoint(*n), flags(n))).collect(),
        cluster: endpoints.iter().map(|n| endpoint(*n)).collect(),
        local: endpoints.iter().filter(|n| local(n)).map(|n| endpoint(*n)).collect(),
        ranges: BTreeSet::new(),
        frontends: [(frontend(n), FrontendKind::ClusterIp)].into(),
        ..PortTables::default()
    };
    tables.frontends.extend(port.map(|port| (node_port(port), FrontendKind::NodePort)));
    let port = ServicePortName { service: name(n), port: "".into(), proto: TCP, ipv6: false };
    ServiceTables { ports: [(port, tables)].into(), closed: [cluster_ip(n)].into() }
}

fn node(addresses: &[Addr]) -> NodeTables {
    let flags = NodeAddress::new(NodeAddress::NODE_PORTS);
    NodeTables {
        node: Node::zeroed(),
        addresses: addresses.iter().map(|addr| (*addr, flags)).collect(),
        ranges: Default::default(),
    }
}

fn status(maps: &impl Maps, wanted: Endpoint) -> Vec<(u32, BackendStatus)> {
    let backends = read::<tables::Backends>(maps).into_iter();
    let at = backends.filter(|(_, b)| *b.addr() == wanted.addr && b.port() == wanted.port);
    at.map(|(id, b)| (id, b.status())).collect()
}

/// The LB IP of Service `n`, for these sources only; for all if there are none.
fn restricted(n: u8, ranges: &[&str]) -> ServiceTables {
    let mut tables = service(n, &[n], None);
    tables.ports.values_mut().for_each(|port| restrict(port, lb_ip(n), ranges));
    tables
}

fn restrict(port: &mut PortTables, key: FrontendKey, ranges: &[&str]) {
    port.frontends.insert(key, FrontendKind::LoadBalancerIp);
    port.ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
    let flag = if ranges.is_empty() { 0 } else { Policy::SOURCE_RANGES };
    port.policy = Policy::new(port.policy.flags() | flag, 0);
}

fn lb_ip(n: u8) -> FrontendKey {
    FrontendKey::new(Addr::from_v4([203, 0, 113, n]), Port::new(80), TCP)
}

/// Whether a client may call an address, as a packet finds out: `None` if the address leads nowhere.
fn admits(maps: &impl Maps, key: &FrontendKey, client: [u8; 4]) -> Option<bool> {
    let id = maps.get::<tables::Frontends>(key).unwrap()?.service();
    let service: Service = maps.get::<tables::Services>(&id).unwrap().unwrap();
    Some(
        !service.policy.has(Policy::SOURCE_RANGES)
            || ranges_of(maps, id).iter().any(|range| holds(range, client)),
    )
}

fn ranges_of(maps: &impl Maps, id: u32) -> BTreeSet<SourceRangeKey> {
    let all = read::<tables::SourceRanges>(maps).into_iter().map(|(key, _)| key);
    all.filter(|key| key.service() == id).collect()
}

fn holds(range: &SourceRangeKey, client: [u8; 4]) -> bool {
    Prefix::new(*range.addr(), range.bits()).contains(&Addr::from_v4(client))
}

/// The same as it should be.
fn wanted(services: &BTreeMap<ObjectName, ServiceTables>) -> BTreeMap<FrontendKey, [BTreeSet<Endpoint>; 2]> {
    let ports = services.values().flat_map(|service| service.ports.values());
    let each = |port: &PortTables| {
        let sets = [port.cluster.clone(), port.local.clone()];
        port.frontends.keys().map(move |key| (*key, sets.clone())).collect::<Vec<_>>()
    };
    ports.flat_map(each).collect()
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn service(&mut self, n: u8) -> ServiceTables {
        let endpoints: Vec<u8> = (0..12).filter(|_| self.below(3) == 0).collect();
        let port = (self.below(2) == 0).then(|| 30_000 + u16::from(n));
        let mut tables = service(n, &endpoints, port);
        if self.below(4) == 0 {
            let second = service(n, &endpoints, None).ports.into_values().next().unwrap();
            let ranges = [&["10.0.0.0/8"][..], &["10.1.0.0/16", "192.0.2.0/24"], &[]];
            let port = tables.ports.values_mut().next().unwrap();
            restrict(port, lb_ip(n), ranges[self.below(3) as usize]);
            let port = ServicePortName { service: name(n), port: "b".into(), proto: 17, ipv6: false };
            let key = FrontendKey::new(cluster_ip(n), Port::new(81), 17);
            let frontends = [(key, FrontendKind::ClusterIp)].into();
            tables.ports.insert(port, PortTables { frontends, ..second });
        }
        tables
    }
}

/// Each prefix of the writes leaves no dangling reference, and each change ends in what was asked for, over any history
/// with restarts of the agent and audits in between.
#[test]
fn every_prefix_of_the_writes_is_consistent() {
    for seed in 0..8 {
        let mut random = Random(seed);
        let maps = CheckedMaps::new(&[]);
        let mut now = Instant::now();
        let mut mirror = Mirror::open(&maps, now).unwrap();
        let mut services: BTreeMap<ObjectName, ServiceTables> = BTreeMap::new();
        mirror.set_node(&maps, &node(&[NODE]), now).unwrap();
        mirror.replace(&maps, &services, now).unwrap();
        for _ in 0..120 {
            now += Duration::from_millis(random.below(900));
            let n = random.below(8) as u8;
            match random.below(12) {
                0 => {
                    // A new agent, and what happened meanwhile.
                    services.remove(&name(n));
                    mirror = Mirror::open(&maps, now).unwrap();
                    mirror.replace(&maps, &services, now).unwrap();
                }
                1 => assert_eq!(mirror.audit(&maps, now).unwrap(), 0),
                2 => drop(mirror.clear_bits(&maps, &mirror.lingering_bits(now), now).unwrap()),
                3 => {
                    let more = Addr::from_v4([192, 168, 0, random.below(3) as u8]);
                    mirror.set_node(&maps, &node(&[NODE, more]), now).unwrap();
                }
                4 | 5 => {
                    services.remove(&name(n));
                    mirror.change(&maps, [(&name(n), None)], now).unwrap();
                }
                _ => {
                    services.insert(name(n), random.service(n));
                    mirror.change(&maps, [(&name(n), services.get(&name(n)))], now).unwrap();
                }
            }
            assert_eq!(view(&maps), wanted(&services));
            let ranges: usize =
                services.values().flat_map(|s| s.ports.values()).map(|port| port.ranges.len()).sum();
            assert_eq!(read::<tables::SourceRanges>(&maps).len(), ranges);
            let closed = read::<tables::Frontends>(&maps).iter().filter(|(_, v)| v.service() == 0).count();
            assert_eq!(closed, services.len(), "P13: each ClusterIP is closed on its other ports");
        }
        assert!(*maps.checked.lock().unwrap() > 1_000);
    }
}

/// Each frontend leads to the old endpoints or to the new ones, never to a mixture, whatever the moment.
#[test]
fn a_change_of_endpoints_is_seen_whole_or_not_at_all() {
    let (before, after) = (service(1, &[1, 2, 3], None), service(1, &[3, 4, 5, 6], None));
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.change(&maps, [(&name(1), Some(&before))], now).unwrap();
    let ops = ops_of(&mut mirror, &maps, &after, now);
    let [old, new] = [before, after].map(|s| wanted(&[(name(1), s)].into())[&frontend(1)].clone());
    let mut seen = Vec::new();
    for op in ops {
        apply(&maps, &[op]).unwrap();
        seen.push(reach(&maps, &frontend(1)).unwrap());
    }
    seen.dedup();
    assert_eq!(seen, [old, new]);
}

/// S2: at every moment each client finds the old answer or the new one, through an agent's restart too; nothing is open
/// that neither opens, and nothing closed that neither closes.
#[test]
fn a_packet_never_meets_a_service_half_restricted() {
    const CLIENTS: [[u8; 4]; 4] = [[10, 1, 2, 3], [10, 2, 2, 3], [192, 0, 2, 9], [198, 51, 100, 1]];
    let states = [&[][..], &["10.0.0.0/8"], &["10.1.0.0/16", "192.0.2.0/24"], &["192.0.2.0/24"]];
    let pairs = states.iter().flat_map(|old| states.iter().map(move |new| (old, new)));
    for ((old, new), restart) in pairs.flat_map(|pair| [(pair, false), (pair, true)]) {
        let (maps, now) = (MemoryMaps::default(), Instant::now());
        let mut mirror = Mirror::open(&maps, now).unwrap();
        mirror.replace(&maps, [(&name(1), &restricted(1, old))], now).unwrap();
        let answers = || CLIENTS.map(|client| admits(&maps, &lb_ip(1), client).unwrap());
        let before = answers();
        if restart {
            mirror = Mirror::open(&maps, now).unwrap();
        }
        let recorder = Recorder(&maps, Mutex::default());
        mirror.change(&recorder, [(&name(1), Some(&restricted(1, new)))], now).unwrap();
        let mut seen = vec![before];
        for op in recorder.1.into_inner().unwrap() {
            apply(&maps, &[op]).unwrap();
            seen.push(answers());
        }
        let after = answers();
        let wanted = CLIENTS.map(|client| {
            let in_range =
                |range: &&str| holds(&crate::compile::range_key(0, &range.parse().unwrap()), client);
            new.is_empty() || new.iter().any(in_range)
        });
        assert_eq!(after, wanted, "{old:?} to {new:?}");
        for (at, answers) in seen.iter().flat_map(|answers| answers.iter().enumerate()) {
            assert!([before[at], after[at]].contains(answers), "{old:?} to {new:?}: {:?}", CLIENTS[at]);
        }
    }
}

/// S2, C3: what an agent left that ended between a range and the policy that asks for it.
#[test]
fn ranges_that_a_dead_agent_left_are_removed() {
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    let tables = restricted(1, &["10.0.0.0/8"]);
    mirror.replace(&maps, [(&name(1), &tables)], now).unwrap();
    let id = maps.get::<tables::Frontends>(&lb_ip(1)).unwrap().unwrap().service();
    let stray = [(id, [192, 0, 2, 0]), (id + 7, [10, 0, 0, 0])];
    let stray = stray.map(|(id, addr)| (SourceRangeKey::new(id, Addr::from_v4(addr), 120), 1));
    maps.write::<tables::SourceRanges>(&stray).unwrap();
    assert_eq!(mirror.audit(&maps, now).unwrap(), 2, "an audit finds them as well");
    maps.write::<tables::SourceRanges>(&stray).unwrap();
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.replace(&maps, [(&name(1), &tables)], now).unwrap();
    assert_eq!(read::<tables::SourceRanges>(&maps).len(), 1);
    assert_eq!(admits(&maps, &lb_ip(1), [192, 0, 2, 9]), Some(false));
    maps.remove::<tables::SourceRanges>(&[SourceRangeKey::new(id, Addr::from_v4([10, 0, 0, 0]), 104)])
        .unwrap();
    assert_eq!(admits(&maps, &lb_ip(1), [10, 0, 0, 9]), Some(false));
    assert_eq!(mirror.audit(&maps, now).unwrap(), 1);
    assert_eq!(admits(&maps, &lb_ip(1), [10, 0, 0, 9]), Some(true));
    mirror.change(&maps, [(&name(1), None)], now).unwrap();
    assert_eq!(read::<tables::SourceRanges>(&maps), []);
}

/// Keeps what is written instead of writing it.
struct Recorder<'a>(&'a MemoryMaps, Mutex<Vec<Op>>);

impl Maps for Recorder<'_> {
    fn capacity<T: Table>(&self) -> Result<usize, MapError> {
        self.0.capacity::<T>()
    }
    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        self.0.get::<T>(key)
    }
    fn visit<T: Table>(&self, visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError> {
        self.0.visit::<T>(visit)
    }
    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        for (key, value) in entries {
            let (key, value) = (bytemuck::bytes_of(key), bytemuck::bytes_of(value));
            let id = || bytemuck::pod_read_unaligned::<u32>(key);
            self.1.lock().unwrap().push(match T::NAME {
                "filter" => Op::Filter(id(), bytemuck::pod_read_unaligned(value)),
                "backends" => Op::Backend(id(), bytemuck::pod_read_unaligned(value)),
                "slots" => Op::Slot(id(), bytemuck::pod_read_unaligned(value)),
                "frontends" => {
                    Op::Frontend(bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(value))
                }
                "source_ranges" => Op::SourceRange(bytemuck::pod_read_unaligned(key)),
                "services" => Op::Service(id(), bytemuck::pod_read_unaligned(value)),
                "backend_traffic" => Op::ZeroBackendTraffic(id()),
                "open" => Op::ZeroOpen(id()),
                other => panic!("unexpected write to {other}"),
            });
        }
        Ok(())
    }
    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        assert_eq!(T::NAME, "source_ranges", "unexpected removal");
        let key = |key| Op::RemoveSourceRange(bytemuck::pod_read_unaligned(bytemuck::bytes_of(key)));
        self.1.lock().unwrap().extend(keys.iter().map(key));
        Ok(keys.len())
    }
    fn calls(&self) -> u64 {
        0
    }
}

fn ops_of(mirror: &mut Mirror, maps: &MemoryMaps, desired: &ServiceTables, now: Instant) -> Vec<Op> {
    let recorder = Recorder(maps, Mutex::default());
    mirror.change(&recorder, [(&name(1), Some(desired))], now).unwrap();
    recorder.1.into_inner().unwrap()
}

#[test]
fn what_did_not_change_is_not_written() {
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    let tables = service(1, &[1, 2], Some(30_001));
    assert!(mirror.replace(&maps, [(&name(1), &tables)], now).unwrap().ops > 0);
    assert_eq!(mirror.change(&maps, [(&name(1), Some(&tables))], now).unwrap().ops, 0);
    assert_eq!(mirror.replace(&maps, [(&name(1), &tables)], now).unwrap().ops, 0);
}

/// C1, C2, C3: flows hold ids and generations, so these outlive the agent.
#[test]
fn ids_and_generations_of_unchanged_endpoints_outlive_the_agent() {
    let (maps, mut now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    // Ids that are not in the order of names, and one under its second generation.
    for (n, endpoints) in [(3, [1, 2]), (2, [3, 4]), (1, [5, 6])] {
        mirror.change(&maps, [(&name(n), Some(&service(n, &endpoints, None)))], now).unwrap();
    }
    mirror.change(&maps, [(&name(2), Some(&service(2, &[3], None)))], now).unwrap();
    now += REST;
    mirror.change(&maps, [(&name(2), Some(&service(2, &[3, 7], None)))], now).unwrap();
    assert_eq!(status(&maps, endpoint(7))[0].1.generation(), 2);
    let before = (read::<tables::Backends>(&maps), read::<tables::Services>(&maps));

    let mut mirror = Mirror::open(&maps, now).unwrap();
    let services: BTreeMap<_, _> =
        [(1, [5, 6]), (2, [3, 7]), (3, [1, 2])].map(|(n, e)| (name(n), service(n, &e, None))).into();
    assert_eq!(mirror.replace(&maps, &services, now).unwrap().ops, 0);
    assert_eq!((read::<tables::Backends>(&maps), read::<tables::Services>(&maps)), before);
    let names: HashMap<_, _> = mirror.names().map(|(id, name)| (name.service.clone(), id)).collect();
    for n in 1..=3 {
        let value: Frontend = maps.get::<tables::Frontends>(&frontend(n)).unwrap().unwrap();
        assert_eq!(names[&name(n)], value.service());
    }
}

/// C3: nothing is taken away before the first complete snapshot.
#[test]
fn a_new_agent_removes_nothing_before_it_knows_all() {
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    let services: BTreeMap<_, _> = (1..=3).map(|n| (name(n), service(n, &[n], None))).collect();
    mirror.replace(&maps, &services, now).unwrap();
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.change(&maps, [(&name(1), Some(&service(1, &[9], None)))], now).unwrap();
    mirror.tick(&maps, now).unwrap();
    assert_eq!(mirror.audit(&maps, now).unwrap(), 0);
    assert_eq!(view(&maps).len(), 3);
    mirror.replace(&maps, [(&name(1), &services[&name(1)])], now).unwrap();
    assert_eq!(view(&maps).into_keys().collect::<Vec<_>>(), [frontend(1)]);
    assert!(!status(&maps, endpoint(2))[0].1.has(BackendStatus::SERVING), "C1");
}

/// C1: a flow of an endpoint that is gone finds the flag missing, and later another generation.
#[test]
fn a_backend_id_returns_after_a_rest_under_a_new_generation() {
    let (maps, now) = (MemoryMaps::with_capacities([("backends", 3)]), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.replace(&maps, [(&name(1), &service(1, &[1, 2], None))], now).unwrap();
    let (id, first) = status(&maps, endpoint(2))[0];
    maps.write::<tables::BackendTraffic>(&[(id, Traffic { new_flows: 5, ..Traffic::zeroed() })]).unwrap();
    maps.write::<tables::OpenCounts>(&[(id, Open::from_word(Open::BEGUN))]).unwrap();
    mirror.change(&maps, [(&name(1), Some(&service(1, &[1], None)))], now).unwrap();
    assert_eq!(status(&maps, endpoint(2)), [(id, BackendStatus::new(first.generation(), 0))]);

    let outcome = mirror.change(&maps, [(&name(1), Some(&service(1, &[1, 4], None)))], now).unwrap();
    assert_eq!(outcome.refused.len(), 1, "the only free id rests");
    mirror.tick(&maps, now + REST / 2).unwrap();
    assert_eq!(view(&maps)[&frontend(1)][0].len(), 1);
    mirror.tick(&maps, now + REST).unwrap();
    assert_eq!(status(&maps, endpoint(4))[0].0, id);
    assert_eq!(status(&maps, endpoint(4))[0].1.generation(), first.generation() + 1);
    let traffic: Traffic = maps.get::<tables::BackendTraffic>(&id).unwrap().unwrap();
    assert_eq!(traffic, Traffic::zeroed(), "its counters begin anew");
    assert_eq!(maps.get::<tables::OpenCounts>(&id).unwrap(), Some(Open::default()));
}

#[test]
fn a_backend_that_stops_serving_but_stays_keeps_its_id() {
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    let mut tables = service(1, &[1, 2], None);
    mirror.replace(&maps, [(&name(1), &tables)], now).unwrap();
    let before = status(&maps, endpoint(2))[0];
    let port = tables.ports.values_mut().next().unwrap();
    port.cluster.remove(&endpoint(2));
    mirror.change(&maps, [(&name(1), Some(&tables))], now).unwrap();
    assert_eq!(status(&maps, endpoint(2)), [before], "C2: it drains: in no set, but it serves its flows");
}

/// What was there stays, the other Services go on, and room that comes is used.
#[test]
fn a_full_table_costs_only_the_service_that_finds_no_room() {
    for (table, capacity) in
        [("backends", 5), ("services", 3), ("frontends", 5), ("slots", 5), ("source_ranges", 2)]
    {
        let maps = CheckedMaps::new(&[(table, capacity)]);
        let mut now = Instant::now();
        let mut mirror = Mirror::open(&maps, now).unwrap();
        let mut services: BTreeMap<_, _> =
            (1..=3).map(|n| (name(n), service(n, &[n * 2, n * 2 + 10], None))).collect();
        if table == "source_ranges" {
            for (n, tables) in (1..).zip(services.values_mut()) {
                let port = tables.ports.values_mut().next().unwrap();
                restrict(port, frontend(n), &["10.0.0.0/8"]);
            }
        }
        let outcome = mirror.replace(&maps, &services, now).unwrap();
        assert_eq!(outcome.refused.len(), 1, "{table}");
        let refused = &outcome.refused[0];
        assert!(refused.error.to_string().contains(&format!("--map-size {table}=")), "{}", refused.error);
        assert_eq!(view(&maps).len(), 2);
        assert_eq!(mirror.waiting().collect::<Vec<_>>(), [&name(3)]);
        mirror.change(&maps, [(&name(1), None)], now).unwrap();
        now += REST;
        assert!(mirror.tick(&maps, now).unwrap().refused.is_empty(), "{table}");
        assert_eq!(view(&maps).into_keys().collect::<Vec<_>>(), [frontend(2), frontend(3)]);
        assert_eq!(mirror.audit(&maps, now).unwrap(), 0);
    }
}

/// Z1: an address that passes from one Service to another is there all the time, whichever is told first.
#[test]
fn a_frontend_passes_from_one_service_to_another_without_a_gap() {
    for order in [[1, 2], [2, 1]] {
        let (maps, now) = (CheckedMaps::new(&[]), Instant::now());
        let mut mirror = Mirror::open(&maps, now).unwrap();
        let (one, two) = (service(1, &[1], Some(30_000)), service(2, &[2], None));
        mirror.replace(&maps, [(&name(1), &one), (&name(2), &two)], now).unwrap();
        let (one, two) = (service(1, &[1], None), service(2, &[2], Some(30_000)));
        let changes = order.map(|n| (name(n), if n == 1 { &one } else { &two }));
        let outcome =
            mirror.change(&maps, changes.iter().map(|(name, tables)| (name, Some(*tables))), now).unwrap();
        assert_eq!(view(&maps)[&node_port(30_000)][0], [endpoint(2)].into());
        // The node port's word in the hash table, and nothing removed.
        assert_eq!(outcome.ops, 1);
    }
}

#[test]
fn an_audit_repairs_what_others_changed() {
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.set_node(&maps, &node(&[NODE]), now).unwrap();
    let services: BTreeMap<_, _> = (1..=3).map(|n| (name(n), service(n, &[n, n + 10], None))).collect();
    mirror.replace(&maps, &services, now).unwrap();
    let before = view(&maps);
    let (id, _) = status(&maps, endpoint(1))[0];
    maps.remove::<tables::Frontends>(&[frontend(1)]).unwrap();
    maps.remove::<tables::NodeAddrs>(&[NODE]).unwrap();
    maps.write::<tables::Frontends>(&[(frontend(77), Frontend::new(9, FrontendKind::ClusterIp))]).unwrap();
    maps.write::<tables::Services>(&[(2, Service::default())]).unwrap();
    maps.write::<tables::Backends>(&[(id, Backend::zeroed())]).unwrap();
    maps.write::<tables::Slots>(&[(0, 99)]).unwrap();
    maps.write::<tables::Filter>(&[(FilterBit::service_address(&cluster_ip(2)).word(), 0)]).unwrap();
    assert_eq!(mirror.audit(&maps, now).unwrap(), 7);
    assert_eq!(view(&maps), before);
    check(&maps);
    assert_eq!(mirror.audit(&maps, now).unwrap(), 0);
}

/// S2: an agent that comes finds the ranges of the node that one before it wrote, keeps them up, and takes no Service's for them.
#[test]
fn ranges_of_the_node_are_known_again_and_kept_up() {
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let key = |id, range: &str| crate::compile::range_key(id, &range.parse().unwrap());
    let keys = [
        key(SourceRangeKey::NODE_PORTS, "10.0.0.0/8"),
        key(SourceRangeKey::DENIED, "203.0.113.0/24"),
        key(SourceRangeKey::DENIED, "2001:db8::/64"),
    ];
    let desired = NodeTables { ranges: keys.into(), ..node(&[NODE]) };
    let there =
        || read::<tables::SourceRanges>(&maps).into_iter().map(|(key, _)| key).collect::<BTreeSet<_>>();
    let services = BTreeMap::from([(name(1), restricted(1, &["192.0.2.0/24"]))]);
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.set_node(&maps, &desired, now).unwrap();
    mirror.replace(&maps, &services, now).unwrap();
    assert_eq!(there().len(), keys.len() + 1);
    let mut next = Mirror::open(&maps, now).unwrap();
    assert_eq!(next.set_node(&maps, &desired, now).unwrap().ops, 0);
    next.replace(&maps, &services, now).unwrap();
    assert_eq!(there().len(), keys.len() + 1);
    maps.remove::<tables::SourceRanges>(&keys[..1]).unwrap();
    assert_eq!(next.audit(&maps, now).unwrap(), 1);
    next.set_node(&maps, &NodeTables { ranges: keys[..1].iter().copied().collect(), ..desired }, now)
        .unwrap();
    assert!(there().contains(&keys[0]) && there().len() == 2, "{:?}", there());
    check(&maps);
}

/// A frontend's bit lingers for established flows; a bit that is needed never goes.
#[test]
fn filter_bits_linger_until_they_are_cleared() {
    let (maps, now) = (MemoryMaps::default(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.set_node(&maps, &node(&[NODE]), now).unwrap();
    mirror.replace(&maps, [(&name(1), &service(1, &[1], Some(30_000)))], now).unwrap();
    mirror.change(&maps, [(&name(1), None)], now).unwrap();
    let bits = [
        FilterBit::service_address(&cluster_ip(1)),
        FilterBit::node_port(&NODE, Port::new(30_000), TCP),
        FilterBit::backend(&endpoint(1).addr, endpoint(1).port, TCP),
    ];
    assert!(bits.iter().all(|bit| bit_is_set(&maps, *bit)));
    assert!(mirror.lingering_bits(now).is_empty());
    let lingering = mirror.lingering_bits(now + REST);
    assert_eq!(lingering.len(), bits.len());
    mirror.clear_bits(&maps, &lingering, now + REST).unwrap();
    assert!(!bits.iter().any(|bit| bit_is_set(&maps, *bit)));
    assert!(bit_is_set(&maps, FilterBit::node_address(&NODE)));
}

/// Refuses the writes to one table.
struct Failing<'a>(&'a MemoryMaps, &'static str);

impl Maps for Failing<'_> {
    fn capacity<T: Table>(&self) -> Result<usize, MapError> {
        self.0.capacity::<T>()
    }
    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        self.0.get::<T>(key)
    }
    fn visit<T: Table>(&self, visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError> {
        self.0.visit::<T>(visit)
    }
    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        if T::NAME == self.1 { Err(MapError::Missing(T::NAME)) } else { self.0.write::<T>(entries) }
    }
    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        self.0.remove::<T>(keys)
    }
    fn calls(&self) -> u64 {
        0
    }
}

#[test]
fn a_failed_apply_is_repaired_by_the_next_call() {
    for table in ["filter", "backends", "slots", "services", "frontends"] {
        let (maps, now) = (MemoryMaps::default(), Instant::now());
        let mut mirror = Mirror::open(&maps, now).unwrap();
        mirror.replace(&maps, [(&name(1), &service(1, &[1], None))], now).unwrap();
        let both = [(name(1), service(1, &[2], None)), (name(2), service(2, &[3], None))];
        let changes = || both.iter().map(|(name, tables)| (name, Some(tables)));
        assert!(mirror.change(&Failing(&maps, table), changes(), now).is_err());
        check(&maps);
        let outcome = mirror.tick(&maps, now).unwrap();
        assert!(outcome.repaired > 0, "{table}");
        assert_eq!(view(&maps), wanted(&both.clone().into()));
    }
}
