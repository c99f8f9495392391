//! Session affinity (S1), on the socket path and the packet path: a client comes back to the endpoint it had.

use crate::world::{BOTH, Transport, World, ask, ask_many, eventually, on_all_paths, on_both_paths, pods};
use dataplane_tests::lab::{Client, Service};
use serde_json::json;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

fn affine(service: Service) -> Service {
    service.spec("sessionAffinity", json!("ClientIP"))
}

fn affine_for(service: Service, seconds: u32) -> Service {
    affine(service).spec("sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": seconds } }))
}

/// The one pod that answers all of many requests.
#[track_caller]
fn the_one(client: &Client, transport: Transport, to: SocketAddr) -> String {
    let answers = ask_many(client, transport, to);
    let found = pods(&answers);
    assert_eq!(found.len(), 1, "{transport:?} {to}: {found:?}");
    answers[0].pod.clone()
}

/// Clients of each kind and the address that each calls.
fn clients(world: &World) -> [(Client, SocketAddr); 4] {
    [
        (world.in_pod("shell-3"), world.frontend(0)),
        (world.on_node(1), world.frontend(0)),
        (world.outside(), world.node_frontend(1, 0)),
        // With its source translated: the client is told by its own address.
        (world.outside(), world.node_frontend(3, 0)),
    ]
}

on_all_paths! {
    /// S1: each client stays with one endpoint, through every address of the service port; and no longer when affinity is switched
    /// off, live.
    fn a_client_comes_back_to_its_endpoint(world) {
        let service = world.node_port_service(0).endpoints(world.webs());
        for _ in 0..2 {
            world.apply(&affine(service.clone()));
            for transport in BOTH {
                for (client, to) in clients(world) {
                    the_one(&client, transport, to);
                }
                let shell = world.in_pod("shell-1");
                let own = the_one(&shell, transport, world.frontend(0));
                assert_eq!(the_one(&shell, transport, world.node_frontend(1, 0)), own);
            }
            world.apply(&service);
            for transport in BOTH {
                for (client, to) in clients(world) {
                    assert_eq!(pods(&ask_many(&client, transport, to)).len(), 2, "{transport:?} {to}");
                }
            }
        }
    }
}

on_all_paths! {
    /// S1: the endpoint left the set: another is chosen, which the client keeps when the first is there again.
    fn a_client_whose_endpoint_went_gets_another_and_keeps_that(world) {
        let mut service = affine(world.node_port_service(0)).endpoints(world.webs());
        for transport in BOTH {
            for (client, to) in clients(world) {
                world.apply(&service);
                let first = the_one(&client, transport, to);
                let other = if first == "web-1" { "web-3" } else { "web-1" };
                service.set_endpoints([world.pod(other).endpoint()]);
                world.apply(&service);
                assert_eq!(the_one(&client, transport, to), other);
                service.set_endpoints(world.webs());
                world.apply(&service);
                assert_eq!(the_one(&client, transport, to), other);
            }
        }
    }
}

on_both_paths! {
    /// S1: each new connection refreshes it, and who stays away for longer than the timeout is a new client.
    fn affinity_ends_when_a_client_stays_away(world) {
        const SECONDS: u32 = 2;
        let away = Duration::from_secs(u64::from(SECONDS)) + Duration::from_millis(200);
        world.apply(&affine_for(world.node_port_service(0), SECONDS).endpoints(world.webs()));
        for transport in BOTH {
            let (client, to) = (world.in_pod("shell-3"), world.frontend(0));
            let mut first = ask(&client, transport, to).unwrap().pod;
            let (mut begun, mut asked) = (Instant::now(), Instant::now());
            while begun.elapsed() < away {
                let before = std::mem::replace(&mut asked, Instant::now());
                let pod = ask(&client, transport, to).unwrap().pod;
                if before.elapsed() >= Duration::from_secs(u64::from(SECONDS)) {
                    // A machine that is that busy has kept the client away: it is a new one.
                    (first, begun) = (pod, Instant::now());
                    continue;
                }
                assert_eq!(pod, first, "after {:?}", begun.elapsed());
                std::thread::sleep(Duration::from_millis(100));
            }
            eventually("a client that stayed away gets the other endpoint", || {
                std::thread::sleep(away);
                ask(&client, transport, to).unwrap().pod != first
            });
        }
    }
}

on_both_paths! {
    /// S1: policies go first: a client whose endpoint is not in the local set gets one that is.
    fn policies_go_before_affinity(world) {
        let service = affine(world.node_port_service(0)).endpoints(world.webs());
        for transport in BOTH {
            let (client, to) = (world.outside(), world.node_frontend(1, 0));
            world.apply(&service.clone().endpoints([world.pod("web-3").endpoint()]));
            assert_eq!(the_one(&client, transport, to), "web-3");
            world.apply(&service);
            assert_eq!(the_one(&client, transport, to), "web-3");
            world.apply(&service.clone().external_local());
            assert_eq!(pods(&ask_many(&client, transport, to)), BTreeSet::from(["web-1"]));
        }
    }
}
