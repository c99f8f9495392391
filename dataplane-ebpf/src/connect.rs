//! The socket hooks: a TCP connection's endpoint is chosen when it is opened, at no cost per packet.
//!
//! A hook that would have to drop in silence, or that does not know enough, leaves the address alone: the packet path
//! decides. UDP is served here only where the node calls an address on an interface of its own, which has no packet path.

use crate::event::{self, Call};
use crate::forward::primary;
use crate::maps::{SOCKET_CHOICES, SOCKET_NAMES, SOCKET_PEERS};
use crate::select::{self, Chosen};
use crate::service::{self, Destination, Endpoints, Source};
use crate::{affinity, atomic, count};
use aya_ebpf::bindings::{BPF_ANY, bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use core::ptr;
use dataplane_common::affinity::{AffinityKey, Choice};
use dataplane_common::backend::BackendStatus;
use dataplane_common::drop::Reason;
use dataplane_common::event::{EventKind, Place, What};
use dataplane_common::frontend::FrontendKind;
use dataplane_common::node::Node;
use dataplane_common::service::{Algorithm, Policy};
use dataplane_common::socket::{SocketChoiceKey, SocketName, SocketPeer, SocketPeerKey};
use dataplane_common::{Addr, Port, Protocol, read_word};

const ECONNREFUSED: i32 = 111;

/// Return code of a socket hook that lets the call go on.
pub const PROCEED: i32 = 1;
/// Return code of a socket hook that ends the call with an error.
pub const FAIL: i32 = 0;

/// The address in a socket call's context, in the shape of its family.
pub trait SocketAddress {
    /// The address and port of the context; `None` if they are of no family that is served here.
    fn read(&self) -> (Addr, Port);
    /// Replaces them.
    fn write(&mut self, addr: &Addr, port: Port);
    /// The context.
    fn context(&self) -> *mut bpf_sock_addr;
}

/// The IPv4 hooks.
pub struct Inet4(pub *mut bpf_sock_addr);

/// The IPv6 hooks, which also see IPv4-mapped addresses.
pub struct Inet6(pub *mut bpf_sock_addr);

impl SocketAddress for Inet4 {
    #[inline(always)]
    fn read(&self) -> (Addr, Port) {
        // SAFETY: the context the kernel handed to the program.
        let (ip, port) = unsafe { ((*self.0).user_ip4, (*self.0).user_port) };
        (Addr::from_v4(ip.to_ne_bytes()), context_port(port))
    }

    #[inline(always)]
    fn write(&mut self, addr: &Addr, port: Port) {
        // SAFETY: as above; both fields may be written at these hooks.
        unsafe {
            (&raw mut (*self.0).user_ip4).write_volatile(u32::from_ne_bytes(addr.v4_octets()));
            (&raw mut (*self.0).user_port).write_volatile(u16::from_ne_bytes(port.bytes()) as u32);
        }
    }

    #[inline(always)]
    fn context(&self) -> *mut bpf_sock_addr {
        self.0
    }
}

impl SocketAddress for Inet6 {
    #[inline(always)]
    fn read(&self) -> (Addr, Port) {
        // SAFETY: the context the kernel handed to the program; each word is read as a word, as the verifier asks.
        let (words, port) = unsafe {
            let ip = (&raw const (*self.0).user_ip6).cast::<u32>();
            (
                [
                    ip.read_volatile(),
                    ip.add(1).read_volatile(),
                    ip.add(2).read_volatile(),
                    ip.add(3).read_volatile(),
                ],
                (*self.0).user_port,
            )
        };
        (Addr::from_bytes(bytemuck::cast(words)), context_port(port))
    }

    #[inline(always)]
    fn write(&mut self, addr: &Addr, port: Port) {
        let [a, b, c, d]: [u32; 4] = bytemuck::cast(*addr.bytes());
        // SAFETY: as above; both fields may be written at these hooks.
        unsafe {
            let ip = (&raw mut (*self.0).user_ip6).cast::<u32>();
            ip.write_volatile(a);
            ip.add(1).write_volatile(b);
            ip.add(2).write_volatile(c);
            ip.add(3).write_volatile(d);
            (&raw mut (*self.0).user_port).write_volatile(u16::from_ne_bytes(port.bytes()) as u32);
        }
    }

    #[inline(always)]
    fn context(&self) -> *mut bpf_sock_addr {
        self.0
    }
}

/// The two bytes of `user_port`, which lie in network order in its first half.
#[inline(always)]
fn context_port(port: u32) -> Port {
    Port::from_bytes((port as u16).to_ne_bytes())
}

/// A call of `connect(2)`.
#[inline(always)]
pub fn connect<S: SocketAddress>(mut socket: S) -> i32 {
    let proto = protocol(&socket);
    let (addr, port) = socket.read();
    forget(&socket);
    let Some(source) = source(&socket, proto) else { return PROCEED };
    let Ok(Some(destination)) = service::lookup(&addr, port, proto) else {
        return closed(&socket, &addr, proto, source);
    };
    if !serves(proto, &addr, destination, source) {
        return PROCEED;
    }
    let Ok(policy) = service::policy(destination.service) else { return PROCEED };
    if !admits(&addr, destination, source, policy) || tries_again(&addr, proto, policy) {
        return PROCEED;
    }
    let endpoints = match service::endpoints(destination, source, policy) {
        Ok(endpoints) => endpoints,
        Err(Reason::NoEndpoints) if proto == Protocol::Tcp as u8 => {
            return refuse(&socket, source, Reason::NoEndpoints);
        }
        Err(_) => return PROCEED,
    };
    let Ok(Some(chosen)) = choose(&socket, &addr, destination, source, policy, endpoints) else {
        return PROCEED;
    };
    translate(&mut socket, destination, source, &chosen, proto, true)
}

/// A call of `sendmsg(2)` or `sendto(2)` that names a destination, on a UDP socket.
#[inline(always)]
pub fn send<S: SocketAddress>(mut socket: S) -> i32 {
    let proto = Protocol::Udp as u8;
    let Some(source) = source(&socket, proto) else { return PROCEED };
    let (addr, port) = socket.read();
    let Ok(Some(destination)) = service::lookup(&addr, port, proto) else { return PROCEED };
    if !serves(proto, &addr, destination, source) {
        return PROCEED;
    }
    let key = SocketChoiceKey::new(cookie(&socket), destination.service);
    // SAFETY: an element of a map, valid until the program ends.
    let kept = SOCKET_CHOICES.get_ptr(&key).and_then(|choice| still_serves(unsafe { read_word(choice) }));
    let (chosen, new) = match kept {
        Some(chosen) => (chosen, false),
        None => {
            let Ok(policy) = service::policy(destination.service) else { return PROCEED };
            if !admits(&addr, destination, source, policy) {
                return PROCEED;
            }
            let Ok(endpoints) = service::endpoints(destination, source, policy) else { return PROCEED };
            let Ok(Some(chosen)) = choose(&socket, &addr, destination, source, policy, endpoints) else {
                return PROCEED;
            };
            let _ = SOCKET_CHOICES.insert(&key, &chosen.choice(), BPF_ANY as u64);
            (chosen, true)
        }
    };
    translate(&mut socket, destination, source, &chosen, proto, new)
}

/// What `getpeername(2)` gives back, and `accept(2)`, which asks for the client's name: the address that the program
/// called, not the endpoint's.
#[inline(always)]
pub fn name<S: SocketAddress>(mut socket: S) -> i32 {
    if protocol(&socket) != Protocol::Tcp as u8 {
        return receive(socket);
    }
    // SAFETY: the context's socket; the value is the socket's own.
    if let Some(name) = unsafe { SOCKET_NAMES.get_ptr_mut(&storage(&socket)).as_ref() }
        && name.port != Port::ANY
    {
        socket.write(&name.addr, name.port);
    }
    PROCEED
}

/// What `recvmsg(2)` gives back: the address that the program called, not the endpoint's.
#[inline(always)]
pub fn receive<S: SocketAddress>(mut socket: S) -> i32 {
    let proto = Protocol::Udp as u8;
    if source(&socket, proto).is_none() {
        return PROCEED;
    }
    let (addr, port) = socket.read();
    let key = SocketPeerKey::new(cookie(&socket), addr, port, proto);
    // SAFETY: written once per socket and endpoint; the same socket does not race itself to another frontend.
    if let Some(peer) = unsafe { SOCKET_PEERS.get(&key) } {
        let (addr, port) = (peer.addr, peer.port);
        socket.write(&addr, port);
    }
    PROCEED
}

/// What the socket speaks.
#[inline(always)]
fn protocol<S: SocketAddress>(socket: &S) -> u8 {
    // SAFETY: the context the kernel handed to the program.
    spoken(unsafe { (*socket.context()).protocol })
}

/// What a socket of this protocol number speaks on the wire; 0 for what no packet can have.
#[inline(always)]
const fn spoken(protocol: u32) -> u8 {
    /// `IPPROTO_MPTCP`, whose subflows are TCP.
    const MPTCP: u32 = 262;
    match protocol {
        MPTCP => Protocol::Tcp as u8,
        0..=0xff => protocol as u8,
        _ => 0,
    }
}

/// Where the socket is; `None` if sockets of this protocol there are left alone: of UDP the node's alone are served.
#[inline(always)]
fn source<S: SocketAddress>(socket: &S, proto: u8) -> Option<Source> {
    let node = service::node()?;
    if netns_cookie(socket) == node.netns_cookie {
        return Some(Source::Node);
    }
    (proto == Protocol::Tcp as u8 && node.has(Node::SOCKET_LB_PODS)).then_some(Source::Pod)
}

/// Whether the hooks serve this call of a socket that has a [`source`]: TCP to any frontend; UDP to an address on an interface of
/// this node, be it a node port's or a Service's.
#[inline(always)]
fn serves(proto: u8, addr: &Addr, destination: Destination, source: Source) -> bool {
    if proto == Protocol::Tcp as u8 {
        // A pod's loopback is its own: node ports on it are the node's only (P18).
        return source == Source::Node || !addr.is_loopback();
    }
    let here = destination.kind == FrontendKind::NodePort || service::node_address(addr).is_some();
    proto == Protocol::Udp as u8 && here
}

/// The endpoint of a new connection (S1, L2); `None` if only its packets tell which.
#[inline(always)]
fn choose<S: SocketAddress>(
    socket: &S,
    addr: &Addr,
    destination: Destination,
    source: Source,
    policy: Policy,
    endpoints: Endpoints,
) -> Result<Option<Chosen>, Reason> {
    let (seconds, service) = (policy.affinity_seconds(), destination.service);
    let Endpoints { set, member, seed } = endpoints;
    let algorithm = set.algorithm().unwrap_or_default();
    let own = match (source, service::node()) {
        // As its packets.
        (Source::Node, Some(node)) => Some(primary(node, addr)),
        (Source::Node | Source::Pod | Source::Outside, _) => None,
    };
    if algorithm == Algorithm::SourceHash && own.is_none() {
        return Ok(None);
    }
    let place = || {
        let number = match (algorithm, own) {
            (Algorithm::SourceHash, Some(client)) => select::of_client(client, seed),
            (Algorithm::RoundRobin, _) => select::turn(service),
            (Algorithm::LeastConnections, _) => {
                return select::lighter(set, select::random(), select::random());
            }
            // A socket has no port yet that could be hashed, and none that anybody has seen before.
            (Algorithm::Random | Algorithm::Maglev | Algorithm::SourceHash, _) => select::random(),
        };
        select::place(set, algorithm, number)
    };
    if seconds == 0 {
        return select::at(set, place()).map(Some);
    }
    let key = match own {
        Some(client) => AffinityKey::address(*client, service),
        None => AffinityKey::namespace(netns_cookie(socket), service),
    };
    affinity::select_for_socket(set, member, place, &key, seconds).map(Some)
}

/// Whether it is certain here that the socket may call this address (S2). Its source address is known only where it calls
/// an address of its own node: the kernel then sends from that address.
#[inline(always)]
fn admits(addr: &Addr, destination: Destination, source: Source, policy: Policy) -> bool {
    if !service::restricts(destination, policy) {
        // Some connections of this client's pod go by packet, where it has an address: all do, so that it is one client.
        return source == Source::Node
            || policy.affinity_seconds() == 0
            || !policy.has(Policy::SOURCE_RANGES);
    }
    let Some(node) = service::node() else { return false };
    if source != Source::Node || service::node_address(addr).is_none() {
        return false;
    }
    service::allows(&destination, if addr.is_loopback() { primary(node, addr) } else { addr })
}

/// Whether a second try was asked for, which only packets can have (L6): what the socket is connected to it stays connected to.
#[inline(always)]
fn tries_again(addr: &Addr, proto: u8, policy: Policy) -> bool {
    proto == Protocol::Tcp as u8 && policy.has(Policy::BY_PACKET) && service::node_address(addr).is_none()
}

/// A ClusterIP on a port that no Service has (P13).
#[inline(always)]
fn closed<S: SocketAddress>(socket: &S, addr: &Addr, proto: u8, source: Source) -> i32 {
    if proto == Protocol::Tcp as u8 && service::is_closed(addr) {
        return refuse(socket, source, Reason::ClosedPort);
    }
    PROCEED
}

#[inline(always)]
fn refuse<S: SocketAddress>(socket: &S, source: Source, reason: Reason) -> i32 {
    count::reason(reason);
    let (addr, port) = socket.read();
    let (src, proto) = (told_source(&addr, source), Protocol::Tcp as u8);
    let call =
        Call { src, addr, port, proto, dst: Addr::UNSPECIFIED, dst_port: Port::ANY, service: 0, backend: 0 };
    event::tell_call(&call, What::because(EventKind::Refused, reason).at(Place::Connect));
    // SAFETY: a helper without pointers.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    FAIL
}

/// The address that a caller is told to have: that of the node, whichever it will get; nobody knows a pod's yet.
#[inline(always)]
fn told_source(addr: &Addr, source: Source) -> Addr {
    match (source, service::node()) {
        (Source::Node, Some(node)) => *primary(node, addr),
        (Source::Node | Source::Pod | Source::Outside, _) => Addr::UNSPECIFIED,
    }
}

/// The backend a socket keeps, if it still serves (C1).
#[inline(always)]
fn still_serves(choice: Choice) -> Option<Chosen> {
    let chosen = select::backend(choice.backend)?;
    let serves = chosen.status.generation() == choice.generation && chosen.status.has(BackendStatus::SERVING);
    serves.then_some(chosen)
}

/// Sends the socket to the endpoint and remembers what the program called.
#[inline(always)]
fn translate<S: SocketAddress>(
    socket: &mut S,
    destination: Destination,
    source: Source,
    chosen: &Chosen,
    proto: u8,
    new: bool,
) -> i32 {
    let (addr, port) = socket.read();
    let is_tcp = proto == Protocol::Tcp as u8;
    if new {
        // A UDP socket has no name of its own: it can call several.
        let mut name = SocketName::new(addr, if is_tcp { port } else { Port::ANY });
        // SAFETY: the context's socket; the value is the socket's own.
        unsafe {
            let kept = SOCKET_NAMES.get_or_insert_ptr_mut(&storage(socket), Some(&mut name));
            if !kept.is_null() {
                ((*kept).addr, (*kept).port) = (name.addr, name.port);
                recount(&raw mut (*kept).counted, Some(chosen.choice()));
            }
        }
        count::new_flow(destination.service, chosen.id);
    }
    if !is_tcp {
        let generation = chosen.status.generation();
        let key = SocketPeerKey::new(cookie(socket), chosen.addr, chosen.port, proto);
        // An answer comes from the address that was called last: one socket can call several, and what it called is forgotten first
        // where there is no room.
        // SAFETY: written by this socket's own calls, which do not race each other to different frontends.
        let known =
            unsafe { SOCKET_PEERS.get(&key) }.is_some_and(|peer| (peer.addr, peer.port) == (addr, port));
        if new || !known {
            let peer = SocketPeer::new(addr, port, destination.service, chosen.id, generation);
            let _ = SOCKET_PEERS.insert(&key, &peer, BPF_ANY as u64);
        }
    }
    if new {
        let (src, service, backend) = (told_source(&addr, source), destination.service, chosen.id);
        let call = Call { src, addr, port, proto, dst: chosen.addr, dst_port: chosen.port, service, backend };
        let place = if proto == Protocol::Udp as u8 { Place::Sendmsg } else { Place::Connect };
        event::tell_call(&call, What::of(EventKind::Begun).at(place));
    }
    socket.write(&chosen.addr, chosen.port);
    PROCEED
}

/// The socket is about to be connected: what it was connected to is no matter any more.
#[inline(always)]
fn forget<S: SocketAddress>(socket: &S) {
    // SAFETY: the context's socket; the value is the socket's own.
    if let Some(name) = unsafe { SOCKET_NAMES.get_ptr_mut(&storage(socket)).as_mut() } {
        name.port = Port::ANY;
        // SAFETY: a word of a socket's storage.
        unsafe { recount(&raw mut name.counted, None) };
    }
}

/// A socket is closed: nobody is connected by it any more.
#[inline(always)]
pub fn release(socket: *mut bpf_sock) {
    // SAFETY: the context the kernel handed to the program; the value is the socket's own.
    unsafe {
        let map = (&raw const SOCKET_NAMES).cast_mut().cast();
        let name: *mut SocketName = bpf_sk_storage_get(map, socket.cast(), ptr::null_mut(), 0).cast();
        if !name.is_null() {
            recount(&raw mut (*name).counted, None);
        }
    }
}

/// Another backend counts a socket among what is open, or none: the one that did no longer does.
///
/// # Safety
/// `counted` must be that word of a socket's storage.
#[inline(always)]
unsafe fn recount(counted: *mut Choice, by: Option<Choice>) {
    let word = bytemuck::must_cast(by.unwrap_or_default());
    // SAFETY: the caller promises it. Whoever takes a choice away counts it off, so it is done once.
    let before: Choice = bytemuck::must_cast(unsafe { atomic::swap(counted.cast(), word) });
    if before.generation != 0 {
        count::ended(before.backend, before.generation);
    }
    if let Some(choice) = by {
        count::begun(choice.backend);
    }
}

/// The context, as the storage of sockets wants it.
#[inline(always)]
fn storage<S: SocketAddress>(socket: &S) -> SockAddrContext {
    SockAddrContext::new(socket.context())
}

#[inline(always)]
fn netns_cookie<S: SocketAddress>(socket: &S) -> u64 {
    // SAFETY: the context the kernel handed to the program.
    unsafe { bpf_get_netns_cookie(socket.context().cast()) }
}

#[inline(always)]
fn cookie<S: SocketAddress>(socket: &S) -> u64 {
    // SAFETY: the context the kernel handed to the program.
    unsafe { bpf_get_socket_cookie(socket.context().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_of_mptcp_speaks_tcp() {
        assert_eq!([6, 17, 132, 262, 256 + 17].map(spoken), [6, 17, 132, 6, 0]);
    }
}
