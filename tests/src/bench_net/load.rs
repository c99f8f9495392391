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
    let ports = [("http", "TCP", 80, 8080)];
    let mut service = service(&name, &ports);
    (service["apiVersion"], service["kind"]) = ("v1".into(), "Service".into());
    service["metadata"]["namespace"] = "default".into();
    service["status"] = json!({ "loadBalancer": {} });
    let defaults = json!({
        "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
        "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
    });
    for (field, value) in defaults.as_object().into_iter().flatten() {
        service["spec"][field] = value.clone();
    }
    let note = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
        "metadata": { "name": address, "labels": {
            "ipaddress.kubernetes.io/ip-family": "IPv4", "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
        } },
        "spec": { "parentRef": { "group": "", "resource": "services", "namespace": "default", "name": name } },
    });
    let [.., a, b] = (number as u32).to_be_bytes();
    let count = if number < MORE_ENDPOINTS_FROM { 2 } else { 5 };
    let endpoints: Vec<_> =
        (128..128 + count).map(|range| (Ipv4Addr::new(10, range, a, b), "elsewhere")).collect();
    let mut slice = slice(&name, &ports, &endpoints);
    (slice["apiVersion"], slice["kind"]) = ("discovery.k8s.io/v1".into(), "EndpointSlice".into());
    slice["metadata"]["namespace"] = "default".into();
    let stored = |kind: u8, key: String, mut object: Value| {
        object["metadata"]["uid"] = format!("00000000-0000-4000-80{kind:02x}-{number:012x}").into();
        object["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
        Stored { key, object }
    };
    Ok([
        stored(0, format!("services/specs/default/{name}"), service),
        stored(1, format!("ipaddresses/{address}"), note),
        stored(2, format!("endpointslices/default/{name}-1"), slice),
    ])
}

/// A port of a Service: its name, protocol and number, and the endpoints' port.
type ServicePort<'a> = (&'a str, &'a str, u16, u16);

/// What is asked for of a Service.
fn service(name: &str, ports: &[ServicePort<'_>]) -> Value {
    let ports = ports.iter().map(|(name, protocol, port, target)| {
        json!({ "name": name, "protocol": protocol, "port": port, "targetPort": target })
    });
    let ports: Vec<_> = ports.collect();
    json!({ "metadata": { "name": name }, "spec": { "type": "ClusterIP", "ports": ports } })
}

/// The slice of a Service with these endpoints (address, node).
fn slice(service: &str, ports: &[ServicePort<'_>], endpoints: &[(Ipv4Addr, &str)]) -> Value {
    let ready = json!({ "ready": true, "serving": true, "terminating": false });
    let ports = ports
        .iter()
        .map(|(name, protocol, _, target)| json!({ "name": name, "protocol": protocol, "port": target }));
    let endpoints = endpoints
        .iter()
        .map(|(address, node)| json!({ "addresses": [address], "nodeName": node, "conditions": ready }));
    json!({
        "metadata": { "name": format!("{service}-1"), "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4",
        "ports": ports.collect::<Vec<_>>(),
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

/// Makes a Service with these ports and endpoints (address, node); returns its ClusterIP.
pub(super) async fn create(
    client: &Client,
    name: &str,
    ports: &[ServicePort<'_>],
    node_port: Option<u16>,
    endpoints: &[(Ipv4Addr, &str)],
) -> Result<Ipv4Addr> {
    let mut service = service(name, ports);
    if let Some(node_port) = node_port {
        service["spec"]["type"] = json!("NodePort");
        service["spec"]["ports"][0]["nodePort"] = json!(node_port);
    }
    let service: Service = serde_json::from_value(service)?;
    let slice: EndpointSlice = serde_json::from_value(slice(name, ports, endpoints))?;
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
