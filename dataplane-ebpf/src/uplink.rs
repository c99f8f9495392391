//! The link-layer addresses of uplinks, learnt from what the node itself sends.

use crate::maps::UPLINKS;
use aya_ebpf::bindings::BPF_ANY;
use dataplane_common::read_word;
use dataplane_common::uplink::Uplink;

/// The address of the uplink with this index; all zero if it has none, or none is known.
#[inline(always)]
pub fn mac(ifindex: u32) -> [u8; 6] {
    lookup(ifindex).unwrap_or_default().mac()
}

/// Enters the address of an uplink, if it is news.
#[inline(always)]
pub fn note(ifindex: u32, address: [u8; 6]) {
    let uplink = Uplink::new(address);
    if lookup(ifindex) != Some(uplink) {
        // If there is no room, replies that come in elsewhere are lost, as they are without the entry.
        let _ = UPLINKS.insert(&ifindex, &uplink, BPF_ANY as u64);
    }
}

#[inline(always)]
fn lookup(ifindex: u32) -> Option<Uplink> {
    // SAFETY: an element of a map, valid until the program ends.
    UPLINKS.get_ptr(&ifindex).map(|uplink| unsafe { read_word(uplink) })
}
