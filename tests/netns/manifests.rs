//! Manifests with mistakes, read by the real agent: each is named with its file and line, and costs nothing but itself.

use crate::world::eventually;
use dataplane_tests::lab::{AgentOptions, Client, Failure, Lab, Options, PodOptions, Service, at};
use std::net::Ipv4Addr;

const KEPT: Ipv4Addr = Ipv4Addr::new(10, 96, 11, 1);
const EMPTY: Ipv4Addr = Ipv4Addr::new(10, 96, 11, 2);
const PORT: u16 = 80;

/// A node whose agent serves the Service `kept`.
fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    lab.manifests().write("kept.yaml", &kept(&lab, 80)).unwrap();
    lab.start_agents(&AgentOptions::default()).unwrap();
    lab
}

fn kept(lab: &Lab, port: u32) -> String {
    let web = lab.pod("web").unwrap().endpoint();
    let service = Service::new("kept", KEPT).tcp(PORT, 8080).endpoints([web]);
    let text = dataplane_tests::lab::documents(&service.objects());
    text.replacen("port: 80\n", &format!("port: {port}\n"), 1)
}

fn ask(lab: &Lab, address: Ipv4Addr) -> Result<String, Failure> {
    let client = Client::at(lab.pod("shell").unwrap().place());
    client.tcp(at(address, PORT)).map(|answer| answer.pod)
}

/// Waits until a line of the agent's log has all these words.
#[track_caller]
fn says(lab: &Lab, words: &[&str]) {
    let log = || lab.node(0).agent().unwrap().process().log();
    let said = || log().lines().any(|line| words.iter().all(|word| line.contains(word)));
    eventually(&format!("the log says {words:?}"), said);
}

/// Z5
#[test]
fn a_file_that_does_not_parse_is_named_and_its_last_good_version_stays() {
    let lab = lab();
    let good = kept(&lab, 80);
    let cut = good.replacen("spec:", "spec: [", 1);
    let line = cut.lines().position(|line| line.contains("spec: [")).unwrap() + 1;
    lab.manifests().write("kept.yaml", &cut).unwrap();
    says(&lab, &["kept.yaml:", "the last good version of this file stays"]);
    let log = lab.node(0).agent().unwrap().process().log();
    let named = log
        .lines()
        .find_map(|line| line.split_once("kept.yaml:")?.1.split_once(':')?.0.parse::<usize>().ok());
    assert!(named.is_some_and(|named| (line..line + 3).contains(&named)), "line {line}: {log}");
    assert_eq!(ask(&lab, KEPT), Ok("web".into()));
    lab.manifests().write("kept.yaml", &kept(&lab, 70_000)).unwrap();
    says(&lab, &["Service default/kept", "kept.yaml:1:", "is 70000, which is not a port", "stays"]);
    assert_eq!(ask(&lab, KEPT), Ok("web".into()));
}

/// Z5, P1
#[test]
fn objects_that_cannot_be_used_cost_themselves_only() {
    let lab = lab();
    let odd = format!(
        "apiVersion: v1
kind: Service
metadata: {{namespace: default, name: nowhere}}
spec: {{clusterIP: 10.96.0.300, ports: [{{port: 80}}]}}
---
apiVersion: v1
kind: Service
metadata: {{namespace: default, name: empty}}
spec: {{clusterIP: {EMPTY}, ports: [{{port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{namespace: default, name: orphan, labels: {{kubernetes.io/service-name: nobody}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{{addresses: [10.244.1.77]}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{namespace: default, name: kept-2, labels: {{kubernetes.io/service-name: kept}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{{addresses: [localhost]}}]
"
    );
    lab.manifests().write("odd.yaml", &odd).unwrap();
    says(&lab, &["Service default/nowhere", "odd.yaml:1:", "\"10.96.0.300\", which is not an IP address"]);
    says(
        &lab,
        &["EndpointSlice default/kept-2", "odd.yaml:18:", "\"localhost\", which is not an IP address"],
    );
    eventually("a Service without endpoints refuses", || ask(&lab, EMPTY) == Err(Failure::Refused));
    assert_eq!(ask(&lab, KEPT), Ok("web".into()));
    let services = || lab.node(0).portolan(&["services"]).unwrap();
    eventually("they are shown by name", || {
        let shown = services();
        shown.contains("default/empty") && shown.contains("default/kept")
    });
    assert!(!services().contains("nowhere") && !services().contains("nobody"), "{}", services());
}
