//! The two ends of a call by which `portolan check --pods` tries a cluster, in pods of a laboratory.

use crate::health::until;
use dataplane_tests::lab::{AgentOptions, Lab, Options, Place, PodOptions, Process, Service, at, portolan};
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 16, 1);
const EMPTY: Ipv4Addr = Ipv4Addr::new(10, 96, 16, 2);
/// Where nothing listens in a pod of the laboratory.
const PORT: u16 = 8_090;

fn command(place: &Place, arguments: &[&str]) -> Command {
    let mut command = place.command(portolan().unwrap()).unwrap();
    command.arg("probe").args(arguments);
    command
}

fn ask(lab: &Lab, to: SocketAddr, more: &[&str]) -> Value {
    let place = lab.pod("shell").unwrap();
    let to = to.to_string();
    let output = command(place.place(), &[&["ask", &to, "--timeout=1000"], more].concat()).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// P1, P9, P11: a pod that serves tells who it is and whom it sees; one that calls tells what came of it, itself included.
#[test]
fn a_probe_tells_who_answered_and_what_else_came() {
    let lab = Options::default().nodes(2).create().unwrap();
    for (pod, node) in [("served", 0), ("shell", 1)] {
        lab.add_pod(pod, node, &PodOptions::default()).unwrap();
    }
    let mut servers = Vec::new();
    for (pod, node) in [("served", "node-1"), ("shell", "node-2")] {
        let serve = ["serve", "--port=8090", "--node", node, "--pod", pod];
        let server = command(lab.pod(pod).unwrap().place(), &serve);
        servers.push(Process::start(&lab.logs(), &format!("probe-{pod}"), server).unwrap());
    }
    let endpoint = |pod: &str| lab.pod(pod).unwrap().endpoint();
    let service = Service::new("probe", ADDRESS).tcp(80, PORT).udp(80, PORT);
    lab.manifests().apply(&service.clone().endpoints([endpoint("served")])).unwrap();
    lab.manifests().apply(&Service::new("empty", EMPTY).tcp(80, PORT).endpoints([])).unwrap();
    lab.start_agents(&AgentOptions::default()).unwrap();
    let shell = lab.pod("shell").unwrap().address().to_string();
    until("the probe serves", || ask(&lab, at(ADDRESS, 80), &[])["answers"][0]["pod"] == "served");
    for protocol in [[].as_slice(), &["--udp"]] {
        let asked = ask(&lab, at(ADDRESS, 80), &[&["--count=3"], protocol].concat());
        let answers = asked["answers"].as_array().unwrap();
        assert_eq!(
            (answers.len(), &asked["refused"], &asked["timed_out"]),
            (3, &0.into(), &0.into()),
            "{asked}"
        );
        for answer in answers {
            assert_eq!(
                (&answer["node"], &answer["client"]),
                (&"node-1".into(), &shell.as_str().into()),
                "{asked}"
            );
        }
    }
    assert_eq!(ask(&lab, at(EMPTY, 80), &[])["refused"], 1);
    let silent = ask(&lab, at(Ipv4Addr::new(10, 96, 16, 99), 80), &[]);
    assert_eq!(
        (&silent["timed_out"], &silent["answers"]),
        (&1.into(), &Value::Array(Vec::new())),
        "{silent}"
    );
    lab.manifests().apply(&service.endpoints([endpoint("shell")])).unwrap();
    until("it calls itself", || ask(&lab, at(ADDRESS, 80), &[])["answers"][0]["pod"] == "shell");
}
