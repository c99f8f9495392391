//! Objects as a kube-apiserver sent them in a watch, with all that an agent has no use for, and copies of them under other
//! names and addresses.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::net::Ipv4Addr;

/// A Service and its EndpointSlice, as they were recorded (`benches/recorded/README.md` says how).
const SERVICE: &str = include_str!("../../../benches/recorded/service.json");
const SLICE: &str = include_str!("../../../benches/recorded/endpointslice.json");

/// The recorded objects, to be copied.
#[derive(Clone, Debug)]
pub struct Recorded {
    service: Value,
    slice: Value,
}

impl Recorded {
    /// Reads them.
    ///
    /// # Errors
    /// If a record is no JSON.
    pub fn read() -> Result<Self> {
        let read = |text| serde_json::from_str(text).context("a recorded object");
        Ok(Self { service: read(SERVICE)?, slice: read(SLICE)? })
    }

    /// The Service under another name and at another address and port, as text.
    pub fn service(&self, number: u32, name: &str, address: Ipv4Addr, port: u16) -> String {
        let mut object = self.service.clone();
        rename(&mut object, number, name);
        object["spec"]["clusterIP"] = json!(address);
        object["spec"]["clusterIPs"] = json!([address]);
        object["spec"]["ports"][0]["port"] = json!(port);
        object.to_string()
    }

    /// The EndpointSlice of a Service with other endpoints and another port of theirs, as text.
    pub fn slice(&self, number: u32, service: &str, endpoints: &[Ipv4Addr], port: u16) -> String {
        let mut object = self.slice.clone();
        rename(&mut object, number, &format!("{service}-1"));
        object["metadata"]["labels"]["kubernetes.io/service-name"] = json!(service);
        object["ports"][0]["port"] = json!(port);
        let sample = object["endpoints"][0].clone();
        let endpoints = endpoints.iter().map(|address| {
            let mut endpoint = sample.clone();
            endpoint["addresses"] = json!([address]);
            endpoint
        });
        object["endpoints"] = endpoints.collect();
        object.to_string()
    }
}

fn rename(object: &mut Value, number: u32, name: &str) {
    object["metadata"]["name"] = json!(name);
    object["metadata"]["resourceVersion"] = json!((1_000 + number).to_string());
    object["metadata"]["uid"] = json!(format!("00000000-0000-4000-8000-{number:012}"));
}

/// The ClusterIP of Service number `n`.
pub fn cluster_ip(n: u32) -> Ipv4Addr {
    let [_, b, c, d] = n.to_be_bytes();
    Ipv4Addr::new(10, 97 + b, c, d)
}

/// Endpoint number `n`.
pub fn endpoint(n: u32) -> Ipv4Addr {
    let [_, b, c, d] = n.to_be_bytes();
    Ipv4Addr::new(10, 128 + b, c, d)
}

/// The name of Service number `n`.
pub fn name(n: u32) -> String {
    format!("recorded-{n}")
}
