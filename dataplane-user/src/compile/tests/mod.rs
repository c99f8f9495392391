//! A file per behaviour; a test names the rule it keeps.

mod addresses_that_are_refused;
mod any_order_gives_the_same_tables;
mod the_nodes_own_tables;
mod which_endpoints_are_chosen;
mod which_frontends_lead_to_a_port;
mod which_services_count;
mod which_sources_may_call;
mod who_has_a_contested_frontend;

use super::tables::{Endpoint, PortTables, ServiceTables};
use super::{Complaint, Context};
use crate::model::samples::ip;
use crate::model::{EndpointSlice, Service};
use dataplane_common::frontend::{FrontendKey, FrontendKind};
use dataplane_common::{Addr, Port};
use std::collections::BTreeSet;

/// The node `here`, in zone `a`, with the address 192.0.2.1.
fn context() -> Context {
    Context {
        node_name: "here".into(),
        zone: Some("a".into()),
        node_addresses: BTreeSet::from([addr("192.0.2.1"), addr("127.0.0.1")]),
        ..Context::default()
    }
}

fn addr(text: &str) -> Addr {
    ip(text).into()
}

/// Compiles without complaint.
fn tables(service: &Service, slices: &[EndpointSlice]) -> ServiceTables {
    let (tables, complaints) = super::service(service, slices, &context());
    assert_eq!(complaints, []);
    tables
}

/// The tables of the only port.
fn only_port(tables: &ServiceTables) -> &PortTables {
    assert_eq!(tables.ports.len(), 1, "{tables}");
    tables.ports.values().next().unwrap()
}

fn set(endpoints: &[&str]) -> BTreeSet<Endpoint> {
    let endpoint = |text: &&str| {
        let socket: std::net::SocketAddr = text.parse().unwrap();
        Endpoint { addr: socket.ip().into(), port: Port::new(socket.port()) }
    };
    endpoints.iter().map(endpoint).collect()
}

fn frontends(port: &PortTables) -> Vec<(String, u16, u8, FrontendKind)> {
    let plain = |(key, kind): (&FrontendKey, &FrontendKind)| {
        (key.addr().to_string(), key.port().number(), key.proto(), *kind)
    };
    port.frontends.iter().map(plain).collect()
}

fn texts(complaints: &[Complaint]) -> Vec<String> {
    complaints.iter().map(Complaint::to_string).collect()
}
