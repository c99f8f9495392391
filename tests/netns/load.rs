//! Under load: an agent that is restarted or killed disturbs no connection, and endpoints can be replaced without a failure
//! (C2, C3).

use crate::world::{AT_ONCE, World, pods};
use dataplane_tests::lab::{self, AgentOptions, PodOptions, Stream};
use std::time::{Duration, Instant};

/// Open connections, half of them through each kind of address.
const STREAMS: usize = 1_000;

/// Does something while new connections are made through both kinds of address, none of which may fail.
fn under_new_connections(world: &World, node: usize, disturb: impl FnOnce()) {
    let calls =
        [(world.in_pod("shell-1"), world.frontend(0)), (world.outside(), world.node_frontend(node, 0))];
    let begun = Instant::now();
    let made = lab::under_new_connections(&calls, || {
        disturb();
        std::thread::sleep(Duration::from_secs(2).saturating_sub(begun.elapsed()));
    });
    let made = made.unwrap();
    assert!(made > 20, "{made} connections say nothing");
}

fn streams(world: &World) -> Vec<Stream> {
    let mut streams = world.in_pod("shell-1").connect_many(world.frontend(0), STREAMS / 2).unwrap();
    streams.extend(world.outside().connect_many(world.node_frontend(1, 0), STREAMS / 2).unwrap());
    streams.iter_mut().for_each(|stream| drop(stream.ask().unwrap()));
    streams
}

fn assert_all_alive(streams: &mut [Stream]) {
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.ask().unwrap_or_else(|failure| panic!("stream {number}: {failure}"));
    }
}

/// C3: by packet and by socket, 1,000 open connections and a stream of new ones.
fn an_agent_that_goes_and_comes(arguments: &[&str]) {
    let world = World::own(arguments);
    world.apply(&world.node_port_service(0).endpoints(world.webs()));
    let mut open = streams(&world);
    let options = AgentOptions::default().arguments(arguments);
    let restart = || {
        world.node(1).start_agent(&options).unwrap();
    };
    under_new_connections(&world, 1, || {
        world.node(1).agent().unwrap().kill();
        std::thread::sleep(AT_ONCE);
        restart();
    });
    assert_all_alive(&mut open);
    under_new_connections(&world, 1, || {
        world.node(1).agent().unwrap().stop().unwrap();
        restart();
    });
    assert_all_alive(&mut open);
    // The new agent goes on from the kernel's tables: a change arrives.
    world.apply(&world.node_port_service(0).endpoints([world.pod("web-3").endpoint()]));
    for to in [world.frontend(0), world.node_frontend(1, 0)] {
        let answers: Vec<_> = (0..12).map(|_| world.in_pod("shell-1").tcp(to).unwrap()).collect();
        assert_eq!(pods(&answers).into_iter().collect::<Vec<_>>(), ["web-3"]);
    }
    assert_all_alive(&mut open);
}

/// C3
#[test]
fn killing_and_restarting_the_agent_disturbs_no_connection_by_packet() {
    an_agent_that_goes_and_comes(&["--socket-lb=off"]);
}

/// C3
#[test]
fn killing_and_restarting_the_agent_disturbs_no_connection_by_socket() {
    an_agent_that_goes_and_comes(&["--socket-lb=all"]);
}

/// C3 with clsact filters, which have no links.
#[test]
fn killing_and_restarting_the_agent_disturbs_no_connection_by_clsact() {
    an_agent_that_goes_and_comes(&["--tc=clsact", "--socket-lb=off"]);
}

/// C2, T5: endpoints are replaced one after the other, as a rolling update does; no new connection fails, and an open one
/// lasts until its endpoint itself ends.
#[test]
fn replacing_all_endpoints_fails_no_connection() {
    let world = World::own(&["--socket-lb=off"]);
    let mut service = world.node_port_service(0).endpoints(world.webs());
    world.apply(&service);
    let mut open: Vec<_> =
        (0..20).map(|_| world.in_pod("shell-1").connect(world.frontend(0)).unwrap()).collect();
    open.iter_mut().for_each(|stream| drop(stream.ask().unwrap()));
    under_new_connections(&world, 3, || {
        for (old, new, node) in [("web-1", "new-1", 0), ("web-3", "new-3", 1)] {
            let pod = world.lab().add_pod(new, node, &PodOptions::default()).unwrap();
            service.endpoints_mut().push(pod.endpoint());
            world.apply(&service);
            service.change(old, |endpoint| endpoint.set_terminating(true));
            world.apply(&service);
            service.endpoints_mut().retain(|endpoint| endpoint.pod != old);
            world.apply(&service);
        }
    });
    // Gone from the Service, but its servers still run: established connections are left alone.
    assert_all_alive(&mut open);
    let answers: Vec<_> = (0..24).map(|_| world.in_pod("shell-1").tcp(world.frontend(0)).unwrap()).collect();
    assert_eq!(pods(&answers).into_iter().collect::<Vec<_>>(), ["new-1", "new-3"]);
}

/// C3: two agents never share a pin folder.
#[test]
fn a_second_agent_refuses_and_names_the_first() {
    let world = World::own(&[]);
    let node = world.node(1);
    let first = node.agent().unwrap().process().pid();
    let bpffs = node.bpffs();
    let cgroup = node.cgroup().to_owned();
    let arguments = [
        "agent",
        "--node-name",
        node.name(),
        "--bpffs",
        bpffs.to_str().unwrap(),
        "--cgroup",
        cgroup.to_str().unwrap(),
        "--manifests",
        world.lab().manifests().folder().to_str().unwrap(),
    ];
    let program = dataplane_tests::lab::portolan().unwrap();
    let error = node.place().run(program.to_str().unwrap(), &arguments).unwrap_err();
    assert!(format!("{error:#}").contains(&first.to_string()), "{error:#} names {first}");
}
