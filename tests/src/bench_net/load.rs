//! Services in great number, and waiting until every leg serves the last of them.

use super::record::Loaded;
use super::station::Station;
use crate::controlplane::ControlPlane;
use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// A leg that does not serve a size after this time is left out from then on.
pub(super) const LOAD_TIME: Duration = Duration::from_secs(300);
/// Requests to the API server at once.
const AT_ONCE: usize = 32;

/// From this number on, Services have five endpoints instead of two: 30,000 then have four on the average.
const MORE_ENDPOINTS_FROM: usize = 10_000;

/// Makes Services that nobody calls, with some endpoints each.
pub(super) async fn fill(client: &Client, numbers: std::ops::Range<usize>) -> Result<()> {
    futures::stream::iter(numbers)
        .map(|number| async move {
            let [_, _, a, b] = (number as u32).to_be_bytes();
            let count = if number < MORE_ENDPOINTS_FROM { 2 } else { 5 };
            let endpoints: Vec<_> =
                (128..128 + count).map(|range| (Ipv4Addr::new(10, range, a, b), "elsewhere")).collect();
            let ports = [("http", "TCP", 80, 8080)];
            create(client, &format!("filler-{number}"), &ports, None, &endpoints).await.map(drop)
        })
        .buffer_unordered(AT_ONCE)
        .try_collect::<()>()
        .await
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
