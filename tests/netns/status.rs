//! What an operator asks a node: `portolan status` with an agent, without one, and without anything.

use crate::health::until;
use dataplane_tests::lab::{AgentOptions, Lab, Options, PodOptions, Service};
use serde_json::Value;
use std::net::Ipv4Addr;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 13, 1);

fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    let web = lab.pod("web").unwrap().endpoint();
    lab.manifests()
        .apply(&Service::new("web", ADDRESS).tcp_node_port(80, 8080, 32_113).endpoints([web]))
        .unwrap();
    lab
}

fn status(lab: &Lab, arguments: &[&str]) -> (i32, String) {
    let (code, out, err) = lab.node(0).portolan_verdict(&[&["status"], arguments].concat()).unwrap();
    assert!(err.is_empty(), "{err}");
    (code, out)
}

fn json(lab: &Lab) -> Value {
    serde_json::from_str(&status(lab, &["-o", "json"]).1).unwrap()
}

/// H2, C3
#[test]
fn one_screen_tells_how_a_node_is_and_the_exit_code_says_it_too() {
    let lab = lab();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("holds nothing of Portolan") && text.contains("nothing is served"), "{text}");

    lab.start_agents(&AgentOptions::default()).unwrap();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("✓ node-1: all is well\n"), "{text}");
    for part in
        ["1 service ports, 3 frontends, 1 endpoints", "eth0 (", "connect4", "no trace", "none occurred"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let page = json(&lab);
    assert_eq!(page["verdict"], "well");
    assert_eq!(page["agent"]["node"], "node-1");
    assert_eq!(page["agent"]["trouble"], Value::Null);
    assert_eq!(page["agent"]["source"]["watches"].as_array().unwrap().len(), 4);
    assert_eq!((&page["kernel"]["service_ports"], &page["kernel"]["endpoints"]), (&1.into(), &1.into()));
    let (code, yaml) = status(&lab, &["-o", "yaml"]);
    assert!(code == 0 && yaml.starts_with("verdict: well\n"), "{yaml}");
    let wide = status(&lab, &["-o", "wide"]).1;
    assert!(wide.contains("eth0: tc_uplink_in") && wide.contains("affinity 0 of"), "{wide}");

    lab.node(0).agent().unwrap().kill();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("what is in the kernel is served, and nothing changes any more"), "{text}");
    assert_eq!(status(&lab, &["--allow-warnings"]).0, 0);
    assert_eq!(json(&lab)["kernel"]["service_ports"], 1);
}

/// H2, Z5: what somebody should look at is a finding, and no ill health.
#[test]
fn what_somebody_should_look_at_is_named() {
    let lab = lab();
    lab.start_agents(&AgentOptions::default()).unwrap();
    let again = "add table ip nat; add chain ip nat KUBE-SERVICES; add table ip kube-proxy; \
                 add chain ip kube-proxy services";
    lab.node(0).place().run("nft", &[again]).unwrap();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 3, "{text}");
    let traces = "chain KUBE-SERVICES of iptables, table nat, table kube-proxy of nftables";
    assert!(text.contains(traces), "{text}");
    lab.node(0).place().run("nft", &["delete table ip nat; delete table ip kube-proxy"]).unwrap();
    assert_eq!(status(&lab, &[]).0, 0);

    let odd = "apiVersion: v1\nkind: Service\nmetadata: {namespace: default, name: odd}\nspec: {clusterIP: 10.96.13.2, \
               externalIPs: [127.0.0.9], ports: [{port: 80}]}\n";
    lab.manifests().write("odd.yaml", odd).unwrap();
    until("it is told", || status(&lab, &[]).1.contains("1 × RefusedAddress"));
    assert_eq!(status(&lab, &[]).0, 3);
}

/// A script that each shell takes.
#[test]
fn shells_complete_the_verbs() {
    let lab = Options::default().nodes(1).create().unwrap();
    let portolan = dataplane_tests::lab::portolan().unwrap();
    let portolan = portolan.to_str().unwrap();
    let script = lab.node(0).place().run(portolan, &["completion", "bash"]).unwrap();
    let words = "source <(\"$0\" completion bash) && COMP_WORDS=(portolan sta) COMP_CWORD=1 && \
                 _portolan portolan sta portolan && echo \"${COMPREPLY[@]}\"";
    assert!(script.contains("_portolan"), "{script}");
    assert_eq!(lab.node(0).place().run("bash", &["-c", words, portolan]).unwrap(), "status\n");
}
