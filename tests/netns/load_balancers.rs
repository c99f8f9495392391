//! Load balancer IPs and external IPs, which are on no interface: who is served, whose address the endpoint sees, who is kept
//! out (P3 to P8, P14, P15, S2, S3, S5, Z1).

use crate::policies::assert_source_by_place;
use crate::world::{
    BOTH, HOST_TARGET, PORT, SILENCE, TARGET, Tcp, Transport, Udp, World, ask, ask_many, assert_silent,
    eventually, everywhere, ingress, on_all_paths, pods,
};
use dataplane_tests::lab::{Answer, Client, Failure, Place, Service, at};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::Duration;

/// The two addresses of a Service that [`World::balanced_service`] made.
fn addresses(world: &World) -> [SocketAddr; 2] {
    [world.lb_ip(0), world.external_ip(0)].map(|address| at(address, PORT))
}

/// The client outside, which reaches these addresses by way of a node.
fn outside_by(world: &World, node: usize) -> Client {
    for address in addresses(world) {
        world.route_from_outside(address.ip(), node);
    }
    world.outside()
}

/// A few requests, all of which must be answered.
#[track_caller]
fn ask_some(client: &Client, transport: Transport, to: SocketAddr) -> Vec<Answer> {
    (0..6).map(|_| ask(client, transport, to).unwrap_or_else(|failure| panic!("{to}: {failure}"))).collect()
}

everywhere! {
    /// P4, P9, P15, S5: pods keep their source, clients outside too where the endpoint is on the node that they come by.
    fn lb_and_external_ips_serve_everybody(world) {
        world.apply(&world.balanced_service(0).endpoints(world.webs()));
        for to in addresses(world) {
            for transport in BOTH {
                for name in ["shell-1", "shell-3"] {
                    let answers = ask_some(&world.in_pod(name), transport, to);
                    let own = world.pod_ip(name);
                    assert!(answers.iter().all(|answer| answer.client_ip() == own), "{name}: {answers:?}");
                }
                let answers = ask_some(&world.on_node(3), transport, to);
                let own = world.node_sources(3);
                assert!(answers.iter().all(|answer| own.contains(&answer.client_ip())), "{answers:?}");
            }
        }
        for node in [1, 3] {
            let outside = outside_by(world, node);
            for to in addresses(world) {
                for transport in BOTH {
                    let answers = ask_some(&outside, transport, to);
                    answers.iter().for_each(|answer| assert_source_by_place(world, node, answer));
                }
            }
        }
    }
}

on_all_paths! {
    /// P3, P5 to P8: pods and nodes are spared the policy by their own node; clients outside get the endpoints of the node that they
    /// come by, and see to it that there are some.
    fn policy_local_of_lb_and_external_ips_is_for_clients_outside(world) {
        world.apply(&world.balanced_service(0).external_local().endpoints(world.webs()));
        for to in addresses(world) {
            for transport in BOTH {
                for client in [world.in_pod("shell-3"), world.on_node(3)] {
                    assert_eq!(pods(&ask_many(&client, transport, to)), BTreeSet::from(["web-1", "web-3"]));
                }
            }
        }
        for (node, pod) in [(1, "web-1"), (2, "web-3")] {
            let outside = outside_by(world, node);
            for to in addresses(world) {
                for transport in BOTH {
                    let answers = ask_many(&outside, transport, to);
                    assert_eq!(pods(&answers), BTreeSet::from([pod]));
                    assert!(answers.iter().all(|answer| answer.client_ip() == world.outside_ip()), "{answers:?}");
                }
            }
        }
        let before = world.count(3, "no-local-endpoints");
        let outside = outside_by(world, 3);
        addresses(world).iter().for_each(|to| assert_silent(&outside, *to));
        assert!(world.count(3, "no-local-endpoints") >= before + 4);
    }
}

/// The range of one address.
fn only(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

fn restricted(service: Service, ranges: &[String]) -> Service {
    service.spec("loadBalancerSourceRanges", json!(ranges))
}

on_all_paths! {
    /// S2: everybody is asked, of LB IPs alone, and once: a connection that is there stays when the ranges change.
    fn source_ranges_keep_others_from_the_lb_ip_alone(world) {
        let service = world.balanced_service(0).endpoints(world.webs());
        let [lb, external] = addresses(world);
        let outside = outside_by(world, 3);
        let (shell, node) = (world.in_pod("shell-1"), world.on_node(3));
        // White space is trimmed, and what is of the other family restricts nobody (F4).
        let other = if lb.is_ipv4() { "2001:db8::/32" } else { "192.0.2.0/24" };
        let ranges = [format!(" {} ", only(world.outside_ip())), other.to_owned()];
        world.apply(&restricted(service.clone(), &ranges));
        for transport in BOTH {
            ask(&outside, transport, lb).unwrap();
            for client in [&outside, &shell, &node] {
                ask(client, transport, external).unwrap();
                ask(client, transport, world.node_frontend(2, 0)).unwrap();
            }
        }
        assert_silent(&shell, lb);
        assert_silent(&node, lb);
        let mut stream = outside.connect(lb).unwrap();
        stream.ask().unwrap();
        world.apply(&restricted(service.clone(), &[only(world.pod_ip("shell-1"))]));
        for transport in BOTH {
            ask(&shell, transport, lb).unwrap();
        }
        assert_silent(&outside, lb);
        stream.ask().unwrap();
        world.apply(&restricted(service.clone(), &[only(world.node_ip(3))]));
        for transport in BOTH {
            ask(&node, transport, lb).unwrap();
        }
        assert_silent(&shell, lb);
        world.apply(&restricted(service, &[other.to_owned()]));
        for transport in BOTH {
            for client in [&outside, &shell, &node] {
                ask(client, transport, lb).unwrap();
            }
        }
    }
}

on_all_paths! {
    /// S2, second reading: where the LB IP is on the node itself, the node calls it from that very address, and may if its primary
    /// address is in the ranges.
    fn a_node_that_has_the_lb_ip_is_asked_by_its_primary_address(world) {
        if !world.kind().serves_own_node_ports() {
            return;
        }
        let service = world.balanced_service(0).endpoints(world.webs());
        let [lb, _] = addresses(world);
        let place = world.node(1).place();
        let line = |verb: &str| format!("addr {verb} {} dev lo", only(lb.ip()));
        place.ip(&[line("add")]).unwrap();
        let answer = |range: IpAddr| {
            world.apply(&restricted(service.clone(), &[only(range)]));
            let client = world.on_node(1).timeout(SILENCE);
            let mut last = Err(Failure::TimedOut);
            // The agent learns of the address by itself.
            for _ in 0..10 {
                last = client.tcp(lb);
                if last.is_ok() {
                    break;
                }
            }
            last
        };
        let (own, others) = (answer(world.node_ip(1)), answer(world.node_ip(2)));
        place.ip(&[line("del")]).unwrap();
        assert!(own.is_ok(), "{own:?}");
        assert!(others.is_err(), "{others:?}");
    }
}

on_all_paths! {
    /// S3: no node port, and the LB IP serves.
    fn without_a_node_port_the_lb_ip_serves(world) {
        let service = world.cluster_service(0).spec("type", json!("LoadBalancer"));
        let service = service.spec("allocateLoadBalancerNodePorts", json!(false)).status(ingress(world.lb_ip(0)));
        world.apply(&service.endpoints(world.webs()));
        let [lb, _] = addresses(world);
        let outside = outside_by(world, 3);
        for transport in BOTH {
            for client in [&outside, &world.in_pod("shell-1"), &world.on_node(1)] {
                assert_eq!(pods(&ask_many(client, transport, lb)).len(), 2);
            }
        }
    }
}

/// A load balancer of its own: a place outside that has an address and answers on [`PORT`] with the address of who asks.
fn load_balancer(world: &World, address: IpAddr) -> (Place, std::thread::JoinHandle<()>) {
    let host = if address.is_ipv4() { 170 } else { 171 };
    let place = world.lab().add_outside(&format!("lb-{host}"), host).unwrap();
    place.ip(&[format!("addr add {} dev eth0", only(address))]).unwrap();
    world.lab().route_to_pods(&place).unwrap();
    let via = format!("{}{host}", if address.is_ipv4() { "192.168.100." } else { "fd00:100::" });
    for node in world.lab().nodes() {
        node.place().ip(&[format!("route replace {} via {via}", only(address))]).unwrap();
    }
    let listener = place.enter(|| TcpListener::bind(at(address, PORT))).unwrap().unwrap();
    let thread = std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap();
            if stream.set_read_timeout(Some(Duration::from_secs(5))).is_err() || peer.ip() == address {
                return;
            }
            let body = format!("hello from balancer on outside, you are {peer}\n");
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = std::io::Read::read(&mut stream, &mut [0; 512]);
            let _ = stream.write_all((head + &body).as_bytes());
        }
    });
    (place, thread)
}

on_all_paths! {
    /// P14: what pods and nodes send to a load balancer that is a proxy really goes out to it, live; one that has a name only gets
    /// nothing programmed.
    fn a_load_balancer_that_is_a_proxy_is_really_called(world) {
        let [lb, _] = addresses(world);
        let (place, thread) = load_balancer(world, lb.ip());
        let service = world.node_port_service(0).spec("type", json!("LoadBalancer")).endpoints(world.webs());
        let proxy = json!({ "loadBalancer": { "ingress": [{ "ip": lb.ip(), "ipMode": "Proxy" }] } });
        let named = json!({ "loadBalancer": { "ingress": [{ "hostname": "lb.example" }] } });
        let clients =
            [("shell-1", world.in_pod("shell-1")), ("shell-3", world.in_pod("shell-3")), ("node", world.on_node(3))];
        let assert_all_by = |status: Value, by: fn(&str) -> bool| {
            world.apply(&service.clone().status(status));
            for (name, client) in &clients {
                let answer = client.tcp(lb).unwrap();
                assert!(by(&answer.pod), "{name}: {answer}");
                if name.starts_with("shell") {
                    assert_eq!(answer.client_ip(), world.pod_ip(name));
                }
            }
        };
        assert_all_by(proxy.clone(), |pod| pod == "balancer");
        assert_all_by(ingress(lb.ip()), |pod| pod.starts_with("web"));
        assert_all_by(proxy, |pod| pod == "balancer");
        assert_all_by(named, |pod| pod == "balancer");
        // A call from the load balancer's own address ends it.
        drop(Client::at(&place).connect(lb));
        thread.join().unwrap();
    }
}

on_all_paths! {
    /// P15: nobody says on the network that an LB IP or external IP is his; who has a route is served all the same.
    fn nobody_answers_for_the_addresses_of_load_balancers(world) {
        world.apply(&world.balanced_service(0).endpoints(world.webs()));
        let place = world.lab().client();
        for to in addresses(world) {
            place.ip(&[format!("route replace {} dev eth0 scope link", only(to.ip()))]).unwrap();
            assert!(world.outside().tcp(to).is_err(), "{to}");
            let neighbours = place.run("ip", &["neigh", "show", "to", &to.ip().to_string()]).unwrap();
            assert!(!neighbours.contains("lladdr"), "{neighbours}");
        }
        let outside = outside_by(world, 2);
        for to in addresses(world) {
            outside.tcp(to).unwrap();
        }
    }
}

on_all_paths! {
    /// Z1: an external IP that is a pod's address stays the pod's; one that is a node's is programmed for the Service's ports and no
    /// others; of two Services that want the same one the first has it, and the second after it.
    fn an_external_ip_takes_nothing_from_others(world) {
        let of = |index: u8, address: IpAddr, port: u16, web: &str| {
            let service = world.bare_service(index).tcp(port, TARGET).udp(port, TARGET);
            service.spec("externalIPs", json!([address])).endpoints([world.pod(web).endpoint()])
        };
        let pods_own = world.pod_ip("web-3");
        world.apply(&of(0, pods_own, TARGET, "web-1"));
        for transport in BOTH {
            for client in [world.in_pod("shell-1"), world.on_node(1)] {
                assert_eq!(ask(&client, transport, at(pods_own, TARGET)).unwrap().pod, "web-3");
            }
        }
        // Of its own for each test of a laboratory.
        let port = world.own_target();
        world.apply(&of(1, world.node_ip(2), port, "web-1"));
        for transport in BOTH {
            assert_eq!(ask(&world.outside(), transport, at(world.node_ip(2), port)).unwrap().pod, "web-1");
            assert_eq!(ask(&world.outside(), transport, at(world.node_ip(2), HOST_TARGET)).unwrap().pod, "host-2");
        }
        let (first, second) = (of(2, world.external_ip(0), PORT, "web-1"), of(3, world.external_ip(0), PORT, "web-3"));
        world.apply(&second);
        world.apply(&first);
        let shared = at(world.external_ip(0), PORT);
        for transport in [Tcp, Udp] {
            assert_eq!(pods(&ask_many(&world.in_pod("shell-1"), transport, shared)), BTreeSet::from(["web-1"]));
        }
        world.delete(&first);
        eventually("the second Service has the address", || {
            world.in_pod("shell-1").tcp(shared).is_ok_and(|answer| answer.pod == "web-3")
        });
    }
}
