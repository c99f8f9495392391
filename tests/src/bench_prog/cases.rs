//! Packets that change, or leave something behind: one run at a time, each on a packet of its own, beside the empty program
//! in the same way.

use super::Effort;
use crate::bench::target::Ratio;
use crate::packet::build::{Packet, tcp, tcp_packet};
use crate::packet::family::{Family, V4, V6};
use crate::packet::{Hook, Verdict, World, in_namespace};
use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use std::sync::mpsc;

/// Runs for each sample of the other measurement: a run at a time scatters more than a mean of many.
const RUNS_PER_SAMPLE: usize = 200;

/// What one kind of packet costs in one program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaseCost {
    /// The program.
    pub program: String,
    /// What kind of packet, and of which family if that is not IPv4.
    pub case: String,
    /// Nanoseconds of one run, median.
    pub nanoseconds: f64,
    /// Nanoseconds of one run of the empty program, median.
    pub empty: f64,
}

/// A kind of packet.
struct Case {
    hook: Hook,
    what: &'static str,
    verdict: Verdict,
    /// The packet of run number `n`.
    packet: fn(&Net, u16) -> Packet,
}

/// The addresses of one family: those of the world, and ClusterIPs.
struct Net {
    world: &'static Family,
    /// What its cases are told by.
    prefix: &'static str,
    /// Of a Service whose endpoint is a pod of this node.
    local_ip: &'static str,
    /// Of one whose endpoint is on another node.
    remote_ip: &'static str,
    /// Of one without endpoints.
    empty_ip: &'static str,
}

const NETS: [Net; 2] = [
    Net { world: &V4, prefix: "", local_ip: V4.cluster_ip, remote_ip: "10.96.0.2", empty_ip: "10.96.0.3" },
    Net {
        world: &V6,
        prefix: "IPv6, ",
        local_ip: V6.cluster_ip,
        remote_ip: "fd00:10:96::2",
        empty_ip: "fd00:10:96::3",
    },
];

const LOCAL_PORT: u16 = 30_080;
const REMOTE_PORT: u16 = 30_081;
const EMPTY_PORT: u16 = 30_082;
/// A client's port that is used again and again: its flow is known after the first run.
const SAME: u16 = 9_999;

/// A port for each run: with a new one, a packet begins a flow.
fn port(run: u16) -> u16 {
    10_000 + run % 50_000
}

const CASES: [Case; 13] = [
    Case {
        hook: Hook::PodIn,
        what: "new flow to a ClusterIP, endpoint here",
        verdict: Verdict::Pass,
        packet: |net, n| tcp_packet((net.world.other_pod, port(n)), (net.local_ip, 80), tcp::SYN),
    },
    Case {
        hook: Hook::PodIn,
        what: "known half-open flow, translated",
        verdict: Verdict::Pass,
        packet: |net, _| tcp_packet((net.world.other_pod, SAME), (net.local_ip, 80), tcp::ACK),
    },
    Case {
        hook: Hook::PodIn,
        what: "refused: a Service without endpoints",
        verdict: Verdict::Redirect,
        packet: |net, n| tcp_packet((net.world.other_pod, port(n)), (net.empty_ip, 80), tcp::SYN),
    },
    Case {
        hook: Hook::PodIn,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |net, n| tcp_packet((net.world.other_pod, port(n)), (net.world.elsewhere, 80), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "new flow to a node port, endpoint here",
        verdict: Verdict::Pass,
        packet: |net, n| tcp_packet((net.world.client, port(n)), (net.world.node, LOCAL_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "new flow to a node port, endpoint elsewhere",
        verdict: Verdict::Redirect,
        packet: |net, n| tcp_packet((net.world.client, port(n)), (net.world.node, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "known flow to a node port, endpoint elsewhere",
        verdict: Verdict::Redirect,
        packet: |net, _| tcp_packet((net.world.client, SAME), (net.world.node, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |net, n| tcp_packet((net.world.client, port(n)), (net.world.elsewhere, 80), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkOut,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |net, n| tcp_packet((net.world.node, port(n)), (net.world.elsewhere, 80), tcp::SYN),
    },
    Case {
        hook: Hook::PodOut,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |net, n| tcp_packet((net.world.client, port(n)), (net.world.other_pod, 80), tcp::SYN),
    },
    Case {
        hook: Hook::Xdp,
        what: "new flow to a node port, endpoint elsewhere",
        verdict: Verdict::Tx,
        packet: |net, n| tcp_packet((net.world.client, port(n)), (net.world.node, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::Xdp,
        what: "known flow to a node port, endpoint elsewhere",
        verdict: Verdict::Tx,
        packet: |net, _| tcp_packet((net.world.client, SAME), (net.world.node, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::Xdp,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |net, n| tcp_packet((net.world.client, port(n)), (net.world.elsewhere, 80), tcp::SYN),
    },
];

/// A Service with one endpoint (its address and node), or none.
fn service(
    family: &Family,
    name: &str,
    cluster_ip: &str,
    node_port: u16,
    endpoint: Option<(&str, &str)>,
) -> String {
    let address_type = family.address_type;
    let endpoints = endpoint.map_or_else(
        || "endpoints: []".to_owned(),
        |(address, node)| {
            format!(
                "endpoints:\n- {{addresses: [\"{address}\"], nodeName: {node}, conditions: {{ready: true}}}}"
            )
        },
    );
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  type: NodePort
  clusterIP: \"{cluster_ip}\"
  clusterIPs: [\"{cluster_ip}\"]
  ipFamilies: [{address_type}]
  ports:
  - {{name: tcp, protocol: TCP, port: 80, targetPort: 8080, nodePort: {node_port}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: {address_type}
ports:
- {{name: tcp, protocol: TCP, port: 8080}}
{endpoints}
---
"
    )
}

/// The Services of the cases, in one family.
fn world(net: &Net) -> Result<World> {
    let Net { world: family, local_ip, remote_ip, empty_ip, .. } = net;
    let here = service(family, "here", local_ip, LOCAL_PORT, Some((family.pod, "here")));
    let elsewhere = service(family, "elsewhere", remote_ip, REMOTE_PORT, Some((family.remote, "there")));
    let nowhere = service(family, "nowhere", empty_ip, EMPTY_PORT, None);
    World::with_ports(&(here + &elsewhere + &nowhere), 0, &[], 30_000..=60_000)
}

/// Measures every case, in both families.
pub(super) fn measure(effort: Effort) -> Result<Vec<CaseCost>> {
    let (sender, receiver) = mpsc::channel();
    in_namespace(move || {
        let _ = sender.send(measure_all(effort.samples * RUNS_PER_SAMPLE));
    });
    receiver.recv().context("the programs' namespace is gone")?
}

fn measure_all(runs: usize) -> Result<Vec<CaseCost>> {
    let [v4, v6] = NETS.each_ref().map(world);
    let worlds = [v4?, v6?];
    let mut costs = Vec::new();
    for case in &CASES {
        for (net, world) in NETS.iter().zip(&worlds) {
            costs.push(measure_case(world, net, case, runs)?);
        }
    }
    Ok(costs)
}

/// What a new flow costs while somebody watches, beside what it costs while nobody does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WatchCost {
    /// The program.
    pub program: String,
    /// What kind of packet.
    pub case: String,
    /// Nanoseconds while nobody watches, median.
    pub alone: f64,
    /// Nanoseconds while somebody does, median.
    pub watched: f64,
}

/// Measures new flows in two worlds by turns, in one of which somebody watches.
pub(super) fn measure_watched(effort: Effort) -> Result<Vec<WatchCost>> {
    let (sender, receiver) = mpsc::channel();
    in_namespace(move || {
        let _ = sender.send(measure_all_watched(effort.samples * RUNS_PER_SAMPLE));
    });
    receiver.recv().context("the programs' namespace is gone")?
}

fn measure_all_watched(runs: usize) -> Result<Vec<WatchCost>> {
    let net = &NETS[0];
    let [alone, watched] = [world(net)?, world(net)?];
    let mut costs = Vec::new();
    for case in CASES.iter().filter(|case| case.what.starts_with("new flow")) {
        // Cases have the same ports.
        [&alone, &watched].into_iter().try_for_each(World::forget_flows)?;
        let mut reader = watched.watch(&[case.hook])?;
        let (mut without, mut with) = (Vec::with_capacity(runs), Vec::with_capacity(runs));
        let before = watched.watch_state()?.head;
        for n in 0..runs {
            reader.renew().map_err(|_| anyhow::anyhow!("no mark was asked for"))?;
            let data = (case.packet)(net, n as u16).bytes();
            for (world, samples) in [(&alone, &mut without), (&watched, &mut with)] {
                let (is, nanoseconds) = world.time(case.hook, &data)?;
                ensure!(is == case.verdict, "{:?}, {}: {is:?}", case.hook, case.what);
                samples.push(f64::from(nanoseconds));
            }
        }
        let told = watched.watch_state()?.head - before;
        ensure!(told >= runs as u64, "{told} events of {runs} new flows: the lease ended");
        let median = |samples: Vec<f64>| {
            Ratio::among(samples).map(|ratio| ratio.median).context("nothing was measured")
        };
        costs.push(WatchCost {
            program: case.hook.program().into(),
            case: case.what.into(),
            alone: median(without)?,
            watched: median(with)?,
        });
    }
    Ok(costs)
}

fn measure_case(world: &World, net: &Net, case: &Case, runs: usize) -> Result<CaseCost> {
    let Case { hook, what, verdict, packet } = case;
    let what = format!("{}{what}", net.prefix);
    let (mut samples, mut empty) = (Vec::with_capacity(runs), Vec::with_capacity(runs));
    world.forget_flows()?;
    for n in 0..runs {
        let data = packet(net, n as u16).bytes();
        // Else the limit of answers would silence a packet that is refused so often.
        world.forget_answers()?;
        empty.push(f64::from(world.time_of_nothing(*hook, &data)?));
        let (is, nanoseconds) = world.time(*hook, &data)?;
        ensure!(is == *verdict, "{hook:?}, {what}: {is:?} instead of {verdict:?}");
        samples.push(f64::from(nanoseconds));
    }
    let median =
        |samples: Vec<f64>| Ratio::among(samples).map(|ratio| ratio.median).context("nothing was measured");
    Ok(CaseCost {
        program: hook.program().into(),
        case: what,
        nanoseconds: median(samples)?,
        empty: median(empty)?,
    })
}
