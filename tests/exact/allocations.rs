//! Allocations, counted: of the thread that is asked, and of no other.

use crate::record::{Numbers, hold};
use dataplane_tests::bench::record::output;
use dataplane_tests::bench_agent::recorded::{self, Recorded};
use dataplane_tests::bench_sync::node;
use dataplane_user::compile::{Compiler, Context, OwnAddresses};
use dataplane_user::model::store::Store;
use dataplane_user::model::{Change, Object};
use dataplane_user::sync::{MemoryMaps, Mirror, REST};
use dataplane_user::watch::names::Names;
use dataplane_user::watch::objects::{Written, WrittenEndpointSlice, WrittenService};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Instant;

/// The system's allocator, counting.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came; the counter is a number of this thread and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a closure allocates: the median of many runs, for now and then a table grows.
fn allocations(mut closure: impl FnMut(u32)) -> u64 {
    let mut counts: Vec<u64> = (0..101)
        .map(|run| {
            let before = COUNT.get();
            closure(run);
            COUNT.get() - before
        })
        .collect();
    counts.sort_unstable();
    counts[counts.len() / 2]
}

const SERVICES: u32 = 1_000;

fn slice_text(recorded: &Recorded, n: u32, first: u32) -> String {
    let endpoints = [first, 1 << 21].map(recorded::endpoint);
    recorded.slice(n, &recorded::name(n), &endpoints, 8080)
}

fn slice(names: &mut Names, text: &str) -> Object {
    serde_json::from_str::<WrittenEndpointSlice>(text).unwrap().convert(names).unwrap()
}

#[test]
fn an_event_allocates_no_more_than_recorded() {
    let (recorded, mut names) = (Recorded::read().unwrap(), Names::default());
    let mut store = Store::new("here");
    let mut dirty = BTreeSet::new();
    for n in 0..SERVICES {
        let text = recorded.service(n, &recorded::name(n), recorded::cluster_ip(n), 80);
        let service: WrittenService = serde_json::from_str(&text).unwrap();
        dirty.extend(store.apply(Change::Applied(service.convert(&mut names).unwrap())).services);
        let object = slice(&mut names, &slice_text(&recorded, n, n));
        dirty.extend(store.apply(Change::Applied(object)).services);
    }
    let context = Context::new(&store, None, &[], &OwnAddresses::default());
    let mut compiler = Compiler::default();
    let maps = MemoryMaps::default();
    let mut now = Instant::now();
    let mut mirror = Mirror::open(&maps, now).unwrap();
    mirror.set_node(&maps, &node(), now).unwrap();
    let update = compiler.update(&store, &dirty, &context);
    let all = update.services.iter().map(|(name, compiled)| (name, Some(&compiled.tables)));
    mirror.change(&maps, all, now).unwrap();

    let texts: Vec<_> = (0..101).map(|run| slice_text(&recorded, run, (1 << 20) + run)).collect();
    let mut changes: Vec<_> = texts.iter().map(|text| Some(slice(&mut names, text))).collect();
    let read = allocations(|run| {
        slice(&mut names, &texts[run as usize]);
    });
    let written = allocations(|run| {
        now += REST / 10;
        let object = changes[run as usize].take().unwrap();
        let dirty = store.apply(Change::Applied(object)).services;
        let update = compiler.update(&store, &dirty, &context);
        let changes = update.services.iter().map(|(name, compiled)| (name, Some(&compiled.tables)));
        let outcome = mirror.change(&maps, changes, now).unwrap();
        assert!(outcome.ops > 0, "the event changes nothing");
    });
    let numbers = Numbers::from([
        ("an EndpointSlice is read".to_owned(), read),
        ("its change is compiled and written".to_owned(), written),
    ]);
    hold("allocations", &rust(), &numbers, None);
}

/// What the numbers depend on beside the code.
fn rust() -> String {
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    // `cargo 1.95.0 (…)`: cargo and the compiler come together.
    let version = output(cargo, &["--version"]);
    let version = version.split([' ', '.']).skip(1).take(2).collect::<Vec<_>>().join(".");
    format!("Rust {version}, profile {profile}")
}
