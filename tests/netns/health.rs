//! What a node tells others about itself: health check ports (S4), its own health (H1, H2) and its metrics (H3).

use dataplane_common::tables::{Flows, Table as _};
use dataplane_tests::lab::{AgentOptions, Client, Family, Lab, METRICS, Options, PodOptions, Service, at};
use serde_json::Value;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

/// How long a change may take until it is told.
const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const HEALTH: u16 = 10_256;
const CHECK: u16 = 32_100;

/// A status and what came with it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(self.text.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    fn has_header(&self, line: &str) -> bool {
        self.text.lines().any(|other| other.eq_ignore_ascii_case(line))
    }
}

/// GET over a connection from somewhere in the lab; `None` if nobody listens.
pub(crate) fn get(place: &dataplane_tests::lab::Place, address: SocketAddr, path: &str) -> Option<Answer> {
    let ask = || {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let status = text.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { status, text })
    };
    place.enter(ask).unwrap()
}

#[track_caller]
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "after {PATIENCE:?} it is not so that {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn balanced(lab: &Lab) -> Service {
    let endpoints = ["web-1", "web-2"].map(|name| lab.pod(name).unwrap().endpoint());
    Service::new("balanced", Ipv4Addr::new(10, 96, 0, 77))
        .tcp_node_port(80, 8080, 32_101)
        .spec("type", "LoadBalancer".into())
        .spec("healthCheckNodePort", CHECK.into())
        .external_local()
        .endpoints(endpoints)
}

fn lab(arguments: &[&str]) -> Lab {
    let lab = Options::default().nodes(2).create().unwrap();
    lab.add_pod("web-1", 0, &PodOptions::default()).unwrap();
    lab.add_pod("web-2", 0, &PodOptions::default()).unwrap();
    lab.start_agents(&AgentOptions::default().arguments(arguments)).unwrap();
    lab
}

/// S4
#[test]
fn a_load_balancer_learns_which_nodes_have_endpoints() {
    let lab = lab(&[]);
    let mut service = balanced(&lab);
    lab.manifests().apply(&service).unwrap();
    let outside = lab.client();
    let check = |node: usize| get(outside, at(lab.node(node).address(), CHECK), "/any");
    until("both nodes answer", || check(0).is_some() && check(1).is_some());
    let answer = check(0).unwrap();
    assert_eq!((answer.status, answer.json()["localEndpoints"].as_u64()), (200, Some(2)), "{answer:?}");
    for line in [
        "Content-Type: application/json",
        "X-Content-Type-Options: nosniff",
        "X-Load-Balancing-Endpoint-Weight: 2",
    ] {
        assert!(answer.has_header(line), "{line} in {answer:?}");
    }
    assert_eq!(check(1).unwrap().status, 503, "no endpoint is there");
    // Draining endpoints serve, but new clients are to go elsewhere.
    for pod in ["web-1", "web-2"] {
        service.change(pod, |endpoint| endpoint.set_terminating(true));
    }
    lab.manifests().apply(&service).unwrap();
    until("the check is 503", || check(0).is_some_and(|answer| answer.status == 503));
    assert!(Client::at(outside).tcp(at(lab.node(0).address(), 32_101)).is_ok(), "traffic is still served");
    lab.manifests().delete(&service).unwrap();
    until("nobody answers", || check(0).is_none());
}

/// S4, H1, H3: each family is asked at its own addresses, and counts its own endpoints.
#[test]
fn both_families_are_told_of_health_and_each_of_its_own_endpoints() {
    let lab = lab(&["--metrics-bind-address=[::]:10249"]);
    let mut endpoints = ["web-1", "web-2"].map(|name| lab.pod(name).unwrap().endpoint());
    endpoints[1].address6 = None;
    let v6: Ipv6Addr = "fd00:10:96::77".parse().unwrap();
    let service = balanced(&lab).and_cluster_ip(v6).endpoints(endpoints);
    lab.manifests().apply(&service).unwrap();
    for (family, count) in [(Family::V4, 2), (Family::V6, 1)] {
        let ask = |node: usize, port| get(lab.client(), at(lab.node(node).ip(family), port), "/healthz");
        until("the check answers", || ask(0, CHECK).is_some_and(|answer| answer.status == 200));
        let answer = ask(0, CHECK).unwrap();
        assert_eq!(answer.json()["localEndpoints"], count, "{answer:?}");
        assert_eq!(answer.json()["service"]["name"], "balanced");
        assert_eq!(answer.json()["serviceProxyHealthy"], true);
        assert!(answer.has_header(&format!("X-Load-Balancing-Endpoint-Weight: {count}")), "{answer:?}");
        let elsewhere = || ask(1, CHECK).map(|answer| answer.status);
        until("the node without an endpoint tells so", || elsewhere().is_some());
        assert_eq!(elsewhere(), Some(503), "no endpoint is there");
        let healthz = ask(0, HEALTH).unwrap();
        assert_eq!((healthz.status, healthz.json()["nodeEligible"].as_bool()), (200, Some(true)));
        let metrics = get(lab.client(), at(lab.node(0).ip(family), METRICS), "/metrics").unwrap();
        for name in [
            "kubeproxy_network_programming_duration_seconds_count",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "kubeproxy_proxy_healthz_total{code=\"200\"}",
        ] {
            assert!(metrics.text.lines().any(|line| line.starts_with(name)), "{name} in {metrics:?}");
        }
    }
}

/// S4, H3
#[test]
fn a_health_check_port_that_is_taken_is_tried_again() {
    let lab = lab(&[]);
    let node = lab.node(0);
    node.serve("thief", &PodOptions::default().tcp(&[CHECK])).unwrap();
    lab.manifests().apply(&balanced(&lab)).unwrap();
    let unbound = || lab.node(0).metric("portolan_health_check_ports_unbound ");
    until("the metric says so", || unbound() == Some(1.0));
    let log = node.agent().unwrap().process().log();
    assert!(log.contains("default/balanced") && log.contains("cannot be had"), "{log}");
    assert!(Client::at(lab.client()).tcp(at(node.address(), 32_101)).is_ok(), "all else is served");
}

/// H1, H5
#[test]
fn a_node_that_is_about_to_go_gets_no_new_connections() {
    let lab = lab(&[]);
    let status = |path| get(lab.client(), at(lab.node(0).address(), HEALTH), path).unwrap().status;
    assert_eq!((status("/healthz"), status("/livez")), (200, 200));
    let taint = "spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}";
    let head = "apiVersion: v1\nkind: Node\nmetadata: {name: node-1";
    for goes in [
        format!("{head}}}\n{taint}\n"),
        format!("{head}, deletionTimestamp: \"2026-01-01T00:00:00Z\"}}\n"),
        String::new(),
    ] {
        lab.manifests().write("nodes.yaml", &goes).unwrap();
        until("the node is not eligible", || status("/healthz") == 503);
        assert_eq!(status("/livez"), 200);
        lab.manifests().write("nodes.yaml", &format!("{head}}}\n")).unwrap();
        until("the node is eligible", || status("/healthz") == 200);
    }
}

/// H2: with clsact filters, which have no link to tell of their end.
#[test]
fn programs_that_somebody_detaches_are_found_and_attached_again() {
    let lab = lab(&["--tc=clsact"]);
    let place = lab.node(0).place();
    let health = |path| get(lab.client(), at(lab.node(0).address(), HEALTH), path).unwrap();
    let answer = health("/healthz");
    assert_eq!((answer.status, answer.json()["nodeEligible"].as_bool()), (200, Some(true)), "{answer:?}");
    let filters = || place.run("tc", &["filter", "show", "dev", "eth0", "ingress"]).unwrap();
    assert!(filters().contains("tc_uplink_in"), "{}", filters());
    place.run("tc", &["qdisc", "del", "dev", "eth0", "clsact"]).unwrap();
    until("the filters are back", || lab.node(0).metric("portolan_reattached_total ") == Some(2.0));
    until("the filters are back", || filters().contains("tc_uplink_in"));
    assert_eq!(health("/livez").status, 200);
}

/// H3: with clsact filters, which nothing but a look at each interface tells of.
#[test]
fn an_interface_that_loses_its_role_loses_its_filters_and_both_is_told() {
    let lab = lab(&["--tc=clsact"]);
    let place = lab.node(0).place();
    let lines =
        |lines: &[&str]| place.ip(&lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>()).unwrap();
    lines(&[
        "link add link eth0 name mv1 type macvlan mode bridge",
        "link set mv1 up",
        "addr add 10.9.0.7/24 dev mv1",
    ]);
    let filters = |way| place.run("tc", &["filter", "show", "dev", "mv1", way]).unwrap();
    let role = |role: &str, reason: &str| {
        lab.node(0).metric(&format!(
            "portolan_interface_role{{interface=\"mv1\",role=\"{role}\",reason=\"{reason}\"}} "
        ))
    };
    until("it is an uplink", || role("uplink", "address") == Some(1.0));
    until("it has filters", || {
        filters("ingress").contains("tc_uplink_in") && filters("egress").contains("tc_uplink_out")
    });
    let log = || lab.node(0).agent().unwrap().process().log();
    until("that is logged", || log().contains("eth0 (default route), mv1 (address 10.9.0.7/24)"));
    lines(&["addr flush dev mv1"]);
    until("it has no role", || role("none", "unused") == Some(1.0));
    until("it has no filters", || !filters("ingress").contains("bpf") && !filters("egress").contains("bpf"));
}

/// H3
#[test]
fn traffic_is_told_by_service_endpoint_and_program() {
    let lab = lab(&["--socket-lb=off", "--metrics-endpoints"]);
    lab.manifests().apply(&balanced(&lab)).unwrap();
    let to = at(lab.node(0).address(), 32_101);
    until("it serves", || Client::at(lab.client()).tcp(to).is_ok());
    let flows = "portolan_service_flows_total{namespace=\"default\",service=\"balanced\",port=\"tcp-80\",\
                 protocol=\"TCP\",ip_family=\"IPv4\"} ";
    let text = || get(lab.node(0).place(), at(Ipv4Addr::LOCALHOST, METRICS), "/metrics").unwrap().text;
    until("the flow is counted", || lab.node(0).metric(flows).is_some_and(|count| count >= 1.0));
    for line in ["portolan_endpoint_flows_total{", "portolan_service_bytes_total{", "portolan_table_entries{"]
    {
        assert!(text().lines().any(|other| other.starts_with(line)), "{line} in {}", text());
    }
    // By the machine's memory and CPUs, and never less than where neither is known.
    let room = lab.node(0).metric("portolan_table_capacity{table=\"flows\"} ").unwrap();
    assert!(room >= Flows::CAPACITY as f64, "{room}");
    until("flows are counted", || lab.node(0).metric("portolan_table_entries{table=\"flows\"} ").is_some());
    let answer = get(lab.node(0).place(), at(Ipv4Addr::LOCALHOST, METRICS), "/proxyMode").unwrap();
    assert!(answer.text.ends_with("\r\n\r\nebpf"), "{answer:?}");
    let bounded = AgentOptions::default().arguments(&["--metrics-max-series=0"]);
    lab.node(0).agent().unwrap().stop().unwrap();
    lab.node(0).start_agent(&bounded).unwrap();
    until("all is left out", || {
        lab.node(0).metric("portolan_metrics_left_out{kind=\"service_port\"} ") == Some(1.0)
    });
    assert!(!text().contains("portolan_service_flows_total{"));
}
