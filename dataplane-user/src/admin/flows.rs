//! `portolan flows`.

use super::columns::{Row, short_time};
use super::names::Names;
use super::services::protocol_name;
use crate::expire::Clock;
use crate::kernel::maps::{KernelMaps, MapError};
use dataplane_common::backend::Backend;
use dataplane_common::flow::{Flow, FlowKey, Stage};
use dataplane_common::tables::{Backends, Flows};
use dataplane_common::{Addr, Port};
use serde::Serialize;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// A flow, both directions in one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowRow {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The client's address and port.
    pub client: String,
    /// What it called.
    pub frontend: String,
    /// Where its packets go.
    pub endpoint: String,
    /// The source that the endpoint sees, if it is not the client.
    pub translated_source: Option<String>,
    /// The service port: `namespace/name:port`, `#id` if the name is not known, or `-` if the endpoint is gone.
    pub service: String,
    /// `half-open`, `established` or `closing`.
    pub state: &'static str,
    /// Seconds since the last packet in either direction, if the kernel's clock can be read.
    pub idle_seconds: Option<u64>,
    /// Packets from the client, modulo 2^32.
    pub packets_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Packets from the endpoint, modulo 2^32.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Whether both directions are in the table; one alone counts as absent.
    pub whole: bool,
}

impl Row for FlowRow {
    const HEADINGS: &'static [&'static str] = &[
        "PROTO",
        "CLIENT",
        "FRONTEND",
        "ENDPOINT",
        "SOURCE-AS",
        "SERVICE",
        "STATE",
        "IDLE",
        "PACKETS-IN",
        "BYTES-IN",
        "PACKETS-OUT",
        "BYTES-OUT",
    ];

    fn cells(&self) -> Vec<String> {
        let state = if self.whole { self.state.to_owned() } else { format!("{} (half)", self.state) };
        let mut cells = vec![
            self.protocol.clone(),
            self.client.clone(),
            self.frontend.clone(),
            self.endpoint.clone(),
            self.translated_source.clone().unwrap_or_else(|| "-".to_owned()),
            self.service.clone(),
            state,
            self.idle_seconds.map_or_else(|| "-".to_owned(), short_time),
        ];
        let traffic = [self.packets_in, self.bytes_in, self.packets_out, self.bytes_out];
        cells.extend(traffic.map(|number| number.to_string()));
        cells
    }
}

/// `10.0.0.1:80`, or `[fd00::1]:80`.
pub(super) fn host_and_port(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn end(addr: &Addr, port: Port) -> String {
    host_and_port(&addr.to_string(), port.number())
}

/// All flows, ordered by client.
pub(super) fn rows(maps: &KernelMaps, names: &Names, clock: Option<Clock>) -> Result<Vec<FlowRow>, MapError> {
    let entries: HashMap<FlowKey, Flow> = maps.map::<Flows>()?.entries()?.into_iter().collect();
    let (table, mut backends) = (maps.map::<Backends>()?, HashMap::new());
    for flow in entries.values() {
        if let Entry::Vacant(entry) = backends.entry(flow.backend)
            && let Some(backend) = table.get(&flow.backend)?
        {
            entry.insert(backend);
        }
    }
    let mut rows = fold(&entries, |flow| service_name(flow, backends.get(&flow.backend), names), clock);
    rows.sort_by(|a, b| (&a.client, &a.frontend, &a.protocol).cmp(&(&b.client, &b.frontend, &b.protocol)));
    Ok(rows)
}

/// The name of a flow's service port, by what the backend's id is now.
fn service_name(flow: &Flow, backend: Option<&Backend>, names: &Names) -> String {
    match backend {
        Some(backend) if backend.status().generation() == flow.generation => names.name(backend.service()),
        Some(_) | None => "-".to_owned(),
    }
}

/// Rows of the clients' directions, and of replies that are alone.
fn fold(
    entries: &HashMap<FlowKey, Flow>,
    service: impl Fn(&Flow) -> String,
    clock: Option<Clock>,
) -> Vec<FlowRow> {
    let mut rows = Vec::new();
    for (key, flow) in entries {
        let partner = entries.get(&flow.partner(key.proto()));
        if flow.has(Flow::REPLY) {
            if partner.is_none() {
                rows.push(row(&flow.partner(key.proto()), &key.reversed(), flow, None, service(flow), clock));
            }
            continue;
        }
        let forward = FlowKey::new(flow.src, flow.src_port, flow.dst, flow.dst_port, key.proto());
        rows.push(row(key, &forward, flow, partner, service(flow), clock));
    }
    rows
}

/// A row of the client's packets as they arrive and as they leave.
fn row(
    arrives: &FlowKey,
    leaves: &FlowKey,
    flow: &Flow,
    partner: Option<&Flow>,
    service: String,
    clock: Option<Clock>,
) -> FlowRow {
    let idle = |clock: Clock| {
        let seen = [Some(flow), partner].into_iter().flatten().map(|flow| clock.since(flow.last_seen));
        seen.min().unwrap_or_default().as_secs()
    };
    let passed = |reply| {
        let half = [Some(flow), partner].into_iter().flatten().find(|half| half.has(Flow::REPLY) == reply);
        half.map_or((0, 0), Flow::passed)
    };
    let ((packets_in, bytes_in), (packets_out, bytes_out)) = (passed(false), passed(true));
    let translated = (leaves.src, leaves.src_port) != (arrives.src, arrives.src_port);
    FlowRow {
        protocol: protocol_name(arrives.proto()),
        client: end(&arrives.src, arrives.src_port),
        frontend: end(&arrives.dst, arrives.dst_port),
        endpoint: end(&leaves.dst, leaves.dst_port),
        translated_source: translated.then(|| end(&leaves.src, leaves.src_port)),
        service,
        state: match Flow::with_flags(flow.flags() | partner.map_or(0, Flow::flags)).stage() {
            Stage::HalfOpen => "half-open",
            Stage::Established => "established",
            Stage::Closing => "closing",
        },
        idle_seconds: clock.map(idle),
        packets_in,
        bytes_in,
        packets_out,
        bytes_out,
        whole: partner.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane_common::backend::BackendStatus;
    use dataplane_common::flow::Counted;
    use std::time::Duration;

    const CLIENT: (Addr, Port) = (Addr::from_v4([10, 0, 0, 9]), Port::new(40_000));
    const FRONTEND: (Addr, Port) = (Addr::from_v4([192, 168, 0, 1]), Port::new(30_002));
    const SOURCE: (Addr, Port) = (Addr::from_v4([192, 168, 0, 1]), Port::new(61_234));
    const ENDPOINT: (Addr, Port) = (Addr::from_v4([10, 244, 0, 5]), Port::new(8080));

    fn flow(flags: u16, src: (Addr, Port), dst: (Addr, Port), last_seen: u32) -> Flow {
        let mut flow = Flow::with_flags(flags);
        (flow.src, flow.src_port, flow.dst, flow.dst_port) = (src.0, src.1, dst.0, dst.1);
        flow.last_seen = last_seen;
        flow
    }

    fn key(src: (Addr, Port), dst: (Addr, Port)) -> FlowKey {
        FlowKey::new(src.0, src.1, dst.0, dst.1, 6)
    }

    fn backend(generation: u32) -> Backend {
        Backend::new(BackendStatus::new(generation, BackendStatus::SERVING), ENDPOINT.0, ENDPOINT.1, 7)
    }

    #[test]
    fn the_flows_of_an_endpoint_that_is_gone_name_no_service() {
        let (names, mut flow) = (Names::default(), flow(0, SOURCE, ENDPOINT, 0));
        flow.generation = 3;
        assert_eq!(service_name(&flow, Some(&backend(3)), &names), "#7");
        assert_eq!(service_name(&flow, Some(&backend(4)), &names), "-", "the id was given to another");
        assert_eq!(service_name(&flow, None, &names), "-");
    }

    #[test]
    fn both_directions_are_one_row_and_one_alone_is_shown_as_such() {
        let mut forward = (key(CLIENT, FRONTEND), flow(Flow::CONFIRMED, SOURCE, ENDPOINT, 90));
        (forward.1.packets, forward.1.bytes, forward.1.counted) = (2, 80, Counted::packet(60));
        let reply = (key(ENDPOINT, SOURCE), flow(Flow::REPLY | Flow::CONFIRMED, FRONTEND, CLIENT, 95));
        let clock = Some(Clock { now: 100, tick: Duration::from_secs(1) });
        let rows = |entries: &[(FlowKey, Flow)]| {
            fold(
                &entries.iter().copied().collect(),
                |flow| service_name(flow, Some(&backend(0)), &Names::default()),
                clock,
            )
        };
        let whole = FlowRow {
            protocol: "TCP".into(),
            client: "10.0.0.9:40000".into(),
            frontend: "192.168.0.1:30002".into(),
            endpoint: "10.244.0.5:8080".into(),
            translated_source: Some("192.168.0.1:61234".into()),
            service: "#7".into(),
            state: "established",
            idle_seconds: Some(5),
            packets_in: 3,
            bytes_in: 140,
            packets_out: 0,
            bytes_out: 0,
            whole: true,
        };
        assert_eq!(rows(&[forward, reply]), std::slice::from_ref(&whole));
        let half = |idle, packets_in, bytes_in| FlowRow {
            whole: false,
            idle_seconds: Some(idle),
            packets_in,
            bytes_in,
            ..whole.clone()
        };
        assert_eq!((rows(&[forward]), rows(&[reply])), (vec![half(10, 3, 140)], vec![half(5, 0, 0)]));
    }
}
