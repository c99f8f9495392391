//! What is the same at every run, and must not grow unnoticed: instructions that the verifier walks, bytes of stack, `bpf()`
//! calls of a change, bytes of the maps, allocations of an event. Needs root.

mod allocations;
mod record;
mod words;

use dataplane_common::tables::{self, TableKind};
use dataplane_tests::bench::record::kernel;
use dataplane_tests::bench_prog::{
    MAP_MEMORY_LIMIT, STACK_LIMIT, VERIFIED_LIMIT, beside_flows, deepest_stacks, loaded, map_memory,
    verified_instructions,
};
use dataplane_tests::bench_sync::{change, cluster, node, service};
use dataplane_user::kernel::bpf;
use dataplane_user::kernel::maps::KernelMaps;
use dataplane_user::kernel::object::{Object, Options, TOOLCHAIN};
use dataplane_user::sync::Mirror;
use record::{Numbers, hold, tell};
use std::time::Instant;

/// The kernel as far as numbers depend on it: its version without the patch, and the architecture.
fn linux() -> String {
    let release = kernel();
    let version: Vec<_> = release.split('.').take(2).collect();
    format!("Linux {} {}", version.join("."), std::env::consts::ARCH)
}

#[test]
fn the_verifier_walks_no_more_instructions_than_recorded() {
    let (verified, _) = verified_instructions(&loaded().unwrap()).unwrap();
    let numbers: Numbers = verified.into_iter().map(|(name, count)| (name, u64::from(count))).collect();
    let on = format!("{}, {TOOLCHAIN}", linux());
    hold("verified instructions", &on, &numbers, Some(u64::from(VERIFIED_LIMIT)));
}

#[test]
fn the_stack_of_no_program_is_deeper_than_recorded() {
    let depths = deepest_stacks(&loaded().unwrap()).unwrap();
    hold("bytes of stack", &format!("{}, {TOOLCHAIN}", linux()), &depths, Some(STACK_LIMIT));
}

/// An endpoint set is where it begins and how long it is: read in halves, it could be of two sets.
#[test]
fn what_must_agree_of_a_service_is_loaded_at_once() {
    let mut object = Object::open(&Options::default()).unwrap();
    let services = words::map_id(&object.map("services").unwrap()).unwrap();
    for program in ["connect4", "connect6", "sendmsg4", "sendmsg6", "xdp_uplink", "tc_uplink_in", "tc_pod_in"]
    {
        object.load(program).unwrap();
        let (id, _) = object.program_id(program).unwrap();
        let loads = words::loads(id, services).unwrap();
        assert!(!loads.is_empty(), "{program} loads nothing of a Service");
        assert!(loads.iter().all(|(bytes, _)| *bytes == 8), "{program}: {loads:?}");
    }
}

#[test]
fn the_maps_take_no_more_bytes_than_recorded() {
    let memory: Numbers = map_memory().unwrap();
    let all = beside_flows(&memory);
    if all > MAP_MEMORY_LIMIT {
        tell(&format!(
            "MISSED: B13, all maps but flows take {all} bytes, above the target of {MAP_MEMORY_LIMIT}"
        ));
    }
    let on = format!("{}, {} CPUs", linux(), bpf::possible_cpus().unwrap());
    hold("bytes of maps", &on, &memory, None);
}

/// B13: per-CPU maps have a value for each CPU that there could be, and tables whose memory is taken when they are made an entry.
#[test]
fn the_maps_are_small_on_machines_of_many_cpus() {
    /// Of a hash table's entry, beside key and value, and of the list of spare ones.
    const ENTRY: usize = 48;
    const SPARE: usize = 8;
    let memory: Numbers = map_memory().unwrap();
    let own = bpf::possible_cpus().unwrap();
    let sizes: std::collections::HashMap<_, _> =
        tables::SIZES.iter().map(|(name, key, value)| (*name, (key + value, *value))).collect();
    let of_each_cpu: usize = tables::ALL
        .iter()
        .map(|(name, kind, entries)| match kind {
            TableKind::PerCpuArray => entries * sizes[name].1.next_multiple_of(8),
            TableKind::Hash => ENTRY + SPARE + sizes[name].0,
            TableKind::Array | TableKind::MappedArray | TableKind::LpmTrie | TableKind::SkStorage => 0,
            TableKind::HashByEntry | TableKind::LruHash => 0,
        })
        .sum();
    let all = beside_flows(&memory);
    for (cpus, limit) in [(2, 32), (64, 36), (128, 40)] {
        let here = all as f64 + of_each_cpu as f64 * (cpus as f64 - own as f64);
        let mebibytes = here / f64::from(1 << 20);
        tell(&format!("B13: all maps but flows take {mebibytes:.1} MiB with {cpus} possible CPUs"));
        assert!(
            mebibytes <= f64::from(limit),
            "{mebibytes} MiB with {cpus} CPUs, above the target of {limit}"
        );
    }
}

#[test]
fn changes_take_no_more_calls_than_recorded() {
    /// B10.
    const CALLS_LIMIT: u64 = 8;
    let few = change(100, 2, 50).unwrap().calls;
    let many = change(3_000, 2, 50).unwrap().calls;
    assert_eq!(few, many, "the calls of a change grow with the number of Services");
    let mut numbers = Numbers::from([("one endpoint of one Service changes".to_owned(), many)]);
    let maps = KernelMaps::create(&[]).unwrap();
    let now = Instant::now();
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.set_node(&maps, &node(), now).unwrap();
    mirror.replace(&maps, &cluster(100, 2), now).unwrap();
    let (name, tables) = service(1_000, [1, 2]);
    let mut count = |what: &str, tables| {
        let before = bpf::calls();
        mirror.change(&maps, [(&name, tables)], now).unwrap();
        numbers.insert(what.to_owned(), bpf::calls() - before);
    };
    count("a Service of two endpoints comes", Some(&tables));
    count("nothing about a Service changes", Some(&tables));
    count("a Service of two endpoints goes", None);
    hold("bpf() calls", "any machine", &numbers, Some(CALLS_LIMIT * 2));
    assert!(
        many <= CALLS_LIMIT,
        "one endpoint's change takes {many} calls, above the target of {CALLS_LIMIT}"
    );
}
