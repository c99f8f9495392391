//! What the node itself sends to Services by packet, whatever its routes are: P9 and P13 over the node's own routes.

use crate::world::eventually;
use dataplane_tests::lab::{AgentOptions, Client, Family, Lab, Options, PodOptions, Service, at};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const V4: Ipv4Addr = Ipv4Addr::new(10, 96, 12, 1);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0xc, 1);

/// Two nodes with a server each, behind one Service of both families; an agent on the first.
fn lab(options: Options, arguments: &[&str]) -> Lab {
    let lab = options.nodes(2).create().unwrap();
    for node in 0..2 {
        lab.add_pod(&format!("web-{}", node + 1), node, &PodOptions::default()).unwrap();
    }
    let webs = || ["web-1", "web-2"].map(|name| lab.pod(name).unwrap().endpoint());
    let service =
        Service::new("routed", V4).and_cluster_ip(V6).tcp(PORT, TARGET).udp(PORT, TARGET).endpoints(webs());
    lab.manifests().apply(&service).unwrap();
    lab.node(0).start_agent(&AgentOptions::default().arguments(arguments)).unwrap();
    if !arguments.contains(&"--service-route=off") {
        eventually("there are routes", || lab.node(0).metric("portolan_service_routes ") == Some(2.0));
    }
    lab
}

fn frontends() -> [SocketAddr; 2] {
    [at(V4, PORT), at(V6, PORT)]
}

fn node(lab: &Lab) -> Client {
    Client::at(lab.node(0).place())
}

fn ip(lab: &Lab, arguments: &[&str]) -> String {
    lab.node(0).place().run("ip", arguments).unwrap()
}

/// Both endpoints answer the node, each in time and from the Service's own address (a connected socket hears no other).
fn assert_served(lab: &Lab, what: &str) {
    for to in frontends() {
        for transport in ["TCP", "UDP"] {
            let mut pods: Vec<_> = (0..24)
                .map(|_| {
                    let client = node(lab);
                    let asked = if transport == "TCP" { client.tcp(to) } else { client.udp(to) };
                    asked.unwrap_or_else(|failure| panic!("{what}: {transport} {to}: {failure:?}")).pod
                })
                .collect();
            pods.sort_unstable();
            pods.dedup();
            assert_eq!(pods, ["web-1", "web-2"], "{what}: {transport} {to}");
        }
    }
}

fn without_default_routes(lab: &Lab) {
    for family in ["-4", "-6"] {
        ip(lab, &[family, "route", "del", "default"]);
    }
}

/// P9: with no route to anywhere but its own network, by a gateway that does not answer, and by a device that leads nowhere.
#[test]
fn the_node_reaches_services_whatever_its_routes_say() {
    for (options, arguments) in [
        (Options::default(), ["--socket-lb=off"].as_slice()),
        (Options::default().strict_rp_filter(true), &[]),
        (Options::default().tx_checksums(false).strict_rp_filter(true), &["--socket-lb=off"]),
    ] {
        let lab = lab(options, arguments);
        assert_served(&lab, "as it was");
        without_default_routes(&lab);
        assert_served(&lab, "no default route");
        let [a, b, c, _] = lab.node(0).address().octets();
        let silent = Ipv4Addr::new(a, b, c, 254).to_string();
        ip(&lab, &["route", "add", "default", "via", &silent, "dev", "eth0"]);
        assert_served(&lab, "a gateway that does not answer");
        ip(&lab, &["route", "del", "default"]);
        ip(&lab, &["link", "add", "nowhere", "type", "bridge"]);
        ip(&lab, &["link", "set", "nowhere", "up"]);
        ip(&lab, &["address", "add", "203.0.113.7/32", "dev", "nowhere"]);
        ip(&lab, &["route", "add", "default", "dev", "nowhere"]);
        ip(&lab, &["-6", "route", "add", "default", "dev", "nowhere"]);
        assert_served(&lab, "a default route by a device that leads nowhere");
        ip(&lab, &["route", "add", "10.0.0.0/9", "dev", "nowhere"]);
        assert_served(&lab, "a route to the service range by another interface");
    }
}

/// The route says where it comes from; it names the node's own address, and what the kernel tells of it is sensible.
#[test]
fn the_route_is_one_like_others_and_tells_whose_it_is() {
    let lab = lab(Options::default(), &[]);
    let own = lab.node(0);
    for (family, range, to) in
        [(Family::V4, "10.96.0.0/16", IpAddr::from(V4)), (Family::V6, "fd00:10:96::/108", V6.into())]
    {
        let route = ip(&lab, &["route", "get", "fibmatch", &to.to_string()]);
        assert!(
            route.contains(range) && route.contains("dev portolan0") && route.contains("proto 86"),
            "{route}"
        );
        assert!(route.contains(&format!("src {}", own.ip(family))), "{route}");
    }
    // No port of a Service, no Service: refused or unreachable at once where the kernel's own answer would be that (P13).
    let begun = Instant::now();
    assert!(node(&lab).tcp(at(V4, 81)).is_err());
    assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
    let addresses = ip(&lab, &["-brief", "address", "show", "dev", "portolan0"]);
    assert!(!addresses.contains('/'), "the device has no address: {addresses}");
    for mtu in ["1400", "1500"] {
        ip(&lab, &["link", "set", "eth0", "mtu", mtu]);
        eventually("its MTU is the uplink's", || {
            ip(&lab, &["link", "show", "portolan0"]).contains(&format!("mtu {mtu}"))
        });
    }
}

/// What a network manager takes away is back, and told; another's route is left alone, and told.
#[test]
fn a_route_that_somebody_removes_is_back() {
    let lab = lab(Options::default(), &["--socket-lb=off"]);
    without_default_routes(&lab);
    assert_served(&lab, "before");
    for (number, arguments) in
        [["-4", "route", "del", "10.96.0.0/16"], ["-6", "route", "del", "fd00:10:96::/108"]]
            .iter()
            .enumerate()
    {
        ip(&lab, arguments);
        let restored = Some(number as f64 + 1.0);
        eventually("the route is back", || {
            lab.node(0).metric("portolan_service_routes_restored_total ") == restored
        });
        assert_served(&lab, "after a route went");
    }
    ip(&lab, &["link", "del", "portolan0"]);
    eventually("the device is back", || ip(&lab, &["route"]).contains("portolan0"));
    eventually("its program as well", || {
        node(&lab).timeout(Duration::from_millis(500)).udp(at(V4, PORT)).is_ok()
    });
    assert_served(&lab, "after the device went");
    assert!(lab.node(0).agent().unwrap().process().log().contains("it is back"));
}

/// C3: the routes outlive the agent, the next one takes it over, one that shall have none and `cleanup` take them away.
#[test]
fn the_routes_stay_between_agents_and_go_with_cleanup() {
    let lab = lab(Options::default(), &["--socket-lb=off"]);
    without_default_routes(&lab);
    lab.node(0).agent().unwrap().kill();
    assert_served(&lab, "without an agent");
    lab.node(0).start_agent(&AgentOptions::default().arguments(&["--socket-lb=off"])).unwrap();
    assert_served(&lab, "by the next agent");
    lab.node(0).agent().unwrap().kill();
    let removed = lab.node(0).portolan(&["cleanup"]).unwrap();
    assert!(removed.contains("portolan0"), "{removed}");
    assert!(!ip(&lab, &["route"]).contains("10.96"), "{}", ip(&lab, &["route"]));
    assert!(!ip(&lab, &["link"]).contains("portolan"), "{}", ip(&lab, &["link"]));
}

/// A route for the same range that somebody else made stays, and is told.
#[test]
fn another_s_route_for_the_range_stays() {
    let lab = lab(Options::default(), &["--service-route=off"]);
    assert!(!ip(&lab, &["route"]).contains("portolan0"));
    ip(&lab, &["route", "add", "10.96.0.0/16", "via", &lab.node(1).address().to_string()]);
    lab.node(0).agent().unwrap().kill();
    lab.node(0).start_agent(&AgentOptions::default()).unwrap();
    eventually("it is told", || {
        lab.node(0)
            .agent()
            .unwrap()
            .process()
            .log()
            .contains("a route for the service range 10.96.0.0/16 already")
    });
    assert!(ip(&lab, &["route"]).contains(&format!("10.96.0.0/16 via {}", lab.node(1).address())));
}
