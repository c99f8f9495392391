//! What answers others (P12, P22): connections of this node that are of no flow and that go to an endpoint, or whose port is the number
//! of a node port. Such a port has whoever bound it, and a pod's connection whose source somebody masquerades to it. Conntrack knows both; the programs
//! note what leaves, and ask for the node's TCP sockets.

use crate::clock::{SECOND, nanoseconds};
use crate::forward::words;
use crate::frame::Frame;
use crate::maps::{FLOWS, OUTGOINGS};
use crate::parse::{Obstacle, Packet};
use crate::service;
use aya_ebpf::bindings::{BPF_ANY, bpf_sock_tuple};
use aya_ebpf::helpers::{bpf_sk_release, bpf_skc_lookup_tcp};
use dataplane_common::flow::FlowKey;
use dataplane_common::{Protocol, read_word};

/// How long a datagram that left is answered: as long as conntrack knows a stream of UDP that pauses
/// (`nf_conntrack_udp_timeout_stream`).
const UDP_ANSWERED_WITHIN: u64 = 120 * SECOND;

/// `BPF_F_CURRENT_NETNS`: the network namespace of the packet's interface.
const CURRENT_NETNS: u64 = u64::MAX;

/// State of a socket that waits for connections (`TCP_LISTEN`).
const LISTEN: u32 = 10;

/// Notes a packet with this five-tuple that leaves from the number of a node port or to an endpoint, if it is the node's and of no flow.
#[inline(never)]
pub fn note(packet: &Packet, key: &FlowKey) {
    // A reset ends what it answers, and of SCTP only what opens an association begins a flow.
    let connects = packet.obstacle == Obstacle::None && packet.proto != Protocol::Sctp as u8;
    if !connects || packet.resets() || service::node_address(&packet.src).is_none() {
        return;
    }
    let answer = key.reversed();
    // What was translated at ingress passes here on its way out: it answers a flow's client, or is one's.
    if FLOWS.get_ptr(&answer).is_some() {
        return;
    }
    let now = nanoseconds();
    match OUTGOINGS.get_ptr_mut(&answer) {
        // SAFETY: an element of a map, valid until the program ends; one aligned word.
        Some(last) => unsafe { last.write_volatile(now) },
        // Where there is no room the oldest goes.
        None => drop(OUTGOINGS.insert(&answer, &now, BPF_ANY as u64)),
    }
}

/// Whether a packet with this five-tuple answers what was noted.
#[inline(never)]
pub fn is_answered_by(key: &FlowKey) -> bool {
    let Some(last) = OUTGOINGS.get_ptr(key) else { return false };
    // SAFETY: an element of a map, valid until the program ends.
    let last = unsafe { read_word(last) };
    // A TCP connection says when it ends, and may rest for days.
    key.proto() == Protocol::Tcp as u8 || nanoseconds().saturating_sub(last) <= UDP_ANSWERED_WITHIN
}

/// Whether a TCP socket of the node has the connection that a packet belongs to.
#[inline(never)]
pub fn has_socket<F: Frame>(frame: &F, packet: &Packet) -> bool {
    let (ports, [s0, s1, s2, s3]) = (packet.ports(), words(&packet.src));
    let [d0, d1, d2, d3] = words(&packet.dst);
    // In the order of `struct bpf_sock_tuple`: addresses, then ports.
    let (mut tuple, length) = if packet.is_v4() {
        ([s0, d0, ports, 0, 0, 0, 0, 0, 0], V4_TUPLE)
    } else {
        ([s0, s1, s2, s3, d0, d1, d2, d3, ports], V6_TUPLE)
    };
    // SAFETY: context and tuple are valid for the whole call; what is found is read while it is held, and given back.
    unsafe {
        let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
        let Some(socket) = bpf_skc_lookup_tcp(frame.context(), tuple, length, CURRENT_NETNS, 0).as_ref()
        else {
            return false;
        };
        let state = (&raw const socket.state).read_volatile();
        bpf_sk_release((&raw const *socket).cast_mut().cast());
        state != LISTEN
    }
}

/// Bytes of an IPv4 tuple, and of an IPv6 one.
const V4_TUPLE: u32 = 12;
const V6_TUPLE: u32 = 36;
