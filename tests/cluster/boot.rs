//! A node that boots while the API server is away.

use crate::world::eventually;
use dataplane_tests::controlplane::ControlPlane;
use dataplane_tests::lab::{AgentOptions, Client, Lab, Node, Options, PodOptions, Service, Source, at};
use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

const KEPT: Ipv4Addr = Ipv4Addr::new(10, 96, 7, 1);
const GONE: Ipv4Addr = Ipv4Addr::new(10, 96, 7, 2);

fn log(node: &Node) -> String {
    node.agent().unwrap().process().log()
}

/// Ends the agent and empties the kernel, as a power failure does.
fn cut_power(node: &Node) {
    node.agent().unwrap().kill();
    node.portolan(&["cleanup", "--keep-state"]).unwrap();
}

fn shell(lab: &Lab) -> Client {
    Client::at(lab.pod("shell").unwrap().place())
}

/// Whether the Service is served.
fn serves(lab: &Lab, address: Ipv4Addr) -> bool {
    shell(lab).tcp(at(address, 80)).is_ok()
}

/// Whether nobody answers there for a moment.
fn is_silent(lab: &Lab, address: Ipv4Addr) -> bool {
    shell(lab).timeout(Duration::from_millis(500)).tcp(at(address, 80)).is_err()
}

/// C3, Z5: it serves what it knew, and drops what was deleted meanwhile when the API server says so, not before. A damaged
/// snapshot is named, set aside and not trusted.
#[test]
fn a_node_that_boots_without_the_api_server_serves_what_it_knew() {
    let lab = Options::default().nodes(1).create().unwrap();
    let cluster = ControlPlane::start(&lab).unwrap();
    let node = lab.node(0);
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    let service = |name: &str, address: Ipv4Addr| {
        Service::new(name, address).tcp(80, 8080).endpoints([lab.pod("web").unwrap().endpoint()])
    };
    let gone = service("gone", GONE);
    cluster.apply(&service("kept", KEPT).objects()).unwrap();
    cluster.apply(&gone.objects()).unwrap();
    let options = AgentOptions::default().source(Source::Kubeconfig(cluster.agent_kubeconfig()));
    node.start_agent(&options).unwrap();
    eventually("both are served", || serves(&lab, KEPT) && serves(&lab, GONE));
    let file = node.state_folder().join("snapshot");
    eventually("both are kept on disk", || {
        let text = fs::read_to_string(&file).unwrap_or_default();
        text.contains("\"gone-ipv4") && text.contains("\"kept-ipv4")
    });

    cut_power(node);
    cluster.delete(&gone.objects()).unwrap();
    cluster.stop_api_server();
    assert!(is_silent(&lab, KEPT), "the kernel is empty");
    let begun = Instant::now();
    node.start_agent(&options).unwrap();
    println!("ready {:?} after its start", begun.elapsed());
    assert!(serves(&lab, KEPT) && serves(&lab, GONE), "{}", log(node));
    let said = log(node);
    let line = said.lines().find(|line| line.contains("objects of the snapshot")).expect("a line in the log");
    assert!(line.contains(file.to_str().unwrap()) && line.contains("0 minutes old"), "{line}");
    assert_eq!(node.metric("portolan_snapshot_served "), Some(1.0));
    assert!(fs::read_to_string(&file).unwrap().contains("\"gone-ipv4"), "nothing less is kept meanwhile");

    cluster.start_api_server().unwrap();
    eventually("what was deleted is gone", || is_silent(&lab, GONE));
    eventually("the API server is followed", || node.metric("portolan_snapshot_served ") == Some(0.0));
    assert!(serves(&lab, KEPT));
    eventually("the next snapshot has it no more", || {
        fs::read_to_string(&file).is_ok_and(|text| !text.contains("\"gone"))
    });

    // SIGTERM and a boot, and somebody's disk lost a byte.
    node.agent().unwrap().stop().unwrap();
    node.portolan(&["cleanup", "--keep-state"]).unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    cluster.stop_api_server();
    node.launch_agent(&options).unwrap();
    eventually("the snapshot is refused", || node.metric("portolan_snapshots_refused_total ") == Some(1.0));
    let said = log(node);
    assert!(said.contains("is not used: it is damaged: its checksum is another"), "{said}");
    assert!(!file.exists() && file.with_extension("refused").exists(), "it is set aside");
    assert!(is_silent(&lab, KEPT), "nothing is served that is not certain");
    cluster.start_api_server().unwrap();
    node.wait_for_agent().unwrap();
    assert!(serves(&lab, KEPT));
}
