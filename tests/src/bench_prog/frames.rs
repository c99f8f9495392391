//! XDP on veth with frames that really leave, beside a program that only sends each back.
//!
//! The kernel uses its frames again and does not restore what a program wrote. So the flow's translation writes what is
//! there already, and a run is short enough that no frame's time to live ends.

use super::Effort;
use crate::bench::target::Ratio;
use crate::lab::xdp;
use crate::packet::build::{ip, tcp, tcp_packet};
use crate::packet::family::{Family, V4, V6};
use crate::packet::{Hook, in_namespace, index};
use anyhow::{Context as _, Result};
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::filter::{FilterBit, caller_cell, caller_mark};
use dataplane_common::flow::{Flow, FlowKey};
use dataplane_common::tables::{self, Backends, Callers, Filter, Flows};
use dataplane_common::{Addr, Port};
use dataplane_user::kernel::bpf::{self, TEST_XDP_LIVE_FRAMES, TestRun};
use dataplane_user::kernel::maps::KernelMaps;
use dataplane_user::kernel::object::{Object, Options};
use dataplane_user::kernel::rehearsal::xdp_md;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The client's port, and that of an endpoint on another node.
const PORTS: [u16; 2] = [40_000, 8080];
/// Frames that are under way at once.
const BATCH: u32 = 64;
/// How often a frame is used in one run: its time to live begins at 255.
const USES: u32 = 100;
/// How long each leg sends in each round.
const SECONDS: f64 = 0.3;

/// Frames of one program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LiveFrames {
    /// The program.
    pub what: String,
    /// Frames per second.
    pub per_second: Ratio,
    /// The same over the program that only sends back, round by round.
    pub ratio: Option<Ratio>,
}

/// Measures both programs in turn.
pub(super) fn measure(effort: Effort) -> Result<Vec<LiveFrames>> {
    let (sender, receiver) = mpsc::channel();
    in_namespace(move || {
        let _ = sender.send(in_turn(effort));
    });
    receiver.recv().context("the programs' namespace is gone")?
}

fn in_turn(effort: Effort) -> Result<Vec<LiveFrames>> {
    let mut object = Object::open(&Options::default())?;
    let program = Hook::Xdp.program();
    object.load(program)?;
    let fds = tables::ALL.iter().map(|(name, ..)| Ok((*name, object.map(name)?)));
    let maps = KernelMaps::from_fds(fds.collect::<Result<Vec<_>>>()?)?;
    fill(&maps, &V4, 1)?;
    fill(&maps, &V6, 2)?;
    let bare = xdp::program(xdp::TX)?;
    // Frames end at the peer, as early as they can.
    let _peer = xdp::attach(&xdp::program(xdp::DROP)?, &["up1".to_owned()])?;
    let uplink = index("up0")?;
    let uplink_program = object.program(program)?;
    // The last of each is the leg that it is held against.
    let legs = [
        ("a program that only sends back", bare.as_fd(), &V4, 0),
        ("xdp_uplink, known flow to a node port, endpoint elsewhere", uplink_program, &V4, 0),
        ("IPv6, a program that only sends back", bare.as_fd(), &V6, 2),
        ("IPv6, xdp_uplink, known flow to a node port, endpoint elsewhere", uplink_program, &V6, 2),
    ];
    let mut rates: [Vec<Option<f64>>; 4] = Default::default();
    for _ in 0..effort.samples {
        for ((_, program, family, _), rates) in legs.iter().zip(&mut rates) {
            rates.push(Some(rate(*program, family, uplink)?));
        }
    }
    legs.iter()
        .zip(&rates)
        .map(|((what, .., base), of_leg)| {
            let per_second =
                Ratio::among(of_leg.iter().flatten().copied()).context("nothing was measured")?;
            Ok(LiveFrames { what: (*what).into(), per_second, ratio: Ratio::of(of_leg, &rates[*base]) })
        })
        .collect()
}

/// Frames per second through one program.
fn rate(program: BorrowedFd<'_>, family: &Family, uplink: u32) -> Result<f64> {
    let [client, endpoint] = PORTS;
    let packet = tcp_packet((family.client, client), (family.remote, endpoint), tcp::ACK);
    let data = packet.ttl(255).bytes();
    let context = xdp_md(data.len(), uplink);
    let run = TestRun {
        data: &data,
        context: &context,
        repeat: BATCH * USES,
        flags: TEST_XDP_LIVE_FRAMES,
        batch_size: BATCH,
    };
    let (begun, mut frames) = (Instant::now(), 0_u64);
    while begun.elapsed() < Duration::from_secs_f64(SECONDS) {
        bpf::prog_test_run(program, &run).context("live frames")?;
        frames += u64::from(run.repeat);
    }
    Ok(frames as f64 / begun.elapsed().as_secs_f64())
}

/// A flow whose source is translated, to an endpoint elsewhere, and whose translation writes what is there already.
fn fill(maps: &KernelMaps, family: &Family, backend: u32) -> Result<()> {
    let [client, endpoint] = [family.client, family.remote].map(|text| Addr::from(ip(text)));
    let [client_port, port] = PORTS.map(Port::new);
    let bit = FilterBit::service_address(&endpoint);
    let filter = maps.map::<Filter>()?;
    let word = filter.get(&bit.word())?.unwrap_or_default() | bit.mask();
    filter.insert(&bit.word(), &word, bpf::ANY)?;
    let status = BackendStatus::new(1, BackendStatus::SERVING);
    maps.map::<Backends>()?.insert(&backend, &Backend::new(status, endpoint, port, 1), bpf::ANY)?;
    maps.map::<Callers>()?.insert(&caller_cell(&client, 6), &caller_mark(0), bpf::ANY)?;
    let key = FlowKey::new(client, client_port, endpoint, port, 6);
    let half = |key: &FlowKey, flags| {
        let mut flow = Flow::with_flags(flags | Flow::SOURCE_TRANSLATED | Flow::CONFIRMED);
        (flow.src, flow.src_port, flow.dst, flow.dst_port) = (key.src, key.src_port, key.dst, key.dst_port);
        (flow.backend, flow.generation, flow.check) = (backend, 1, key.check());
        (*key, flow)
    };
    Ok(maps.map::<Flows>()?.insert_batch(&[half(&key, 0), half(&key.reversed(), Flow::REPLY)])?)
}
