//! Datagrams that come in fragments, between real stacks (P20).

use crate::world::{PORT, World, on_one_network};
use dataplane_tests::lab::{Family, Place, at};
use dataplane_tests::packet::build::{Packet, udp_packet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Bytes of the datagrams: more than forty fragments.
const BIG: usize = 60_000;

/// While `clients` run, a server in each of the pods sends every datagram back.
fn with_echo(world: &World, pods: &[&str], clients: impl FnOnce()) {
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for pod in pods {
            let place = world.pod(pod).place().clone();
            let (socket, end) = (bind(world, &place), &end);
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            scope.spawn(move || {
                let mut buffer = vec![0; 65_536];
                while !end.load(Ordering::Relaxed) {
                    if let Ok((length, client)) = socket.recv_from(&mut buffer) {
                        let _ = socket.send_to(&buffer[..length], client);
                    }
                }
            });
        }
        // A panic of a client must end the servers, or the scope waits for them.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(clients));
        end.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn bind(world: &World, place: &Place) -> UdpSocket {
    let address = at(world.any_port().ip(), world.own_target());
    place.enter(|| UdpSocket::bind(address)).unwrap().unwrap()
}

/// Sends a big datagram and expects it back, three times on one socket.
#[track_caller]
fn assert_echoed(place: &Place, to: SocketAddr) {
    let socket = place.unbound_udp_socket(Family::of(to.ip())).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    for round in 0..3_u8 {
        let sent: Vec<u8> = (0..BIG).map(|at| (at / 251) as u8 ^ round).collect();
        socket.send(&sent).unwrap();
        let mut read = vec![0; 65_536];
        let length = socket.recv(&mut read).unwrap_or_else(|error| panic!("{to}, round {round}: {error}"));
        assert!(read[..length] == sent, "{to}, round {round}: {length} other bytes");
    }
}

on_one_network! {
    /// P20: 60,000 bytes there and back: from pods and from the node through a ClusterIP, from outside through node ports, with the
    /// source kept and with the source translated.
    fn big_datagrams_go_there_and_back(world) {
        let service = |index: u8, pod: &str| {
            let service = world.bare_service(index).udp_node_port(PORT, world.own_target(), world.node_port(index.into()));
            world.apply(&service.endpoints([world.pod(pod).endpoint()]));
        };
        (service(0, "web-1"), service(1, "web-3"));
        with_echo(world, &["web-1", "web-3"], || {
            for index in [0, 1] {
                assert_echoed(world.pod("shell-1").place(), world.frontend(index));
                assert_echoed(world.pod("shell-3").place(), world.frontend(index));
                assert_echoed(world.lab().client(), world.node_frontend(1, index.into()));
                assert_echoed(world.lab().client(), world.node_frontend(2, index.into()));
            }
            assert_echoed(world.node(1).place(), world.frontend(1));
        });
    }
}

/// The fragments of a datagram of 48 bytes of data, from the network header on.
fn fragments(src: IpAddr, dst: SocketAddr, id: u16) -> Vec<Vec<u8>> {
    let (src, to) = (src.to_string(), dst.ip().to_string());
    let mut datagram = udp_packet((&src, 40_000), (&to, dst.port()), &[b'x'; 48]);
    datagram.id = id;
    datagram.fragments(24).iter().map(Packet::network_bytes).collect()
}

on_one_network! {
    /// P20: a fragment that comes before its first is dropped and counted, and its datagram is lost; in any order behind the first they
    /// arrive.
    fn an_early_fragment_is_dropped_and_counted(world) {
        let service = world.bare_service(0).udp(PORT, world.own_target());
        world.apply(&service.endpoints([world.pod("web-3").endpoint()]));
        let pod = world.pod("shell-1");
        let server = bind(world, world.pod("web-3").place());
        let raw = pod.place().socket(world.family().domain(), libc::SOCK_RAW, libc::IPPROTO_RAW).unwrap();
        let send = |id: u16, order: [usize; 3]| {
            let packets = fragments(world.pod_ip("shell-1"), world.frontend(0), id);
            for at in order {
                send_raw(&raw, &packets[at], world.frontend(0));
            }
        };
        let received = |wait: Duration| {
            server.set_read_timeout(Some(wait)).unwrap();
            server.recv(&mut [0; 100]).ok()
        };
        let before = world.count(1, "early-fragment");
        send(1, [0, 2, 1]);
        assert_eq!(received(Duration::from_secs(3)), Some(48));
        assert_eq!(world.count(1, "early-fragment"), before);
        send(2, [1, 0, 2]);
        assert_eq!(received(crate::world::SILENCE), None);
        assert_eq!(world.count(1, "early-fragment"), before + 1);
        send(3, [0, 1, 2]);
        assert_eq!(received(Duration::from_secs(3)), Some(48));
    }
}

/// Sends a packet with its network header. The port of a raw socket's destination is to be 0 (IPv6).
pub(crate) fn send_raw(socket: &OwnedFd, packet: &[u8], to: SocketAddr) {
    let to = at(to.ip(), 0).into();
    assert_eq!(socket2::SockRef::from(socket).send_to(packet, &to).unwrap(), packet.len());
}
