//! ICMP errors between real stacks: path MTU discovery on both sides of a node, traceroute (P19).

use crate::world::{PORT, Tcp, Transport, Udp, World, everywhere};
use dataplane_tests::lab::{Client, Failure, Place, at};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

/// Enough for windows to open and many segments to be too long.
const BULK: usize = 1 << 20;

/// A place behind a router of its own, on whose far link packets of at most `mtu` bytes are sent; the place itself does not
/// know that. `host` is the router's host number in the nodes' network.
fn behind_router(world: &World, name: &str, host: u8, mtu: u16) -> (Place, Ipv4Addr) {
    let lab = world.lab();
    let router = lab.add_outside(&format!("{name}-r"), host).unwrap();
    let far = lab.add_outside(name, host + 1).unwrap();
    router.sysctl("net/ipv4/ip_forward", "1").unwrap();
    router
        .ip(&[
            format!("link add far0 type veth peer name near0 netns {}", far.namespace()),
            format!("addr add 172.30.{host}.1/24 dev far0"),
            format!("link set far0 mtu {mtu} up"),
        ])
        .unwrap();
    far.ip(&[
        "link del eth0".into(),
        format!("addr add 172.30.{host}.2/24 dev near0"),
        "link set near0 up".into(),
        format!("route add default via 172.30.{host}.1"),
    ])
    .unwrap();
    let network = lab.client_address().octets();
    for node in lab.nodes() {
        let router = Ipv4Addr::new(network[0], network[1], network[2], host);
        node.place().ip(&[format!("route add 172.30.{host}.0/24 via {router}")]).unwrap();
    }
    (far, Ipv4Addr::new(172, 30, host, 2))
}

/// The port on which servers of this test listen.
fn target(world: &World) -> u16 {
    world.node_port(9)
}

/// A listener in a pod for one connection, on which `talk` runs.
fn serve_one(
    world: &World,
    pod: &str,
    talk: impl FnOnce(TcpStream) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    let address = at(Ipv4Addr::UNSPECIFIED, target(world));
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

/// A Service with a node port for TCP on [`target`] of the pod `web-3`, which is on `node-2`.
fn apply(world: &World) {
    let service = world.bare_service(0).tcp_node_port(PORT, target(world), world.node_port(0));
    world.apply(&service.endpoints([world.pod("web-3").endpoint()]));
}

everywhere! {
    /// P19: the error about what an endpoint sends reaches the endpoint, through the node that translated both ends and through
    /// the one that translated only the destination.
    fn a_client_behind_a_small_mtu_downloads_through_a_node_port(world) {
        apply(world);
        let (far, address) = behind_router(world, "small", 150, 1_280);
        let pod = world.pod("web-3");
        for (node, seen_by_pod) in [(1, world.node_ip(1)), (2, address.into())] {
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

everywhere! {
    /// P19: where the way from the node to the endpoint takes less than the client sends, as an overlay does, the client is told.
    fn a_client_uploads_over_a_way_that_takes_less(world) {
        apply(world);
        let narrow = |mtu: &str| {
            let (range, via) = (world.node(2).pod_range(), world.node(2).address());
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
    let socket = place.udp_socket(None).unwrap();
    socket.connect(to).unwrap();
    set_option(&socket, libc::IP_TTL, ttl);
    set_option(&socket, libc::IP_RECVERR, 1);
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.send(b"hello").unwrap();
    let mut buffer = [0; 512];
    match socket.recv(&mut buffer) {
        Ok(_) => Hop::Answered,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{to} with {ttl}: {error}");
            offender(&socket)
        }
    }
}

fn set_option(socket: &impl std::os::fd::AsRawFd, option: i32, value: u32) {
    let value: i32 = value.cast_signed();
    // SAFETY: the pointer is to a value that outlives the call, with its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as u32,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Who sent the ICMP error that waits on a socket's error queue.
fn offender(socket: &UdpSocket) -> Hop {
    /// Where the parts of `struct sock_extended_err` with its address lie in the control message (linux/errqueue.h).
    const HEADER: usize = size_of::<libc::cmsghdr>();
    const KIND: usize = HEADER + 5;
    const OFFENDER: usize = HEADER + 16 + 4;
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
    assert_eq!(bytes[KIND], 11, "time exceeded");
    let address: [u8; 4] = bytes[OFFENDER..OFFENDER + 4].try_into().unwrap();
    Hop::Exceeded(Ipv4Addr::from(address).into())
}

/// A connection whose packets have this time to live.
fn connect(place: &Place, to: SocketAddr, ttl: u32) -> Result<(), Failure> {
    let SocketAddr::V4(to) = to else { panic!("{to} is no IPv4 address") };
    let stream = TcpStream::from(place.socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap());
    set_option(&stream, libc::IP_TTL, ttl);
    // A call to `connect` waits no longer than this.
    stream.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
    // SAFETY: all zero is a valid `sockaddr_in`, which outlives the call.
    let result = unsafe {
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        address.sin_family = libc::AF_INET as libc::sa_family_t;
        address.sin_port = to.port().to_be();
        address.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
        libc::connect(stream.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
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

everywhere! {
    /// P19: a traceroute to a Service shows the way and ends: from a pod, hop by hop; from outside, what lies behind the node that
    /// translates both ends speaks in that node's name.
    fn a_traceroute_to_a_service_ends(world) {
        world.apply(&world.node_port_service(0).endpoints([world.pod("web-3").endpoint()]));
        let gateway = IpAddr::from(world.node(1).gateway());
        let [first, second] = [world.node_ip(1), world.node_ip(2)];
        let both = [Udp, Tcp];
        assert_route(world.pod("shell-1").place(), world.frontend(0), &[gateway, second], &both);
        assert_route(world.lab().client(), world.node_frontend(1, 0), &[first, first], &both);
        assert_route(world.lab().client(), world.node_frontend(2, 0), &[second], &both);
    }
}
