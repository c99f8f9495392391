//! Packets that change, or leave something behind: one run at a time, each on a packet of its own, beside the empty program
//! in the same way.

use super::Effort;
use crate::bench::target::Ratio;
use crate::packet::build::{Packet, tcp, tcp_packet};
use crate::packet::{CLIENT, Hook, NODE, POD, Verdict, World, in_namespace};
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
    /// What kind of packet.
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
    packet: fn(u16) -> Packet,
}

const LOCAL_IP: &str = "10.96.0.1";
const REMOTE_IP: &str = "10.96.0.2";
const EMPTY_IP: &str = "10.96.0.3";
const LOCAL_PORT: u16 = 30_080;
const REMOTE_PORT: u16 = 30_081;
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
        packet: |n| tcp_packet((POD2, port(n)), (LOCAL_IP, 80), tcp::SYN),
    },
    Case {
        hook: Hook::PodIn,
        what: "known half-open flow, translated",
        verdict: Verdict::Pass,
        packet: |_| tcp_packet((POD2, SAME), (LOCAL_IP, 80), tcp::ACK),
    },
    Case {
        hook: Hook::PodIn,
        what: "refused: a Service without endpoints",
        verdict: Verdict::Redirect,
        packet: |n| tcp_packet((POD2, port(n)), (EMPTY_IP, 80), tcp::SYN),
    },
    Case {
        hook: Hook::PodIn,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |n| tcp_packet((POD2, port(n)), ("198.51.100.1", 80), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "new flow to a node port, endpoint here",
        verdict: Verdict::Pass,
        packet: |n| tcp_packet((CLIENT, port(n)), (NODE, LOCAL_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "new flow to a node port, endpoint elsewhere",
        verdict: Verdict::Redirect,
        packet: |n| tcp_packet((CLIENT, port(n)), (NODE, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "known flow to a node port, endpoint elsewhere",
        verdict: Verdict::Redirect,
        packet: |_| tcp_packet((CLIENT, SAME), (NODE, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkIn,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |n| tcp_packet((CLIENT, port(n)), ("198.51.100.1", 80), tcp::SYN),
    },
    Case {
        hook: Hook::UplinkOut,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |n| tcp_packet((NODE, port(n)), ("198.51.100.1", 80), tcp::SYN),
    },
    Case {
        hook: Hook::PodOut,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |n| tcp_packet((CLIENT, port(n)), (POD2, 80), tcp::SYN),
    },
    Case {
        hook: Hook::Xdp,
        what: "new flow to a node port, endpoint elsewhere",
        verdict: Verdict::Tx,
        packet: |n| tcp_packet((CLIENT, port(n)), (NODE, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::Xdp,
        what: "known flow to a node port, endpoint elsewhere",
        verdict: Verdict::Tx,
        packet: |_| tcp_packet((CLIENT, SAME), (NODE, REMOTE_PORT), tcp::SYN),
    },
    Case {
        hook: Hook::Xdp,
        what: "not ours",
        verdict: Verdict::Pass,
        packet: |n| tcp_packet((CLIENT, port(n)), ("198.51.100.1", 80), tcp::SYN),
    },
];

/// Another pod of this node than the endpoint: a client.
const POD2: &str = "10.244.1.8";

/// A Service with one endpoint, or none.
fn service(name: &str, cluster_ip: &str, node_port: u16, endpoint: Option<(&str, &str)>) -> String {
    let endpoints = endpoint.map_or_else(
        || "endpoints: []".to_owned(),
        |(address, node)| {
            format!("endpoints:\n- {{addresses: [{address}], nodeName: {node}, conditions: {{ready: true}}}}")
        },
    );
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  type: NodePort
  clusterIP: {cluster_ip}
  clusterIPs: [{cluster_ip}]
  ports:
  - {{name: tcp, protocol: TCP, port: 80, targetPort: 8080, nodePort: {node_port}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports:
- {{name: tcp, protocol: TCP, port: 8080}}
{endpoints}
---
"
    )
}

/// The Services of the cases.
fn world() -> Result<World> {
    let here = service("here", LOCAL_IP, LOCAL_PORT, Some((POD, "here")));
    let elsewhere = service("elsewhere", REMOTE_IP, REMOTE_PORT, Some(("10.244.2.9", "there")));
    let nowhere = service("nowhere", EMPTY_IP, 30_082, None);
    World::with_ports(&(here + &elsewhere + &nowhere), 0, &[], 30_000..=60_000)
}

/// Measures every case.
pub(super) fn measure(effort: Effort) -> Result<Vec<CaseCost>> {
    let (sender, receiver) = mpsc::channel();
    in_namespace(move || {
        let measured = world().and_then(|world| {
            CASES
                .iter()
                .map(|case| measure_case(&world, case, effort.samples * RUNS_PER_SAMPLE))
                .collect::<Result<_>>()
        });
        let _ = sender.send(measured);
    });
    receiver.recv().context("the programs' namespace is gone")?
}

fn measure_case(world: &World, case: &Case, runs: usize) -> Result<CaseCost> {
    let Case { hook, what, verdict, packet } = case;
    let (mut samples, mut empty) = (Vec::with_capacity(runs), Vec::with_capacity(runs));
    for n in 0..runs {
        let data = packet(n as u16).bytes();
        empty.push(f64::from(world.time_of_nothing(*hook, &data)?));
        let (is, nanoseconds) = world.time(*hook, &data)?;
        ensure!(is == *verdict, "{hook:?}, {what}: {is:?} instead of {verdict:?}");
        samples.push(f64::from(nanoseconds));
    }
    let median =
        |samples: Vec<f64>| Ratio::among(samples).map(|ratio| ratio.median).context("nothing was measured");
    Ok(CaseCost {
        program: hook.program().into(),
        case: (*what).into(),
        nanoseconds: median(samples)?,
        empty: median(empty)?,
    })
}
