//! Each packet program on packets of a known flow (B6) and of nobody (B7), in turn with one that does nothing; what the
//! verifier walked (B8), and what the maps take (B13).
//!
//! The flow is chosen so that the bytes written equal those read and no time to live falls: every repeat meets the same
//! packet. The established table holds 60,000 other flows.

use super::{Effort, stack};
use crate::bench::target::Ratio;
use crate::packet::build::{Packet, tcp, tcp_packet};
use anyhow::{Context as _, Result, ensure};
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::filter::{FilterBit, caller_cell, caller_mark};
use dataplane_common::flow::{Flow, FlowKey};
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::tables::{self, Backends, Callers, Filter, Flows, Frontends, Table as _};
use dataplane_common::{Addr, Port};
use dataplane_user::config::MapSize;
use dataplane_user::kernel::bpf::{self, MapFd, TestRun};
use dataplane_user::kernel::maps::{KernelMaps, Map};
use dataplane_user::kernel::object::{Object, Options};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The addresses of the flow and of nobody.
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    client: &'static str,
    service: &'static str,
    endpoint: &'static str,
    stranger: &'static str,
}

/// Those of B6 and B7.
pub(super) const IPV4: Addresses =
    Addresses { client: "192.0.2.7", service: "10.96.0.1", endpoint: "10.244.1.9", stranger: "198.51.100.1" };

/// The same in IPv6.
pub(super) const IPV6: Addresses = Addresses {
    client: "2001:db8::7",
    service: "fd00:10:96::1",
    endpoint: "fd00:10:244:1::9",
    stranger: "2001:db8:e::1",
};

const OTHER_FLOWS: u32 = 60_000;
/// Two addresses for each of 30,000 Services.
const FRONTENDS: u32 = 60_000;

/// Each program, the empty one it is held against, and whether it meets the flow's reply.
const PROGRAMS: [(&str, &str, bool); 5] = [
    ("xdp_uplink", "xdp_empty", false),
    ("tc_uplink_in", "tc_empty", false),
    ("tc_uplink_out", "tc_empty", true),
    ("tc_pod_in", "tc_empty", false),
    ("tc_pod_out", "tc_empty", true),
];

/// What one program costs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProgramCost {
    /// Its name.
    pub program: String,
    /// Nanoseconds of the program that does nothing.
    pub empty: f64,
    /// Nanoseconds for a packet of a known flow.
    pub established: f64,
    /// Nanoseconds for a packet that is not ours.
    pub not_ours: f64,
    /// Known flow over empty, sample by sample.
    pub established_ratio: Option<Ratio>,
    /// Not ours over empty, sample by sample.
    pub not_ours_ratio: Option<Ratio>,
}

/// Every program that the agent loads.
pub(super) const ALL: [&str; 17] = [
    "xdp_uplink",
    "xdp_generic",
    "tc_bare_in",
    "tc_bare_out",
    "tc_uplink_in",
    "tc_uplink_out",
    "tc_pod_in",
    "tc_pod_out",
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "sock_release",
];

/// All programs, loaded.
///
/// # Errors
/// If one does not load.
pub fn loaded() -> Result<Object> {
    let mut object = Object::open(&Options::default()).context("loading programs: is this root?")?;
    for program in ALL {
        object.load(program)?;
    }
    Ok(object)
}

/// How many instructions the verifier walks for each of the programs, and how many bytes of machine code it becomes.
///
/// # Errors
/// If the kernel does not tell.
pub fn verified_instructions(object: &Object) -> Result<(BTreeMap<String, u32>, BTreeMap<String, u32>)> {
    let (mut verified, mut jited) = (BTreeMap::new(), BTreeMap::new());
    for program in ALL {
        let (_, count) = object.program_id(program)?;
        let count =
            count.with_context(|| format!("the kernel does not tell what it verified of {program}"))?;
        verified.insert(program.to_owned(), count);
        jited.insert(program.to_owned(), object.jit_size(program)?);
    }
    Ok((verified, jited))
}

/// Bytes of the deepest stack of each of the programs, as kernels before 6.8 count it.
///
/// # Errors
/// As [`verified_instructions`].
pub fn deepest_stacks(object: &Object) -> Result<BTreeMap<String, u64>> {
    let depth = |program: &str| Ok((program.to_owned(), stack::deepest(object.program_id(program)?.0)?));
    ALL.into_iter().map(depth).collect()
}

/// Bytes of all maps but `flows`, whose memory is taken by entry.
pub fn beside_flows(memory: &BTreeMap<String, u64>) -> u64 {
    memory.iter().filter(|(name, _)| *name != Flows::NAME).map(|(_, bytes)| bytes).sum()
}

/// Bytes by which the kernel's memory grows when all maps are made at their default sizes, but `flows` with a single entry. A machine that
/// does nothing else says it truly. Kernels before 6.4 tell of a map what its entries take, and nothing of CPUs.
///
/// # Errors
/// As [`map_memory`].
pub fn kernel_memory_beside_flows() -> Result<u64> {
    /// Per-CPU values, what is too large for a slab, and slabs.
    const KINDS: [&str; 3] = ["Percpu:", "VmallocUsed:", "SUnreclaim:"];
    let used = || -> Result<u64> {
        let text = std::fs::read_to_string("/proc/meminfo")?;
        let kinds = text.lines().filter(|line| KINDS.iter().any(|kind| line.starts_with(kind)));
        let kib = kinds.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        Ok(kib.sum::<u64>() << 10)
    };
    let before = used()?;
    let sizes = [MapSize { map: Flows::NAME, entries: 1 }];
    let _object = Object::open(&Options { sizes: &sizes, ..Options::default() })?;
    Ok(used()?.saturating_sub(before))
}

/// How many bytes each map takes at its default size, as the kernel tells.
///
/// # Errors
/// If the maps cannot be made.
pub fn map_memory() -> Result<BTreeMap<String, u64>> {
    let object = Object::open(&Options::default()).context("making maps: is this root?")?;
    let memory = tables::ALL.iter().map(|(name, ..)| {
        let map = MapFd::new(object.map(name)?)?;
        Ok(((*name).to_owned(), map.memlock()?))
    });
    memory.collect()
}

/// How many bytes more the frontends take when all are there that the default sizes are made for: their memory is taken by
/// entry.
///
/// # Errors
/// As [`map_memory`].
pub fn memory_of_frontends() -> Result<u64> {
    let object = Object::open(&Options::default()).context("making maps: is this root?")?;
    let frontends = Map::<Frontends>::from_fd(object.map(Frontends::NAME)?)?;
    let map = MapFd::new(object.map(Frontends::NAME)?)?;
    let empty = map.memlock()?;
    let entries: Vec<_> = (0..FRONTENDS)
        .map(|n| {
            let [_, a, b, c] = n.to_be_bytes();
            let key = FrontendKey::new(Addr::from_v4([10, a, b, c]), Port::new(80), 6);
            (key, Frontend::new(n, FrontendKind::ClusterIp))
        })
        .collect();
    frontends.insert_batch(&entries)?;
    Ok(map.memlock()? - empty)
}

/// Measures every packet program, sample by sample in turn with the empty one.
pub(super) fn measure(effort: Effort, addresses: Addresses) -> Result<Vec<ProgramCost>> {
    let Addresses { client, service, stranger, .. } = addresses;
    let mut object = Object::open(&Options::default())?;
    for name in PROGRAMS.iter().flat_map(|(name, empty, _)| [*name, *empty]) {
        object.load(name)?;
    }
    let fds = tables::ALL.iter().map(|(name, ..)| Ok((*name, object.map(name)?)));
    fill(&KernelMaps::from_fds(fds.collect::<Result<Vec<_>>>()?)?, addresses)?;
    let forward = tcp_packet((client, 40_000), (service, 80), tcp::ACK);
    let reply = tcp_packet((service, 80), (client, 40_000), tcp::ACK);
    let stranger = tcp_packet((client, 40_000), (stranger, 80), tcp::ACK);
    PROGRAMS
        .iter()
        .map(|(program, empty, meets_reply)| {
            let ours = if *meets_reply { &reply } else { &forward };
            cost(&object, program, empty, [ours, &stranger], effort)
        })
        .collect()
}

fn cost(
    object: &Object,
    program: &str,
    empty: &str,
    [ours, stranger]: [&Packet; 2],
    effort: Effort,
) -> Result<ProgramCost> {
    let legs = [(empty, ours.bytes()), (program, ours.bytes()), (program, stranger.bytes())];
    let mut samples: [Vec<Option<f64>>; 3] = Default::default();
    for _ in 0..effort.samples {
        for ((program, data), samples) in legs.iter().zip(&mut samples) {
            samples.push(Some(run(object, program, data, effort.repeats)?));
        }
    }
    let median = |samples: &[Option<f64>]| Ratio::among(samples.iter().flatten().copied());
    let median = |samples| median(samples).map(|ratio| ratio.median).context("nothing was measured");
    let [base, established, not_ours] = &samples;
    Ok(ProgramCost {
        program: program.to_owned(),
        empty: median(base)?,
        established: median(established)?,
        not_ours: median(not_ours)?,
        established_ratio: Ratio::of(established, base),
        not_ours_ratio: Ratio::of(not_ours, base),
    })
}

/// Mean nanoseconds of one run of a program on this packet, which must leave as it came.
fn run(object: &Object, program: &str, data: &[u8], repeat: u32) -> Result<f64> {
    let run = TestRun { data, repeat, ..TestRun::default() };
    let result = bpf::prog_test_run(object.program(program)?, &run)?;
    ensure!(result.data == data, "{program} changed the packet: nothing to measure");
    Ok(f64::from(result.nanoseconds))
}

/// One established flow whose translation changes nothing, among others.
fn fill(maps: &KernelMaps, addresses: Addresses) -> Result<()> {
    let addr = |text: &str| -> Result<Addr> { Ok(Addr::from(text.parse::<IpAddr>()?)) };
    let Addresses { client, service, endpoint, .. } = addresses;
    let (client, service, endpoint) = (addr(client)?, addr(service)?, addr(endpoint)?);
    let bits = [
        FilterBit::service_address(&service),
        FilterBit::backend(&service, Port::new(80), 6),
        FilterBit::backend(&endpoint, Port::new(8080), 6),
    ];
    let mut words: BTreeMap<u32, u64> = BTreeMap::new();
    bits.iter().for_each(|bit| *words.entry(bit.word()).or_default() |= bit.mask());
    maps.map::<Filter>()?.insert_batch(&words.into_iter().collect::<Vec<_>>())?;
    let status = BackendStatus::new(1, BackendStatus::SERVING | BackendStatus::LOCAL);
    maps.map::<Backends>()?.insert(&1, &Backend::new(status, endpoint, Port::new(8080), 1), bpf::ANY)?;

    maps.map::<Callers>()?.insert(&caller_cell(&client, 6), &caller_mark(0), bpf::ANY)?;
    let key = FlowKey::new(client, Port::new(40_000), service, Port::new(80), 6);
    let half = |key: &FlowKey, flags| {
        let mut flow = Flow::with_flags(flags | Flow::CONFIRMED);
        (flow.src, flow.src_port, flow.dst, flow.dst_port) = (key.src, key.src_port, key.dst, key.dst_port);
        (flow.backend, flow.generation, flow.check) = (1, 1, key.check());
        (*key, flow)
    };
    let mut flows = vec![half(&key, 0), half(&key.reversed(), Flow::REPLY)];
    for n in 0..OTHER_FLOWS {
        let [_, a, b, c] = n.to_be_bytes();
        flows.push(half(
            &FlowKey::new(Addr::from_v4([11, a, b, c]), Port::new(1), service, Port::new(80), 6),
            0,
        ));
    }
    Ok(maps.map::<Flows>()?.insert_batch(&flows)?)
}
