//! What an agent tells a real API server, and what it says when it loses its rights there.

use crate::shared::{Cluster, PORT};
use crate::world::eventually;
use dataplane_tests::controlplane::ControlPlane;
use dataplane_tests::lab::{AgentOptions, Client, Options, PodOptions, Service, Source, at};
use serde_json::{Value, json};
use std::net::Ipv4Addr;

const CHECK: u16 = 32_500;

/// The notes of the Events about a Service with this reason.
fn events(plane: &ControlPlane, service: &str, reason: &str) -> Vec<String> {
    let all: Value =
        serde_json::from_str(&plane.kubectl(&["get", "events", "-o", "json"], "").unwrap()).unwrap();
    let events = all["items"].as_array().unwrap().iter().filter(|event| {
        event["reason"] == reason
            && event["involvedObject"]["kind"] == "Service"
            && event["involvedObject"]["name"] == service
    });
    events.map(|event| event["message"].as_str().unwrap_or_default().to_owned()).collect()
}

/// S4, Z1, Z5: what a Service gets wrong, or cannot have, is told by Events on it; the rest of it is served.
#[test]
fn events_on_a_service_say_what_of_it_is_not_served() {
    let cluster = Cluster::shared();
    cluster.lab.node(0).serve("thief", &PodOptions::client().tcp(&[CHECK])).unwrap();
    cluster.web("told", 1, 30_110);
    let patch = json!({ "spec": {
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": CHECK,
        "externalIPs": ["10.244.1.250"],
    } });
    cluster
        .plane
        .kubectl(&["patch", "service", "told", "--type=merge", "-p", &patch.to_string()], "")
        .unwrap();
    eventually("an Event tells of the health check port", || {
        let notes = events(&cluster.plane, "told", "FailedToStartServiceHealthcheck");
        notes.iter().any(|note| note.contains(&format!("health check port {CHECK} cannot be had")))
    });
    eventually("an Event tells of the external IP", || {
        let notes = events(&cluster.plane, "told", "RefusedAddress");
        notes.iter().any(|note| note.contains("10.244.1.250"))
    });
    let cluster_ip = at(cluster.cluster_ip("told"), PORT);
    eventually("all else is served", || cluster.shell().tcp(cluster_ip).is_ok());
}

/// C3: rights are taken away while it runs, and it begins anew without them.
#[test]
fn an_agent_without_rights_serves_on_and_names_them() {
    let lab = Options::default().nodes(1).create().unwrap();
    let plane = ControlPlane::start(&lab).unwrap();
    let node = lab.node(0);
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    let kept = Ipv4Addr::new(10, 96, 7, 11);
    let web = lab.pod("web").unwrap().endpoint();
    plane.apply(&Service::new("kept", kept).tcp(PORT, 8080).endpoints([web.clone()]).objects()).unwrap();
    let options = AgentOptions::default().source(Source::Kubeconfig(plane.agent_kubeconfig()));
    node.start_agent(&options).unwrap();
    let serves = |address| Client::at(lab.pod("shell").unwrap().place()).tcp(at(address, PORT)).is_ok();
    eventually("it serves", || serves(kept));

    plane.kubectl(&["delete", "clusterrolebinding", "system:node-proxier"], "").unwrap();
    node.agent().unwrap().stop().unwrap();
    node.launch_agent(&options).unwrap();
    let log = || node.agent().unwrap().process().log();
    eventually("the missing verbs are named", || {
        log().contains("list services: forbidden (403): the role needs the verbs list and watch")
            || log().contains("list endpointslices.discovery.k8s.io: forbidden (403): the role needs the verbs list and watch")
    });
    assert!(serves(kept), "what was there is served on");
    let came = Ipv4Addr::new(10, 96, 7, 12);
    plane.apply(&Service::new("came", came).tcp(PORT, 8080).endpoints([web]).objects()).unwrap();
    let binding = [
        "create",
        "clusterrolebinding",
        "again",
        "--clusterrole=system:node-proxier",
        "--user=system:kube-proxy",
    ];
    plane.kubectl(&binding, "").unwrap();
    eventually("what came meanwhile is served", || serves(came));
    assert!(serves(kept));
}
