//! Real maps: what `bpf(2)` really does with what the agent asks of it. Needs root; no packet is sent.

mod capabilities;
mod clock;
mod interfaces;
mod lasting;
mod refusals;

use dataplane_common::backend::Backend;
use dataplane_common::counter::Traffic;
use dataplane_common::filter::{CALLER_CELLS, caller_cell, caller_mark};
use dataplane_common::flow::{Flow, FlowKey, TICK_MASK};
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::tables::{self, Table};
use dataplane_common::{Addr, Port};
use dataplane_tests::bench_sync::{cluster, node, service};
use dataplane_user::admin::names::Names;
use dataplane_user::admin::{View, render};
use dataplane_user::config::Output;
use dataplane_user::expire::{Clock, IdleTimes, Swept, sweep};
use dataplane_user::kernel::bpf;
use dataplane_user::kernel::callers::{CallerCells, OldMarks};
use dataplane_user::kernel::maps::{KernelMaps, MapError, create};
use dataplane_user::kernel::object::{self, Object};
use dataplane_user::model::ObjectName;
use dataplane_user::sync::{LingeringBits, Maps, MemoryMaps, Mirror, REST};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

fn key(n: u32) -> FrontendKey {
    FrontendKey::new(Addr::from_v4(n.to_be_bytes()), Port::new(80), 6)
}

fn frontend(n: u32) -> Frontend {
    Frontend::new(n, FrontendKind::ClusterIp)
}

#[test]
fn batches_write_read_and_remove_what_single_calls_do() {
    let map = create::<tables::Frontends>(50_000).unwrap();
    let entries: Vec<_> = (1..=40_000).map(|n| (key(n), frontend(n))).collect();
    let before = bpf::calls();
    map.insert_batch(&entries).unwrap();
    assert_eq!(bpf::calls() - before, 1);
    assert_eq!(map.get(&key(77)).unwrap(), Some(frontend(77)));
    let read: BTreeMap<_, _> = map.entries().unwrap().into_iter().collect();
    assert_eq!(read, entries.iter().copied().collect());
    assert!(map.remove(&key(5)).unwrap() && !map.remove(&key(5)).unwrap());
    // Some of these are not there: the rest goes all the same.
    let keys: Vec<_> = (1..=20).chain(50_000..50_003).chain(30..=40).map(key).collect();
    assert_eq!(map.remove_batch(&keys).unwrap(), 30);
    assert_eq!(map.entries().unwrap().len(), 40_000 - 31);
    assert_eq!(map.get(&key(41)).unwrap(), Some(frontend(41)));
}

#[test]
fn a_full_map_says_which_and_how_to_enlarge_it() {
    let map = create::<tables::Frontends>(4).unwrap();
    let entries: Vec<_> = (1..=5).map(|n| (key(n), frontend(n))).collect();
    let error = map.insert_batch(&entries).unwrap_err();
    assert!(matches!(error, MapError::Full { name: "frontends", capacity: 4 }), "{error}");
    assert_eq!(map.entries().unwrap().len(), 4, "what was there stays");
    assert!(map.insert(&key(1), &frontend(9), bpf::NO_EXIST).is_err());
}

#[test]
fn per_cpu_values_are_summed() {
    let map = create::<tables::Reasons>(16).unwrap();
    map.insert_batch(&[(1, 3), (2, 0)]).unwrap();
    let cpus = bpf::possible_cpus().unwrap();
    assert_eq!(map.get_per_cpu(&1).unwrap().unwrap(), vec![3; cpus]);
    assert_eq!(map.sum(&1).unwrap().unwrap(), 3 * cpus as u64);
    let sums = map.sums().unwrap();
    assert_eq!((sums.len(), sums[1].1, sums[2].1), (16, 3 * cpus as u64, 0));
}

#[test]
fn a_map_of_another_layout_is_refused() {
    let map = create::<tables::Slots>(16).unwrap();
    let fd = map.as_fd().try_clone_to_owned().unwrap();
    let maps = KernelMaps::from_fds([("backends", fd)]).unwrap();
    assert!(matches!(
        maps.map::<tables::Backends>(),
        Err(MapError::Shape { name: "backends", key: 4, value: 4 })
    ));
    assert!(matches!(maps.map::<tables::Slots>(), Err(MapError::Missing("slots"))));
}

/// Gives this thread a mount namespace of its own.
fn leave_mounts() {
    let null = std::ptr::null();
    // SAFETY: the string is closed and outlives the call; only this thread's mount namespace changes.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
        assert_eq!(libc::mount(null, c"/".as_ptr(), null, libc::MS_REC | libc::MS_PRIVATE, null.cast()), 0);
    }
}

/// A BPF file system of this thread's own mount namespace.
struct PrivateBpffs(CString);

impl PrivateBpffs {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("portolan-kernel-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = CString::new(folder.to_str().unwrap()).unwrap();
        leave_mounts();
        // SAFETY: the strings are closed and outlive the call; only this thread's mount namespace changes.
        let mounted =
            unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
        assert_eq!(mounted, 0);
        Self(path)
    }

    fn folder(&self) -> &Path {
        Path::new(self.0.to_str().unwrap())
    }
}

impl Drop for PrivateBpffs {
    fn drop(&mut self) {
        // SAFETY: the string is closed and outlives the call.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
        let _ = std::fs::remove_dir(self.folder());
    }
}

#[test]
fn pinned_maps_are_found_by_name() {
    let bpffs = PrivateBpffs::new();
    let folder = bpffs.folder();
    let error = KernelMaps::open(folder).unwrap_err();
    assert!(error.to_string().contains("--bpffs"), "{error}");
    let maps = KernelMaps::create(&[("flows", 64)]).unwrap();
    for (name, map) in maps.iter() {
        // A trie has memory for the entries it holds, and it holds none.
        assert_eq!(map.memlock().unwrap() > 0, name != tables::SourceRanges::NAME, "{name}");
        bpf::obj_pin(map.as_fd(), &folder.join(name)).unwrap();
    }
    let again = KernelMaps::open(folder).unwrap();
    // All but the programs' own working memory, and what must have BTF.
    let left_out = [tables::Scratch::NAME, tables::SocketNames::NAME];
    let shared = tables::ALL.iter().filter(|(name, ..)| !left_out.contains(name));
    assert_eq!(again.iter().count(), shared.count());
    assert_eq!(again.capacity::<tables::Flows>().unwrap(), 64);
    let ids = |maps: &KernelMaps| maps.iter().map(|(_, map)| map.shape().id).collect::<Vec<_>>();
    assert_eq!(ids(&again), ids(&maps));
}

fn dump<T: Table>(maps: &impl Maps) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut entries = BTreeMap::new();
    maps.visit::<T>(|key, value| {
        let value = bytemuck::bytes_of(&value).to_vec();
        if value.iter().any(|byte| *byte != 0) {
            entries.insert(bytemuck::bytes_of(&key).to_vec(), value);
        }
    })
    .unwrap();
    entries
}

fn assert_alike(kernel: &KernelMaps, memory: &MemoryMaps) {
    assert_eq!(dump::<tables::Frontends>(kernel), dump::<tables::Frontends>(memory));
    assert_eq!(dump::<tables::Services>(kernel), dump::<tables::Services>(memory));
    assert_eq!(dump::<tables::Slots>(kernel), dump::<tables::Slots>(memory));
    assert_eq!(dump::<tables::Backends>(kernel), dump::<tables::Backends>(memory));
    assert_eq!(dump::<tables::Filter>(kernel), dump::<tables::Filter>(memory));
    assert_eq!(dump::<tables::NodeAddrs>(kernel), dump::<tables::NodeAddrs>(memory));
}

/// The kernel's maps and those in memory hold the same after the same history, so tests on the latter count.
#[test]
fn memory_maps_behave_as_the_kernel_s() {
    let (kernel, memory, mut now) = (KernelMaps::create(&[]).unwrap(), MemoryMaps::default(), Instant::now());
    let services = cluster(500, 3);
    let mut on_kernel = Mirror::open(&kernel, now).unwrap();
    let mut in_memory = Mirror::open(&memory, now).unwrap();
    on_kernel.set_node(&kernel, &node(), now).unwrap();
    in_memory.set_node(&memory, &node(), now).unwrap();
    on_kernel.replace(&kernel, &services, now).unwrap();
    in_memory.replace(&memory, &services, now).unwrap();
    assert_alike(&kernel, &memory);
    for n in 0..300 {
        now += REST / 10;
        let (name, tables) = service(n % 200, (0..n % 5).map(|e| 9_000 + n + e));
        let tables = (n % 7 != 0).then_some(&tables);
        on_kernel.change(&kernel, [(&name, tables)], now).unwrap();
        in_memory.change(&memory, [(&name, tables)], now).unwrap();
    }
    assert_alike(&kernel, &memory);
    assert_eq!(on_kernel.audit(&kernel, now).unwrap(), 0);
    let bits = on_kernel.lingering_bits(now + REST);
    assert!(!bits.is_empty() && bits == in_memory.lingering_bits(now + REST));
    on_kernel.clear_bits(&kernel, &bits, now).unwrap();
    in_memory.clear_bits(&memory, &bits, now).unwrap();
    assert_alike(&kernel, &memory);
    assert_eq!(on_kernel.audit(&kernel, now).unwrap(), 0);
}

/// B10
#[test]
fn a_change_of_one_endpoint_takes_at_most_eight_calls() {
    let mut most = Vec::new();
    for count in [100, 10_000] {
        let (maps, mut now) = (KernelMaps::create(&[]).unwrap(), Instant::now());
        let mut mirror = Mirror::open(&maps, now).unwrap();
        mirror.replace(&maps, &cluster(count, 2), now).unwrap();
        let calls = (0..50).map(|round| {
            now += REST;
            let (name, tables) = service(round, [round * 2, 0x80_0000 + round]);
            mirror.change(&maps, [(&name, Some(&tables))], now).unwrap().calls
        });
        most.push(calls.max().unwrap());
    }
    assert!(most[0] <= 8 && most[0] == most[1], "{most:?}");
}

/// C3
#[test]
fn a_restart_writes_nothing() {
    let (maps, now) = (KernelMaps::create(&[]).unwrap(), Instant::now());
    let services: BTreeMap<ObjectName, _> = cluster(1_000, 2);
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.set_node(&maps, &node(), now).unwrap();
    assert!(mirror.replace(&maps, &services, now).unwrap().ops > 0);
    let mut mirror = Mirror::open(&maps, now).unwrap();
    assert_eq!(mirror.set_node(&maps, &node(), now).unwrap().ops, 0);
    assert_eq!(mirror.replace(&maps, &services, now).unwrap().ops, 0);
    assert_eq!(mirror.audit(&maps, now).unwrap(), 0);
    assert_eq!(mirror.sizes(), (1_000, 2_000, 2_000));
    let backend: Backend = maps.get::<tables::Backends>(&1).unwrap().unwrap();
    assert_eq!(backend.status().generation(), 1);
}

/// C4
#[test]
fn idle_flows_leave_the_table() {
    let maps = KernelMaps::create(&[]).unwrap();
    let mut entries = Vec::new();
    for n in 0..20_000u32 {
        let client = (Addr::from_v4((0x0a01_0000 + n).to_be_bytes()), Port::new(40_000));
        let frontend = (Addr::from_v4([10, 96, 0, 1]), Port::new(80));
        let endpoint = (Addr::from_v4([10, 244, 0, 1]), Port::new(8080));
        let mut forward = Flow::with_flags(Flow::CONFIRMED);
        (forward.src, forward.src_port, forward.dst, forward.dst_port) =
            (client.0, client.1, endpoint.0, endpoint.1);
        let mut reply = Flow::with_flags(Flow::REPLY | Flow::CONFIRMED);
        (reply.src, reply.src_port, reply.dst, reply.dst_port) = (frontend.0, frontend.1, client.0, client.1);
        let last_seen = if n % 4 == 0 { 100_000 } else { 1 };
        (forward.last_seen, reply.last_seen) = (last_seen, last_seen);
        entries.push((FlowKey::new(client.0, client.1, frontend.0, frontend.1, 6), forward));
        entries.push((forward.partner(6), reply));
    }
    maps.write::<tables::Flows>(&entries).unwrap();
    let (mut bits, clock) = (LingeringBits::default(), Clock { now: 100_000, tick: Duration::from_secs(1) });
    let swept =
        sweep(&maps, &IdleTimes::default(), clock, &mut bits, &mut OldMarks::default(), &mut ()).unwrap();
    assert_eq!(swept, Swept { idle: 30_000, established: 10_000, ..Swept::default() });
    assert_eq!(maps.count(tables::Flows::NAME).unwrap(), 10_000);
}

/// C3: programs mark cells of the filter of replies at any moment.
#[test]
fn a_cell_of_callers_is_cleared_only_if_its_mark_is_old_and_the_same() {
    let table = create::<tables::Callers>(CALLER_CELLS).unwrap();
    let cells = CallerCells::map(&table).unwrap();
    let mark = |cell, tick| table.insert(&cell, &caller_mark(tick), bpf::EXIST).unwrap();
    let marked = || -> Vec<u32> {
        let entries = table.entries().unwrap().into_iter();
        entries.filter(|(_, mark)| *mark != 0).map(|(cell, _)| cell).collect()
    };
    mark(5, 100);
    mark(CALLER_CELLS as u32 - 1, TICK_MASK);
    assert_eq!(cells.old(107), cells.old(100), "too young still, but for the one before the clock's turn");
    let old = cells.old(108);
    mark(5, 108);
    cells.clear(&old);
    assert_eq!(marked(), [5], "a flow began meanwhile");
    assert_eq!(cells.old(50), OldMarks::default(), "marked after the clock was read");
    cells.clear(&cells.old(200));
    assert!(marked().is_empty());

    cells.mark_all(300);
    let client = Addr::from_v4([10, 244, 0, 5]);
    let key = FlowKey::new(Addr::from_v4([10, 244, 1, 2]), Port::new(8080), client, Port::new(40_000), 6);
    let mut old = cells.old(400);
    old.keep_for(&key);
    cells.clear(&old);
    assert_eq!(marked(), [caller_cell(&client, 6)]);
    assert!(CallerCells::map(&create::<tables::Callers>(64).unwrap()).is_err());
}

/// H3: those for devices without a link-layer header are loaded where such a device first appears.
#[test]
fn programs_that_are_loaded_later_are_counted_too() {
    let mut object = Object::open(&object::Options::default()).unwrap();
    let programs = object.programs();
    let runs = || programs.each(|name, program| Some((name.to_string(), bpf::program_runs(program).ok()?.0)));
    object.load("tc_pod_out").unwrap();
    assert_eq!(runs(), [("tc_pod_out".to_owned(), 0)]);
    object.load("tc_bare_out").unwrap();
    object.load("tc_bare_out").unwrap();
    assert_eq!(runs(), [("tc_pod_out".to_owned(), 0), ("tc_bare_out".to_owned(), 0)]);
}

#[test]
fn the_tables_are_shown_for_people_and_for_programs() {
    let (maps, now) = (KernelMaps::create(&[]).unwrap(), Instant::now());
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.replace(&maps, &cluster(3, 2), now).unwrap();
    mirror.change(&maps, [(&service(2, []).0, None)], now).unwrap();
    let traffic = Traffic { packets_in: 7, ..Traffic::default() };
    maps.write::<tables::BackendTraffic>(&[(2, traffic)]).unwrap();
    maps.write::<tables::Reasons>(&[(1, 5)]).unwrap();
    let names = Names::new(mirror.names());
    let shown = |view, output| render(view, &maps, &names, output).unwrap();

    let text = shown(View::Services, Output::Table);
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[1][..6], ["bench/service-0:http", "TCP", "ClusterIP", "172.16.0.0:80", "2", "0"]);
    let json: serde_json::Value = serde_json::from_str(&shown(View::Services, Output::Json)).unwrap();
    assert_eq!(json[1]["addresses"][0]["address"], "172.16.0.1");
    assert_eq!(json[1]["cluster_endpoints"], 2);

    let json: serde_json::Value = serde_json::from_str(&shown(View::Backends, Output::Json)).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 4, "backends of a Service that is gone are not shown");
    assert_eq!((&json[1]["address"], &json[1]["in_use"]), (&"10.0.0.1".into(), &true.into()));
    assert_eq!(json[1]["traffic"]["packets_in"], 7);

    let json: serde_json::Value = serde_json::from_str(&shown(View::Drops, Output::Json)).unwrap();
    assert_eq!((&json[0]["reason"], &json[0]["disposition"]), (&"no-endpoints".into(), &"rejected".into()));
    assert_eq!(json[0]["count"], 5 * bpf::possible_cpus().unwrap() as u64);
    let text = shown(View::Drops, Output::Table);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines.len() == 2 && lines[1].starts_with("no-endpoints "), "only what occurred: {text}");
    assert_eq!(shown(View::Flows, Output::Json), "[]\n");
}

/// B13: room costs little where it is not used, and a flow has the memory of two slabs of 192 bytes.
#[test]
fn a_million_flows_take_no_more_than_430_bytes_each() {
    /// Room for as many flows as a node of 64 GiB has by default.
    const ROOM: usize = 1 << 21;
    const FLOWS: usize = 1_000_000;
    // Entries are charged to whoever has the map: their slabs are those of memory that is. The kernel keeps a word of its own for each
    // such object, in other slabs.
    let slabs = || {
        let text = std::fs::read_to_string("/proc/slabinfo").unwrap();
        let line = text.lines().find(|line| line.starts_with("kmalloc-cg-192 ")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        words[1].parse::<u64>().unwrap() * words[3].parse::<u64>().unwrap()
    };
    // What an earlier table had is given back after some grace periods.
    let mut before = slabs();
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = slabs();
        if now.abs_diff(before) < 1 << 20 {
            break;
        }
        before = now;
    }
    let map = create::<tables::Flows>(ROOM).unwrap();
    let entry = |n: usize, reply: bool| {
        let [_, a, b, c] = (n as u32).to_be_bytes();
        let (client, frontend) = (Addr::from_v4([10, a, b, c]), Addr::from_v4([10, 96, 0, 1]));
        let flags = if reply { Flow::REPLY } else { 0 };
        let key = FlowKey::new(client, Port::new(1), frontend, Port::new(80), 6);
        (if reply { key.reversed() } else { key }, Flow::with_flags(flags))
    };
    let fill = |from: usize, to: usize| {
        for begin in (from..to).step_by(1_000) {
            let numbers = begin..to.min(begin + 1_000);
            let entries: Vec<_> = numbers.flat_map(|n| [entry(n, false), entry(n, true)]).collect();
            // The kernel refills what it has for entries beside: whoever is faster meets an empty shelf, and tries again.
            let written = (0..1_000).any(|_| {
                let written = map.insert_batch(&entries).is_ok();
                if !written {
                    std::thread::sleep(Duration::from_millis(5));
                }
                written
            });
            assert!(written, "no memory for {} entries", entries.len());
        }
    };
    fill(0, 1_000);
    let few = map.raw().memlock().unwrap();
    assert!(few <= 40 << 20, "{few} bytes for 1,000 flows");
    fill(1_000, FLOWS);
    // Where there are no entries the table takes its buckets alone.
    let empty = create::<tables::Flows>(ROOM).unwrap().raw().memlock().unwrap();
    let each = (slabs().saturating_sub(before) + empty) as f64 / FLOWS as f64;
    println!("{few} bytes for 1,000 flows, {each:.0} bytes each of a million");
    assert!((340.0..=430.0).contains(&each), "{each} bytes each");
}
