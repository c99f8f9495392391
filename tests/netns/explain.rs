//! `portolan explain`: what it says is what happens, and it changes nothing.

use crate::health::until;
use crate::world::{Transport, World, ask, ask_many, everywhere, pods};
use dataplane_tests::lab::{AgentOptions, Asked, Client, Failure, Lab, Options, PodOptions, Service, at};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 14, 1);
const NODE_PORT: u16 = 32_114;

/// Exit code and answer.
fn explain(node: &dataplane_tests::lab::Node, arguments: &[&str]) -> (i32, Value) {
    let (code, out, err) = node.portolan_verdict(&[&["explain", "-o", "json"], arguments].concat()).unwrap();
    (code, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")))
}

/// The endpoints that were chosen.
fn chosen(answer: &Value) -> BTreeSet<String> {
    let lines = answer["endpoints"].as_array().unwrap().iter();
    let chosen = lines.filter(|line| line["chosen"].as_u64().unwrap() > 0);
    chosen.map(|line| line["endpoint"].as_str().unwrap().to_owned()).collect()
}

/// What is explained of a call is what comes of it.
#[track_caller]
fn compare(world: &World, transport: Transport, (from, client): (IpAddr, &Client), to: SocketAddr) {
    let protocol = match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let words = [from.to_string(), to.to_string()];
    let (code, answer) = explain(world.node(1), &[&words[0], &words[1], "--protocol", protocol]);
    match ask(client, transport, to) {
        Ok(_) => {
            let answers = ask_many(client, transport, to);
            let asked: BTreeSet<_> = pods(&answers).into_iter().map(|pod| world.pod_ip(pod)).collect();
            let explained = chosen(&answer).into_iter().map(|end| end.parse::<SocketAddr>().unwrap().ip());
            assert_eq!((code, explained.collect::<BTreeSet<_>>()), (0, asked), "{answer}");
        }
        Err(Failure::Refused) => {
            assert_eq!((code, answer["reason"].as_str()), (4, Some("no-endpoints")), "{answer}")
        }
        Err(Failure::TimedOut) => {
            assert_eq!((code, answer["reason"].as_str()), (4, Some("no-local-endpoints")), "{answer}");
        }
        Err(other) => panic!("{other}: {answer}"),
    }
}

everywhere! {
    /// H6, P1, P3, P4, P7, P9
    fn what_is_explained_is_what_happens(world) {
        let [_, far] = world.webs();
        world.apply(&world.node_port_service(0).external_local().endpoints([far]));
        world.apply(&world.node_port_service(1).endpoints(world.webs()));
        world.apply(&world.cluster_service(2).endpoints([]));
        let (pod, outside) = (world.in_pod("shell-1"), world.outside());
        for (transport, number) in [(Transport::Tcp, 0), (Transport::Udp, 1), (Transport::Udp, 2)] {
            compare(world, transport, (world.pod_ip("shell-1"), &pod), world.frontend(number));
        }
        for (transport, number) in [(Transport::Udp, 0), (Transport::Tcp, 1)] {
            compare(world, transport, (world.outside_ip(), &outside), world.node_frontend(1, number));
        }
    }
}

fn lab() -> Lab {
    let lab = Options::default().nodes(2).zones(&["a", "b"]).create().unwrap();
    for (pod, node) in [("web-0", 0), ("web-1", 1), ("web-2", 1)] {
        lab.add_pod(pod, node, &PodOptions::default()).unwrap();
    }
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    let endpoint = |pod: &str| lab.pod(pod).unwrap().endpoint();
    let mut unready = endpoint("web-2");
    unready.set_not_ready();
    let all = [endpoint("web-0"), endpoint("web-1"), unready];
    lab.manifests()
        .apply(&Service::new("web", ADDRESS).udp_node_port(80, 8080, NODE_PORT).endpoints(all))
        .unwrap();
    lab.start_agents(&AgentOptions::default()).unwrap();
    lab
}

/// All that programs write.
fn written(lab: &Lab) -> String {
    let node = lab.node(0);
    let views = [["flows", "json"], ["drops", "json"], ["services", "json"], ["backends", "json"]];
    views.map(|[view, output]| node.portolan(&[view, "-o", output]).unwrap()).concat()
}

/// H6, P9, P13, T5, Z4
#[test]
fn an_explanation_says_why_and_changes_nothing() {
    let lab = lab();
    let node = lab.node(0);
    let shell = lab.pod("shell").unwrap().address().to_string();
    let before = written(&lab);

    let (code, answer) = explain(node, &[&shell, "default/web"]);
    assert_eq!((code, &answer["verdict"], &answer["client"]), (0, &"well".into(), &"pod".into()), "{answer}");
    assert_eq!(answer["service"]["kind"], "ClusterIP");
    let own = |pod: &str| at(lab.pod(pod).unwrap().address(), 8080).to_string();
    assert_eq!(chosen(&answer), [own("web-0"), own("web-1")].into());
    let lines = answer["endpoints"].as_array().unwrap();
    let left_out = lines.iter().find(|line| line["endpoint"] == own("web-2")).unwrap();
    assert_eq!((&left_out["left_out"], &left_out["node"]), (&"not ready (T)".into(), &"node-2".into()));
    assert_eq!(answer["translated_source"], Value::Null);

    let (code, answer) = explain(node, &["node", "default/web"]);
    assert_eq!((code, &answer["client"]), (0, &"node".into()), "{answer}");

    let outside = lab.client_address().to_string();
    let node_port = format!("node:{NODE_PORT}");
    let (code, answer) = explain(node, &[&outside, &node_port]);
    assert_eq!(
        (code, &answer["client"], &answer["service"]["kind"]),
        (0, &"outside".into(), &"NodePort".into())
    );
    assert_eq!(chosen(&answer).len(), 2, "{answer}");

    let (code, answer) = explain(node, &[&shell, &format!("{ADDRESS}:81")]);
    assert_eq!((code, &answer["reason"]), (4, &"closed-port".into()), "{answer}");
    let (code, answer) = explain(node, &[&shell, &format!("{outside}:80")]);
    assert_eq!((code, &answer["verdict"]), (3, &"warning".into()), "{answer}");
    assert_eq!(written(&lab), before, "nothing was counted and nothing entered");

    let (_, text, _) = node.portolan_verdict(&["explain", &shell, "default/web"]).unwrap();
    println!("{text}");
    assert!(text.starts_with(&format!("UDP {shell} → {ADDRESS}:80\n")), "{text}");
    assert!(text.contains("2 of 3 take part") && text.contains("✓ would connect to"), "{text}");
    let (code, _, error) = node.portolan_verdict(&["explain", &shell, "default/nobody"]).unwrap();
    assert!(code == 1 && error.contains("`portolan services` lists what there is"), "{error}");
}

/// H6: at an interface with XDP its program answers what it sends on by itself, and tc what it leaves alone; and it is told where a
/// socket has its endpoint before there is a packet.
#[test]
fn the_program_that_decides_is_the_one_that_answers() {
    let lab = Options::default().nodes(2).xdp(true).create().unwrap();
    for (pod, node) in [("near", 0), ("far", 1)] {
        lab.add_pod(pod, node, &PodOptions::default()).unwrap();
    }
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    for (number, pod) in [(0, "near"), (1, "far")] {
        let service = Service::new(pod, Ipv4Addr::new(10, 96, 14, 2 + number));
        let service = service.tcp_node_port(80, 8080, NODE_PORT + u16::from(number));
        lab.manifests().apply(&service.endpoints([lab.pod(pod).unwrap().endpoint()])).unwrap();
    }
    lab.start_agents(&AgentOptions::default().arguments(&["--xdp", "native"])).unwrap();
    let node = lab.node(0);
    let outside = lab.client_address().to_string();
    let told = |from: &str, to: &str| explain(node, &[from, to]).1;
    // XDP needs to know the neighbour; a packet finds it.
    Client::at(lab.client()).tcp(at(node.address(), NODE_PORT + 1)).unwrap();
    let far = told(&outside, &format!("node:{}", NODE_PORT + 1));
    assert_eq!((&far["program"], &far["past_stack"]), (&"xdp_uplink".into(), &true.into()), "{far}");
    assert_eq!((&far["passed_by_xdp"], &far["socket_hook"]), (&false.into(), &Value::Null), "{far}");
    assert_eq!(chosen(&far), [at(lab.pod("far").unwrap().address(), 8080).to_string()].into());
    let near = told(&outside, &format!("node:{NODE_PORT}"));
    assert_eq!((&near["program"], &near["passed_by_xdp"]), (&"tc_uplink_in".into(), &true.into()), "{near}");
    assert_eq!(chosen(&near), [at(lab.pod("near").unwrap().address(), 8080).to_string()].into());
    let shell = lab.pod("shell").unwrap().address().to_string();
    assert_eq!(told(&shell, "default/near")["socket_hook"], Value::Null, "pods call by packet");
    assert_eq!(told("node", "default/near")["socket_hook"], "connect4");
    let (_, text, _) = node.portolan_verdict(&["explain", &outside, &format!("node:{NODE_PORT}")]).unwrap();
    assert!(text.contains("(tc_uplink_in, to which XDP leaves it)"), "{text}");
}

/// C1, C3, H6: a flow that is there is told, and stays; and what only the agent knows is not made up without one.
#[test]
fn a_flow_that_is_there_is_told_and_an_agent_that_is_not_is_too() {
    let lab = lab();
    let node = lab.node(0);
    let shell = lab.pod("shell").unwrap();
    let socket = shell
        .place()
        .enter(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:40123").unwrap();
            socket.connect(at(ADDRESS, 80)).unwrap();
            socket
        })
        .unwrap();
    let answer: Asked = dataplane_tests::lab::ask_datagram(&socket, None, std::time::Duration::from_secs(5));
    let served = lab.pod(&answer.unwrap().pod).unwrap().address();
    let from = format!("{}:40123", shell.address());
    // The agent writes the names of service ports beside its loop.
    until("the name is known", || node.portolan(&["flows", "-o", "json"]).unwrap().contains("default/web"));
    let flows = node.portolan(&["flows", "-o", "json"]).unwrap();
    for _ in 0..2 {
        let (code, answer) = explain(node, &[&from, &format!("{ADDRESS}:80"), "--protocol", "udp"]);
        assert_eq!((code, &answer["known_flow"]), (0, &true.into()), "{answer}");
        assert_eq!(chosen(&answer), [at(served, 8080).to_string()].into());
    }
    let now = node.portolan(&["flows", "-o", "json"]).unwrap();
    let without_idle =
        |text: &str| -> String { text.lines().filter(|line| !line.contains("idle")).collect() };
    assert_eq!(without_idle(&now), without_idle(&flows));

    node.agent().unwrap().kill();
    until("nobody answers", || {
        let (code, answer) = explain(node, &[&from, "default/web"]);
        code == 0 && answer["endpoints_unknown"].as_str().is_some_and(|why| why.contains("no agent answers"))
    });
}
