//! Connections of others whose port is the number of a node port: a pod's that is masqueraded, the node's own (P22).

use crate::world::{BOTH, PATIENCE, Tcp, Transport, World, on_one_network};
use dataplane_tests::lab::{Family, Place, at, next_source};
use socket2::{SockRef, Socket};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

/// How often the two ends of a connection speak in turn.
const TURNS: usize = 3;

/// The client outside as a server, on a port of its own.
enum Server {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Server {
    fn start(world: &World, transport: Transport) -> Self {
        let address = at(world.outside_ip(), 0);
        let bound = world.lab().client().enter(|| match transport {
            Tcp => TcpListener::bind(address).map(Self::Tcp),
            Transport::Udp => UdpSocket::bind(address).map(Self::Udp),
        });
        bound.unwrap().unwrap()
    }

    fn address(&self) -> SocketAddr {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
        .unwrap()
    }

    /// Sends back what one client says, and tells where that came from.
    fn serve(&self) -> std::io::Result<SocketAddr> {
        let mut buffer = [0; 64];
        match self {
            Self::Tcp(listener) => {
                SockRef::from(listener).set_read_timeout(Some(PATIENCE))?;
                let (mut stream, client) = listener.accept()?;
                stream.set_read_timeout(Some(PATIENCE))?;
                for _ in 0..TURNS {
                    let length = stream.read(&mut buffer)?;
                    stream.write_all(&buffer[..length])?;
                }
                Ok(client)
            }
            Self::Udp(socket) => {
                socket.set_read_timeout(Some(PATIENCE))?;
                let mut from = None;
                for _ in 0..TURNS {
                    let (length, client) = socket.recv_from(&mut buffer)?;
                    socket.send_to(&buffer[..length], client)?;
                    from = Some(client);
                }
                from.ok_or_else(|| std::io::ErrorKind::TimedOut.into())
            }
        }
    }
}

/// Connects from a place (and a source) to a server outside, and talks with it; the source that it saw.
#[track_caller]
fn talk(world: &World, place: &Place, transport: Transport, source: SocketAddr) -> SocketAddr {
    let server = Server::start(world, transport);
    let socket: Socket = match transport {
        Tcp => place.tcp_socket(Family::of(source.ip())).unwrap().into(),
        Transport::Udp => place.unbound_udp_socket(Family::of(source.ip())).unwrap().into(),
    };
    socket.set_reuse_address(true).unwrap();
    socket.bind(&source.into()).unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| server.serve());
        socket.connect_timeout(&server.address().into(), PATIENCE).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut stream = TcpStream::from(socket);
        for turn in 0..TURNS as u8 {
            let mut answer = [0];
            stream.write_all(&[turn]).unwrap();
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [turn], "{transport:?}");
        }
        served.join().unwrap().unwrap()
    })
}

/// Masquerades what a pod sends outside to one port of its node, as a CNI that gives out ports at random does now and then.
struct Masquerade<'a>(&'a Place, String);

impl<'a> Masquerade<'a> {
    fn of(world: &'a World, pod: &str, node: usize, port: u16) -> Self {
        let protocol = if world.family() == Family::V4 { "ip" } else { "ip6" };
        let (from, to) = (world.pod_ip(pod), world.outside_ip());
        let name = format!("masquerade-{port}");
        let rule = format!(
            "{protocol} saddr {from} {protocol} daddr {to} meta l4proto {{ tcp, udp }} masquerade to :{port};"
        );
        let chain = format!("chain out {{ type nat hook postrouting priority srcnat; {rule} }};");
        let place = world.node(node).place();
        place.run("nft", &[&format!("table inet {name} {{ {chain} }}")]).unwrap();
        Self(place, name)
    }
}

impl Drop for Masquerade<'_> {
    fn drop(&mut self) {
        let _ = self.0.run("nft", &["delete", "table", "inet", &self.1]);
    }
}

on_one_network! {
    /// P22, Z4: what answers a pod that is masqueraded to the number of a node port, or the node that has bound it, reaches them, as
    /// it does on a port beside it.
    fn a_connection_of_others_from_the_number_of_a_node_port_works(world) {
        world.apply(&world.node_port_service(0).endpoints([world.pod("web-1").endpoint()]));
        for port in [world.node_port(1), world.node_port(0)] {
            for transport in BOTH {
                let own = at(world.node_ip(1), port);
                assert_eq!(talk(world, world.node(1).place(), transport, own), own, "{transport:?}");
                let _masquerade = Masquerade::of(world, "shell-1", 1, port);
                let shell = world.pod("shell-1").place().clone();
                let source = next_source(&shell, world.family());
                assert_eq!(talk(world, &shell, transport, source), own, "{transport:?}");
            }
        }
        // And the node port goes on to serve.
        world.outside().tcp(world.node_frontend(1, 0)).unwrap();
        world.outside().udp(world.node_frontend(1, 0)).unwrap();
    }
}
