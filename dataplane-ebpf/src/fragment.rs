//! Fragments (P20): the first of a datagram has the ports, those that follow find them here.

use crate::flow;
use crate::maps::FRAGMENTS;
use crate::parse::Packet;
use aya_ebpf::bindings::BPF_ANY;
use dataplane_common::fragment::{FragmentKey, FragmentPorts};
use dataplane_common::read_word;

/// Remembers the ports of a first fragment.
#[inline(always)]
pub fn note(packet: &Packet) {
    let ports = FragmentPorts::new(packet.src_port, packet.dst_port, packet.proto, flow::now());
    // Where there is no room those that follow are early ones.
    let _ = FRAGMENTS.insert(&key(packet), &ports, BPF_ANY as u64);
}

/// Forgets what an earlier datagram with the key of this fragment left.
#[inline(always)]
pub fn forget(packet: &Packet) {
    let _ = FRAGMENTS.remove(&key(packet));
}

/// The ports of the datagram that `packet` is a fragment of; `None` if its first fragment was not seen.
#[inline(always)]
pub fn lookup(packet: &Packet) -> Option<FragmentPorts> {
    // SAFETY: an element of a map, valid until the program ends.
    let ports = unsafe { read_word(FRAGMENTS.get_ptr(&key(packet))?) };
    ports.is_fresh(flow::now()).then_some(ports)
}

#[inline(always)]
fn key(packet: &Packet) -> FragmentKey {
    let proto = if packet.is_v4() { packet.proto } else { 0 };
    FragmentKey::new(packet.src, packet.dst, packet.fragment_id, proto)
}
