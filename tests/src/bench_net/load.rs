//! Services in great number, and waiting until every leg serves the last of them.

use super::record::Loaded;
use super::station::Station;
use crate::controlplane::{ControlPlane, Stored};
use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// A leg that does not serve a size after this time is left out from then on.
pub(super) const LOAD_TIME: Duration = Duration::from_secs(300);
/// ClusterIPs of Services that nobody calls, from here on or, where one is taken, from there on.
const FILLERS: Ipv4Addr = Ipv4Addr::new(10, 96, 4, 0);
const OTHER_FILLERS: Ipv4Addr = Ipv4Addr::new(10, 96, 128, 0);

/// From this number on, Services have five endpoints instead of two: 30,000 then have four on the average.
const MORE_ENDPOINTS_FROM: usize = 10_000;

/// Makes Services that nobody calls, with some endpoints each.
pub(super) async fn fill(plane: &ControlPlane, numbers: std::ops::Range<usize>) -> Result<()> {
    let services =
        Api::<Service>::default_namespaced(plane.client().clone()).list(&ListParams::default()).await?;
    let taken: HashSet<_> = services.into_iter().filter_map(|made| made.spec?.cluster_ip).collect();
    let mut objects = Vec::with_capacity(3 * numbers.len());
    for number in numbers {
        objects.extend(filler(number, &taken)?);
    }
    plane.store(&objects).await
}

/// A Service, the API server's note that its address is taken, and its slice.
fn filler(number: usize, taken: &HashSet<String>) -> Result<[Stored; 3]> {
    let name = format!("filler-{number}");
    // The API server draws addresses for its own Services from the whole range.
    let address = [FILLERS, OTHER_FILLERS]
        .map(|first| Ipv4Addr::from_bits(first.to_bits() + number as u32).to_string())
        .into_iter()
        .find(|address| !taken.contains(address))
        .context("both addresses of a Service are taken")?;
    let metadata = |kind: u8, name: &str| {
        json!({
            "name": name,
            "uid": format!("00000000-0000-4000-80{kind:02x}-{number:012x}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        })
    };
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(0, &name), "status": { "loadBalancer": {} },
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "ports": [{ "name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080 }],
        },
    });
    service["metadata"]["namespace"] = json!("default");
    let mut note = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress", "metadata": metadata(1, &address),
        "spec": { "parentRef": { "group": "", "resource": "services", "namespace": "default", "name": name } },
    });
    note["metadata"]["labels"] = json!({
        "ipaddress.kubernetes.io/ip-family": "IPv4", "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
    });
    let [.., a, b] = (number as u32).to_be_bytes();
    let count = if number < MORE_ENDPOINTS_FROM { 2 } else { 5 };
    let ready = json!({ "ready": true, "serving": true, "terminating": false });
    let endpoints: Vec<_> = (128..128 + count)
        .map(|range| Ipv4Addr::new(10, range, a, b))
        .map(|address| json!({ "addresses": [address], "nodeName": "elsewhere", "conditions": ready }))
        .collect();
    let mut slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata(2, &format!("{name}-1")),
        "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{ "name": "http", "protocol": "TCP", "port": 8080 }],
    });
    slice["metadata"]["namespace"] = json!("default");
    slice["metadata"]["labels"] = json!({ "kubernetes.io/service-name": name });
    Ok([
        Stored { key: format!("services/specs/default/{name}"), object: service },
        Stored { key: format!("ipaddresses/{address}"), object: note },
        Stored { key: format!("endpointslices/default/{name}-1"), object: slice },
    ])
}

/// Makes a Service with these ports (name, protocol, port, target) and endpoints (address, node); returns its ClusterIP.
pub(super) async fn create(
    client: &Client,
    name: &str,
    ports: &[(&str, &str, u16, u16)],
    node_port: Option<u16>,
    endpoints: &[(Ipv4Addr, &str)],
) -> Result<Ipv4Addr> {
    let service_ports: Vec<Value> = ports
        .iter()
        .map(|(name, protocol, port, target)| {
            json!({ "name": name, "protocol": protocol, "port": port, "targetPort": target })
        })
        .collect();
    let mut spec = json!({ "type": "ClusterIP", "ports": service_ports });
    if let Some(node_port) = node_port {
        spec["type"] = json!("NodePort");
        spec["ports"][0]["nodePort"] = json!(node_port);
    }
    let service: Service = serde_json::from_value(json!({ "metadata": { "name": name }, "spec": spec }))?;
    let slice_ports: Vec<Value> = ports
        .iter()
        .map(|(name, protocol, _, target)| json!({ "name": name, "protocol": protocol, "port": target }))
        .collect();
    let ready = json!({ "ready": true, "serving": true, "terminating": false });
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": { "name": format!("{name}-1"), "labels": { "kubernetes.io/service-name": name } },
        "addressType": "IPv4",
        "ports": slice_ports,
        "endpoints": endpoints
            .iter()
            .map(|(address, node)| json!({ "addresses": [address], "nodeName": node, "conditions": ready }))
            .collect::<Vec<_>>(),
    }))?;
    let parameters = PostParams::default();
    let made = Api::<Service>::default_namespaced(client.clone()).create(&parameters, &service).await;
    let made = made.with_context(|| format!("Service {name}"))?;
    let slices = Api::<EndpointSlice>::default_namespaced(client.clone());
    slices.create(&parameters, &slice).await.with_context(|| format!("EndpointSlice of {name}"))?;
    let address = made.spec.and_then(|spec| spec.cluster_ip).context("a Service without ClusterIP")?;
    address.parse().with_context(|| address.clone())
}

/// For how long the machine may have work of its own after a size is loaded: the control plane's, mostly.
const SETTLE_TIME: Duration = Duration::from_secs(60);
/// The part of its time that a quiet machine works, at most.
const QUIET: f64 = 0.1;

/// Waits until the machine is quiet, for what it does of its own weighs on all legs; how much it did last.
pub(super) fn settle() -> Result<f64> {
    let end = Instant::now() + SETTLE_TIME;
    let mut before = cpu_ticks()?;
    loop {
        std::thread::sleep(Duration::from_secs(2));
        let now = cpu_ticks()?;
        let busy = 1.0 - (now.idle - before.idle) / (now.all - before.all).max(1.0);
        if busy < QUIET || Instant::now() > end {
            return Ok(busy);
        }
        before = now;
    }
}

struct Ticks {
    idle: f64,
    all: f64,
}

/// What the CPUs have done since they started: the first line of `/proc/stat`, whose fourth and fifth numbers are idle.
fn cpu_ticks() -> Result<Ticks> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let ticks: Vec<f64> = text
        .lines()
        .next()
        .into_iter()
        .flat_map(|line| line.split_whitespace().skip(1))
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context("/proc/stat")?;
    Ok(Ticks { idle: ticks.iter().skip(3).take(2).sum(), all: ticks.iter().sum() })
}

/// Makes one more Service for each leg, and waits until it answers: then all before it are served too.
pub(super) fn wait_for_all(
    plane: &ControlPlane,
    stations: &mut [Station],
    size: usize,
) -> Result<Vec<Loaded>> {
    let begun = Instant::now();
    let mut waiting = Vec::new();
    for station in stations.iter() {
        if station.has_proxy() {
            waiting.push((station.leg(), station.last_service(plane, size)?));
        }
    }
    let mut loads = Vec::new();
    while !waiting.is_empty() {
        waiting.retain(|(leg, address)| {
            let Some(station) = stations.iter_mut().find(|station| station.leg() == *leg) else {
                return false;
            };
            let seconds = begun.elapsed().as_secs_f64();
            let reached = station.reaches(*address);
            let failure = match (reached, station.failed_proxy()) {
                (true, _) => None,
                (false, Some(failure)) => Some(failure),
                (false, None) if begun.elapsed() > LOAD_TIME => {
                    Some(format!("did not serve {size} Services after {seconds:.0} s"))
                }
                (false, None) => return true,
            };
            let text = failure.clone().unwrap_or_else(|| "serves".into());
            println!("  {:<20} {size} Services after {seconds:.1} s: {text}", leg.name());
            if let Some(failure) = &failure {
                station.give_up(failure);
            }
            loads.push(Loaded { leg: *leg, services: size, seconds, failure });
            false
        });
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(loads)
}
