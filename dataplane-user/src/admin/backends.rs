//! `portolan backends`.

use super::columns::Row;
use super::names::Names;
use super::services::{TrafficRow, protocol_name, protocols};
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::traffic::InFlows;
use dataplane_common::backend::BackendStatus;
use dataplane_common::service::{EndpointSet, Service};
use dataplane_common::tables;
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// An endpoint of a service port.
#[derive(Clone, Debug, Serialize)]
pub struct BackendRow {
    /// Its id in the tables.
    pub id: u32,
    /// The service port: `namespace/name:port`, or `#id` if the name is not known.
    pub service: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Its address.
    pub address: String,
    /// The port it listens on.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
    /// Whether new flows may come to it; otherwise it only keeps those it has.
    pub in_use: bool,
    /// Its share of new flows, against that of the others of its service port.
    pub weight: u16,
    /// How often its id was given out.
    pub generation: u32,
    /// Connections and UDP flows that did not end, by packet and by socket.
    pub open: u32,
    /// Traffic.
    pub traffic: TrafficRow,
}

impl Row for BackendRow {
    const HEADINGS: &'static [&'static str] = &{
        let [flows, packets_in, bytes_in, packets_out, bytes_out] = TrafficRow::HEADINGS;
        [
            "SERVICE",
            "PROTO",
            "ENDPOINT",
            "NODE",
            "STATE",
            "WEIGHT",
            "OPEN",
            flows,
            packets_in,
            bytes_in,
            packets_out,
            bytes_out,
        ]
    };

    fn cells(&self) -> Vec<String> {
        let mut cells = vec![
            self.service.clone(),
            self.protocol.clone(),
            super::flows::host_and_port(&self.address, self.port),
            if self.local { "this" } else { "other" }.to_owned(),
            if self.in_use { "in-use" } else { "draining" }.to_owned(),
            self.weight.to_string(),
            self.open.to_string(),
        ];
        cells.extend(self.traffic.cells());
        cells
    }
}

/// Ids in the sets of all service ports.
fn in_use(maps: &KernelMaps) -> Result<HashSet<u32>, MapError> {
    let slots: HashMap<u32, u32> = maps.map::<tables::Slots>()?.entries()?.into_iter().collect();
    let mut used = HashSet::new();
    maps.map::<tables::Services>()?.visit(|_, values| {
        let sets = |service: &Service| [service.cluster, service.local];
        for set in values.iter().flat_map(sets) {
            let run = |set: EndpointSet| set.base()..set.base().saturating_add(set.count());
            used.extend(run(set).map_while(|slot| slots.get(&slot)));
        }
    })?;
    Ok(used)
}

/// All backends that serve, ordered by service port and endpoint.
pub(super) fn rows(maps: &KernelMaps, names: &Names) -> Result<Vec<BackendRow>, MapError> {
    let protocols = protocols(&maps.map::<tables::Frontends>()?.entries()?);
    let used = in_use(maps)?;
    let (traffic, in_flows) = (maps.map::<tables::BackendTraffic>()?, InFlows::read(maps)?);
    let open = maps.map::<tables::OpenCounts>()?;
    let mut backends = maps.map::<tables::Backends>()?.entries()?;
    backends.retain(|(_, backend)| backend.status().has(BackendStatus::SERVING));
    backends
        .sort_by_key(|(id, backend)| (names.name(backend.service()), *backend.addr(), backend.port(), *id));
    let row = |(id, backend): (u32, dataplane_common::backend::Backend)| {
        let total = traffic.get(&id)?.unwrap_or_default();
        Ok(BackendRow {
            id,
            service: names.name(backend.service()),
            protocol: protocols.get(&backend.service()).map_or_else(|| "-".to_owned(), |p| protocol_name(*p)),
            address: backend.addr().to_string(),
            port: backend.port().number(),
            local: backend.status().has(BackendStatus::LOCAL),
            in_use: used.contains(&id),
            weight: backend.weight(),
            open: open.get(&id)?.unwrap_or_default().count(),
            generation: backend.status().generation(),
            traffic: in_flows.with_backend(id, backend.status().generation(), total).into(),
        })
    };
    backends.into_iter().map(row).collect()
}
