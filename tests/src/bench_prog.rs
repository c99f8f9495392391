//! Measures the programs themselves (B6, B7, B8), each beside one that does nothing, in one process.
//!
//! The flow is chosen so that the bytes written equal those read and no time to live falls: every repeat meets the same
//! packet. The established table holds 60,000 other flows.

use crate::packet::build::{Packet, tcp, tcp_packet};
use anyhow::{Result, ensure};
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::filter::FilterBit;
use dataplane_common::flow::{Flow, FlowKey};
use dataplane_common::tables::{self, Backends, Established, Filter};
use dataplane_common::{Addr, Port};
use dataplane_user::kernel::bpf::{self, TestRun};
use dataplane_user::kernel::maps::KernelMaps;
use dataplane_user::kernel::object::{Object, Options};
use std::collections::BTreeMap;
use std::net::IpAddr;

const CLIENT: &str = "192.0.2.7";
const SERVICE: &str = "10.96.0.1";
const ENDPOINT: &str = "10.244.1.9";
const OTHER_FLOWS: u32 = 60_000;

/// B6: times the empty program.
const ESTABLISHED_LIMIT: f64 = 6.0;
/// B7: times the empty program.
const NOT_OURS_LIMIT: f64 = 2.5;
/// B8: instructions the verifier walks.
const VERIFIED_LIMIT: u32 = 84_647;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchProgArgs {
    /// Runs of a program whose mean is one sample.
    #[arg(long, default_value_t = 1_000_000)]
    pub repeats: u32,
    /// Samples; the median counts.
    #[arg(long, default_value_t = 15)]
    pub samples: usize,
}

/// Each program, the empty one it is held against, and whether it meets the flow's reply.
const PROGRAMS: [(&str, &str, bool); 5] = [
    ("xdp_uplink", "xdp_empty", false),
    ("tc_uplink_in", "tc_empty", false),
    ("tc_uplink_out", "tc_empty", true),
    ("tc_pod_in", "tc_empty", false),
    ("tc_pod_out", "tc_empty", true),
];

/// Measures, prints, and says whether all targets are met.
///
/// # Errors
/// If a program does not load, or does something else than what is to be measured.
pub fn run(args: &BenchProgArgs) -> Result<bool> {
    let mut object = Object::open(&Options::default())?;
    for name in PROGRAMS.iter().flat_map(|(name, empty, _)| [*name, *empty]) {
        object.load(name)?;
    }
    let fds = tables::ALL.iter().map(|(name, ..)| Ok((*name, object.map(name)?)));
    fill(&KernelMaps::from_fds(fds.collect::<Result<Vec<_>>>()?)?)?;
    let forward = tcp_packet((CLIENT, 40_000), (SERVICE, 80), tcp::ACK);
    let reply = tcp_packet((SERVICE, 80), (CLIENT, 40_000), tcp::ACK);
    let stranger = tcp_packet((CLIENT, 40_000), ("198.51.100.1", 80), tcp::ACK);
    println!(
        "nanoseconds per packet, median of {} × {} runs; limits: established {ESTABLISHED_LIMIT} × (B6), not ours {NOT_OURS_LIMIT} × (B7),",
        args.samples, args.repeats
    );
    println!("verified instructions {VERIFIED_LIMIT} (B8)");
    println!("program        empty   established      not ours         verified   JIT bytes");
    let mut met = true;
    for (name, empty, meets_reply) in PROGRAMS {
        let ours = if meets_reply { &reply } else { &forward };
        let base = measure(&object, empty, ours, args)?;
        let established = measure(&object, name, ours, args)?;
        let not_ours = measure(&object, name, &stranger, args)?;
        let (_, verified) = object.program_id(name)?;
        let verified = verified.unwrap_or_default();
        let ratios = [established / base, not_ours / base];
        let ok = [ratios[0] <= ESTABLISHED_LIMIT, ratios[1] <= NOT_OURS_LIMIT, verified <= VERIFIED_LIMIT];
        let word = |ok: bool| if ok { "met" } else { "missed" };
        println!(
            "{name:<14} {base:>5.0}   {established:>4.0} {:>5.2} × {:<6} {not_ours:>4.0} {:>5.2} × {:<6} {verified:>6} {:<6} {:>6}",
            ratios[0],
            word(ok[0]),
            ratios[1],
            word(ok[1]),
            word(ok[2]),
            object.jit_size(name)?
        );
        met &= ok.iter().all(|ok| *ok);
    }
    Ok(met)
}

/// One established flow whose translation changes nothing, among others.
fn fill(maps: &KernelMaps) -> Result<()> {
    let addr = |text: &str| -> Result<Addr> { Ok(Addr::from(text.parse::<IpAddr>()?)) };
    let (client, service, endpoint) = (addr(CLIENT)?, addr(SERVICE)?, addr(ENDPOINT)?);
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

    let key = FlowKey::new(client, Port::new(40_000), service, Port::new(80), 6);
    let half = |key: &FlowKey, flags| {
        let mut flow = Flow::with_flags(flags);
        (flow.src, flow.src_port, flow.dst, flow.dst_port) = (key.src, key.src_port, key.dst, key.dst_port);
        (flow.service, flow.backend, flow.generation, flow.check) = (1, 1, 1, key.check());
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
    Ok(maps.map::<Established>()?.insert_batch(&flows)?)
}

/// Median nanoseconds of one run of a program on this packet, which must leave as it came.
fn measure(object: &Object, program: &str, packet: &Packet, args: &BenchProgArgs) -> Result<f64> {
    let data = packet.bytes();
    let fd = object.program(program)?;
    let run = |repeat| bpf::prog_test_run(fd, &TestRun { data: &data, repeat, ..TestRun::default() });
    ensure!(run(1)?.data == data, "{program} changed the packet: nothing to measure");
    let mut samples = Vec::with_capacity(args.samples);
    for _ in 0..args.samples.max(1) {
        samples.push(run(args.repeats)?.nanoseconds);
    }
    samples.sort_unstable();
    Ok(f64::from(samples[samples.len() / 2]))
}
