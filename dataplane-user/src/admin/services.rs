//! `portolan services`.

use super::columns::Row;
use super::names::Names;
use crate::compile::selection::DEFAULT_TRIES;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::traffic::InFlows;
use dataplane_common::Protocol;
use dataplane_common::counter::Traffic;
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::kept::Tries;
use dataplane_common::service::{Algorithm, EndpointSet, Policy, Service};
use dataplane_common::tables;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};

/// An address of a service port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct AddressRow {
    /// `ClusterIP`, `LoadBalancer`, `ExternalIP` or `NodePort`.
    pub kind: &'static str,
    /// The address; empty for a node port.
    pub address: String,
    /// The port.
    pub port: u16,
}

/// Traffic since the id was given out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TrafficRow {
    /// Packets from clients.
    pub packets_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Packets from endpoints.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Flows begun.
    pub new_flows: u64,
}

impl From<Traffic> for TrafficRow {
    fn from(traffic: Traffic) -> Self {
        let Traffic { packets_in, bytes_in, packets_out, bytes_out, new_flows } = traffic;
        Self { packets_in, bytes_in, packets_out, bytes_out, new_flows }
    }
}

impl TrafficRow {
    pub(super) const HEADINGS: [&'static str; 5] =
        ["FLOWS", "PACKETS-IN", "BYTES-IN", "PACKETS-OUT", "BYTES-OUT"];

    pub(super) fn cells(&self) -> [String; 5] {
        [self.new_flows, self.packets_in, self.bytes_in, self.packets_out, self.bytes_out]
            .map(|n| n.to_string())
    }
}

/// Second tries since the id was given out (L5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TriesRow {
    /// Connections that got another endpoint because theirs was silent.
    pub silent: u64,
    /// Because it refused them.
    pub refused: u64,
    /// Because there was no way to it.
    pub unreachable: u64,
    /// Flows of UDP that did for either of the last two reasons.
    pub udp: u64,
    /// Those of all these that were answered then.
    pub rescued: u64,
}

impl From<Tries> for TriesRow {
    fn from(tries: Tries) -> Self {
        let Tries { silent, refused, unreachable, udp, rescued, .. } = tries;
        Self { silent, refused, unreachable, udp, rescued }
    }
}

/// A service port.
#[derive(Clone, Debug, Serialize)]
pub struct ServiceRow {
    /// Its id in the tables.
    pub id: u32,
    /// `namespace/name:port`, or `#id` if the name is not known.
    pub name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Its addresses.
    pub addresses: Vec<AddressRow>,
    /// How many endpoints the cluster set has.
    pub cluster_endpoints: usize,
    /// How many endpoints the local set has.
    pub local_endpoints: usize,
    /// Whether any endpoint exists (*has any*).
    pub has_endpoints: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Timeout of `sessionAffinity: ClientIP` in seconds; 0 without.
    pub affinity_seconds: u32,
    /// How an endpoint is chosen: `random`, `round-robin`, `least-connections`, `maglev`, `source-hash`.
    pub algorithm: &'static str,
    /// How often a connection by packet whose endpoint is silent or refuses it is given to another.
    pub retry: u32,
    /// How often that was.
    pub tries: TriesRow,
    /// Traffic.
    pub traffic: TrafficRow,
}

impl Row for ServiceRow {
    const HEADINGS: &'static [&'static str] = &{
        let [flows, packets_in, bytes_in, packets_out, bytes_out] = TrafficRow::HEADINGS;
        [
            "NAME",
            "PROTO",
            "ADDRESSES",
            "CLUSTER",
            "LOCAL",
            "ALGORITHM",
            "POLICY",
            flows,
            packets_in,
            bytes_in,
            packets_out,
            bytes_out,
        ]
    };

    fn cells(&self) -> Vec<String> {
        let address = |row: &AddressRow| match row.address.is_empty() {
            true => format!("{} {}", row.kind, row.port),
            false if row.address.contains(':') => format!("{} [{}]:{}", row.kind, row.address, row.port),
            false => format!("{} {}:{}", row.kind, row.address, row.port),
        };
        let addresses: Vec<_> = self.addresses.iter().map(address).collect();
        let policies = [
            (self.internal_local, "internal-local".to_owned()),
            (self.external_local, "external-local".to_owned()),
            (self.affinity_seconds > 0, format!("affinity={}s", self.affinity_seconds)),
            (self.retry != DEFAULT_TRIES, format!("retry={}", self.retry)),
            (!self.has_endpoints, "no-endpoints".to_owned()),
        ];
        let policy: Vec<_> = policies.into_iter().filter(|(has, _)| *has).map(|(_, word)| word).collect();
        let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        let mut cells = vec![
            self.name.clone(),
            self.protocol.clone(),
            or_dash(addresses.join(", ")),
            self.cluster_endpoints.to_string(),
            self.local_endpoints.to_string(),
            self.algorithm.to_owned(),
            or_dash(policy.join(",")),
        ];
        cells.extend(self.traffic.cells());
        cells
    }
}

/// Name of a kind of address, as Kubernetes has it.
pub(super) fn kind_name(kind: FrontendKind) -> Option<&'static str> {
    match kind {
        FrontendKind::ClusterIp => Some("ClusterIP"),
        FrontendKind::LoadBalancerIp => Some("LoadBalancer"),
        FrontendKind::ExternalIp => Some("ExternalIP"),
        FrontendKind::NodePort => Some("NodePort"),
        FrontendKind::ClosedPort => None,
    }
}

/// How one of its endpoints is chosen, in the word of annotations: that of the set that it has.
pub(super) fn algorithm_name(service: &Service) -> &'static str {
    let set = if service.cluster.count() == 0 { service.local } else { service.cluster };
    set.algorithm().map_or("unknown", Algorithm::name)
}

/// A protocol's name, or its number.
pub(super) fn protocol_name(number: u8) -> String {
    Protocol::try_from(number).map_or_else(|number| number.to_string(), |protocol| protocol.to_string())
}

/// Protocols of service ports, as their frontends tell them.
pub(super) fn protocols(frontends: &[(FrontendKey, Frontend)]) -> HashMap<u32, u8> {
    let of_services = frontends.iter().filter(|(_, value)| value.service() != 0);
    of_services.map(|(key, value)| (value.service(), key.proto())).collect()
}

/// All service ports that an address leads to, ordered by name.
pub(super) fn rows(maps: &KernelMaps, names: &Names) -> Result<Vec<ServiceRow>, MapError> {
    let frontends = maps.map::<tables::Frontends>()?.entries()?;
    let protocols = protocols(&frontends);
    let mut addresses: BTreeMap<u32, Vec<AddressRow>> = BTreeMap::new();
    for (key, value) in &frontends {
        if let Some(kind) = value.kind().ok().and_then(kind_name) {
            let address = if key.addr().is_unspecified() { String::new() } else { key.addr().to_string() };
            addresses.entry(value.service()).or_default().push(AddressRow {
                kind,
                address,
                port: key.port().number(),
            });
        }
    }
    let (services, traffic) = (maps.map::<tables::Services>()?, maps.map::<tables::ServiceTraffic>()?);
    let tries = maps.map::<tables::ServiceTries>()?;
    let in_flows = InFlows::read(maps)?;
    let slots: HashMap<u32, u32> = maps.map::<tables::Slots>()?.entries()?.into_iter().collect();
    // An endpoint of more weight has more slots.
    let endpoints = |set: EndpointSet| {
        let ids = (set.base()..set.base().saturating_add(set.count())).map_while(|slot| slots.get(&slot));
        ids.collect::<HashSet<_>>().len()
    };
    let row = |(id, mut addresses): (u32, Vec<AddressRow>)| {
        addresses.sort();
        let service: Service = services.get(&id)?.unwrap_or_default();
        Ok(ServiceRow {
            id,
            name: names.name(id),
            protocol: protocol_name(protocols.get(&id).copied().unwrap_or_default()),
            addresses,
            cluster_endpoints: endpoints(service.cluster),
            local_endpoints: endpoints(service.local),
            has_endpoints: service.policy.has(Policy::HAS_ENDPOINTS),
            internal_local: service.policy.has(Policy::INTERNAL_LOCAL),
            external_local: service.policy.has(Policy::EXTERNAL_LOCAL),
            affinity_seconds: service.policy.affinity_seconds(),
            algorithm: algorithm_name(&service),
            retry: service.policy.tries(),
            tries: tries.get(&id)?.unwrap_or_default().into(),
            traffic: in_flows.with_service(id, traffic.get(&id)?.unwrap_or_default()).into(),
        })
    };
    let mut rows = addresses.into_iter().map(row).collect::<Result<Vec<_>, MapError>>()?;
    rows.sort_by(|a, b| (&a.name, &a.protocol, a.id).cmp(&(&b.name, &b.protocol, b.id)));
    Ok(rows)
}
