//! ICMP errors between real stacks: path MTU discovery on both sides of a node, traceroute (P19).

use crate::world::{PORT, Tcp, Transport, Udp, World, on_one_network};
use dataplane_tests::lab::{Client, Failure, Family, Place, at};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::Duration;

/// Enough for windows to open and many segments to be too long.
const BULK: usize = 1 << 20;

/// A place behind a router of its own, on whose far link packets of at most `mtu` bytes are sent; the place itself does not
/// know that.
fn behind_router(world: &World, mtu: u16) -> (Place, IpAddr) {
    let lab = world.lab();
    let (host, net, near, far_end) = match world.family() {
        Family::V4 => (150, "172.30.150.0/24", "172.30.150.1", "172.30.150.2"),
        Family::V6 => (160, "fd00:30:150::/64", "fd00:30:150::1", "fd00:30:150::2"),
    };
    let router = lab.add_outside(&format!("router-{host}"), host).unwrap();
    let far = lab.add_outside(&format!("far-{host}"), host + 1).unwrap();
    for forwarding in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        router.sysctl(forwarding, "1").unwrap();
    }
    let bits = net.split_once('/').unwrap().1;
    router
        .ip(&[
            format!("link add far0 type veth peer name near0 netns {}", far.namespace()),
            address_on("far0", near, bits),
            format!("link set far0 mtu {mtu} up"),
        ])
        .unwrap();
    far.ip(&[
        "link del eth0".into(),
        address_on("near0", far_end, bits),
        "link set near0 up".into(),
        format!("route add default via {near}"),
    ])
    .unwrap();
    let router = lab.outside_addresses(host).of(world.family());
    for node in lab.nodes() {
        node.place().ip(&[format!("route replace {net} via {router}")]).unwrap();
    }
    (far, far_end.parse().unwrap())
}

/// The command of `ip` that gives an interface an address at once, without a search for duplicates.
fn address_on(interface: &str, address: &str, bits: &str) -> String {
    let nodad = if address.contains(':') { " nodad" } else { "" };
    format!("addr add {address}/{bits} dev {interface}{nodad}")
}

/// A listener in a pod for one connection, on which `talk` runs.
fn serve_one(
    world: &World,
    pod: &str,
    talk: impl FnOnce(TcpStream) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    let address = at(world.any_port().ip(), world.own_target());
    let listener = world.pod(pod).place().enter(|| TcpListener::bind(address)).unwrap().unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        talk(stream);
    })
}

/// The path MTU that a place knows of the way to an address.
fn known_mtu(place: &Place, to: IpAddr) -> Option<u16> {
    let text = place.run("ip", &["route", "get", &to.to_string()]).unwrap();
    let words: Vec<_> = text.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "mtu")?;
    words.get(at + 1)?.parse().ok()
}

fn bulk() -> Vec<u8> {
    (0..BULK).map(|at| (at / 7) as u8).collect()
}

/// A Service with a node port for TCP of the pod `web-3`, which is on `node-2`.
fn apply(world: &World) {
    let service = world.bare_service(0).tcp_node_port(PORT, world.own_target(), world.node_port(0));
    world.apply(&service.endpoints([world.pod("web-3").endpoint()]));
}

on_one_network! {
    /// P19: the error about what an endpoint sends reaches the endpoint, through the node that translated both ends and through
    /// the one that translated only the destination.
    fn a_client_behind_a_small_mtu_downloads_through_a_node_port(world) {
        apply(world);
        let (far, address) = behind_router(world, 1_280);
        let pod = world.pod("web-3");
        for (node, seen_by_pod) in [(1, world.node_ip(1)), (2, address)] {
            let server = serve_one(world, "web-3", |mut stream| stream.write_all(&bulk()).unwrap());
            let stream = Client::at(&far).connect(world.node_frontend(node, 0)).unwrap();
            let mut read = Vec::new();
            stream.get_ref().read_to_end(&mut read).unwrap();
            server.join().unwrap();
            assert!(read == bulk(), "{} bytes of {BULK}", read.len());
            assert_eq!(known_mtu(pod.place(), seen_by_pod), Some(1_280), "through node-{node}");
        }
    }
}

on_one_network! {
    /// P19: where the way from the node to the endpoint takes less than the client sends, as an overlay does, the client is told.
    fn a_client_uploads_over_a_way_that_takes_less(world) {
        apply(world);
        let narrow = |mtu: &str| {
            let (via, [v4, v6]) = (world.node_ip(2), world.node(2).pod_ranges());
            let range = if via.is_ipv4() { v4 } else { v6 };
            world.node(3).place().ip(&[format!("route replace {range} via {via} {mtu}")]).unwrap();
        };
        narrow("mtu lock 1300");
        let server = serve_one(world, "web-3", |mut stream| {
            let mut read = Vec::new();
            stream.read_to_end(&mut read).unwrap();
            assert!(read == bulk(), "{} bytes of {BULK}", read.len());
        });
        let stream = world.outside().connect(world.node_frontend(3, 0)).unwrap();
        stream.get_ref().write_all(&bulk()).unwrap();
        drop(stream);
        let joined = server.join();
        narrow("");
        joined.unwrap();
        assert_eq!(known_mtu(world.lab().client(), world.node_ip(3)), Some(1_300));
        assert!(world.count(3, "too-big") >= 1);
    }
}

/// What came of a probe.
#[derive(Debug, PartialEq, Eq)]
enum Hop {
    /// Time exceeded, from this address.
    Exceeded(IpAddr),
    /// The endpoint answered.
    Answered,
}

/// A datagram with this time to live on a connected socket, which hears of errors only if they quote what it sent.
fn probe(place: &Place, to: SocketAddr, ttl: u32) -> Hop {
    let family = Family::of(to.ip());
    let socket = place.unbound_udp_socket(family).unwrap();
    socket.connect(to).unwrap();
    set_ttl(&socket, family, ttl);
    keep_errors(&socket, family);
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.send(b"hello").unwrap();
    let mut buffer = [0; 512];
    match socket.recv(&mut buffer) {
        Ok(_) => Hop::Answered,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{to} with {ttl}: {error}");
            offender(&socket, family)
        }
    }
}

/// Sets the time to live of what a socket sends.
fn set_ttl(socket: &impl AsFd, family: Family, ttl: u32) {
    let socket = socket2::SockRef::from(socket);
    match family {
        Family::V4 => socket.set_ttl_v4(ttl).unwrap(),
        Family::V6 => socket.set_unicast_hops_v6(ttl).unwrap(),
    }
}

/// Has ICMP errors kept on the socket's error queue.
fn keep_errors(socket: &UdpSocket, family: Family) {
    let (level, option) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_RECVERR),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    };
    let on: i32 = 1;
    // SAFETY: the pointer is to a value that outlives the call, with its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Who sent the ICMP error that waits on a socket's error queue: that the time to live was exceeded.
fn offender(socket: &UdpSocket, family: Family) -> Hop {
    /// Where the parts of `struct sock_extended_err` lie in the control message (linux/errqueue.h); an address follows it.
    const HEADER: usize = size_of::<libc::cmsghdr>();
    const KIND: usize = HEADER + 5;
    const OFFENDER: usize = HEADER + 16;
    let mut control = [0_u64; 32];
    // SAFETY: all zero is a valid `msghdr`; the control buffer outlives the call.
    let read = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE)
    };
    assert!(read >= 0, "no error waits: {}", std::io::Error::last_os_error());
    let bytes: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).collect();
    // The address is at byte 4 of `struct sockaddr_in`, at byte 8 of `struct sockaddr_in6`.
    let (time_exceeded, address): (u8, IpAddr) = match family {
        Family::V4 => (11, <[u8; 4]>::try_from(&bytes[OFFENDER + 4..OFFENDER + 8]).unwrap().into()),
        Family::V6 => (3, <[u8; 16]>::try_from(&bytes[OFFENDER + 8..OFFENDER + 24]).unwrap().into()),
    };
    assert_eq!(bytes[KIND], time_exceeded, "time exceeded");
    Hop::Exceeded(address)
}

/// A connection whose packets have this time to live.
fn connect(place: &Place, to: SocketAddr, ttl: u32) -> Result<(), Failure> {
    let family = Family::of(to.ip());
    let stream = TcpStream::from(place.tcp_socket(family).unwrap());
    set_ttl(&stream, family, ttl);
    // A call to `connect` waits no longer than this.
    stream.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
    Ok(socket2::SockRef::from(&stream).connect(&to.into())?)
}

/// Every hop but the last is this one, over UDP and TCP; then the endpoint answers.
#[track_caller]
fn assert_route(place: &Place, to: SocketAddr, hops: &[IpAddr], transports: &[Transport]) {
    for (ttl, hop) in (1..).zip(hops) {
        for transport in transports {
            match transport {
                Udp => assert_eq!(probe(place, to, ttl), Hop::Exceeded(*hop), "UDP to {to}, {ttl}"),
                Tcp => assert_eq!(connect(place, to, ttl), Err(Failure::Unreachable), "TCP to {to}, {ttl}"),
            }
        }
    }
    let ttl = hops.len() as u32 + 1;
    for transport in transports {
        match transport {
            Udp => assert_eq!(probe(place, to, ttl), Hop::Answered, "UDP to {to}, {ttl}"),
            Tcp => assert_eq!(connect(place, to, ttl), Ok(()), "TCP to {to}, {ttl}"),
        }
    }
}

on_one_network! {
    /// P19: a traceroute to a Service shows the way and ends: from a pod, hop by hop; from outside, what lies behind the node that
    /// translates both ends speaks in that node's name.
    fn a_traceroute_to_a_service_ends(world) {
        world.apply(&world.node_port_service(0).endpoints([world.pod("web-3").endpoint()]));
        let gateway = world.gateway(1);
        let [first, second] = [world.node_ip(1), world.node_ip(2)];
        let both = [Udp, Tcp];
        assert_route(world.pod("shell-1").place(), world.frontend(0), &[gateway, second], &both);
        assert_route(world.lab().client(), world.node_frontend(1, 0), &[first, first], &both);
        assert_route(world.lab().client(), world.node_frontend(2, 0), &[second], &both);
    }
}
