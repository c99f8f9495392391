//! The packets by which flows began, kept as their clients sent them until they are answered: what refuses one is turned into it again
//! (L5). Each has the place that the turn of its flow leads to; a later flow's takes its place, and the earlier then stays where it is.

use crate::frame::Frame;
use crate::maps::KEPT;
use crate::parse::Packet;
use core::sync::atomic::{Ordering, compiler_fence};
use dataplane_common::kept::Kept;
use dataplane_common::tables::{self, Table as _};

/// What leads from a turn to a place.
const PLACE: u32 = tables::Kept::CAPACITY as u32 - 1;
const _: () = assert!(tables::Kept::CAPACITY.is_power_of_two());

/// Keeps the headers of a packet of TCP or UDP that has neither options of IP nor extension headers, before anything is written to it.
/// `sent`: the node itself has sent it.
#[inline(never)]
pub fn keep<F: Frame>(frame: &mut F, packet: &Packet, turn: u32, sent: bool) {
    const WORDS: usize = size_of::<Kept>() / size_of::<u64>();
    // What is tagged would come again without its tag.
    if turn == 0 || frame.is_tagged(packet.l3()) {
        return;
    }
    let Some(kept) = KEPT.get_ptr_mut(turn & PLACE) else { return };
    let (destination, source) = (frame.link_destination(), frame.link_source());
    // SAFETY: an element of an array, which stays, and is aligned as its words are.
    unsafe {
        let mut at = 0;
        while at < WORDS {
            kept.cast::<u64>().add(at).write_volatile(0);
            at += 1;
        }
        let length = packet.plain_headers();
        if frame.copy(packet.l3(), length, (&raw mut (*kept).packet).cast()).is_err() {
            return;
        }
        (*kept).length = length as u16;
        (*kept).ifindex = frame.ifindex();
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (destination, source);
        (*kept).link = [a, b, c, d, e, f, g, h, i, j, k, l];
        (*kept).sent = sent as u8;
        compiler_fence(Ordering::SeqCst);
        (&raw mut (*kept).turn).write_volatile(turn);
    }
}

/// Copies what was kept in this turn; false if it is not there any more.
#[inline(always)]
pub fn recall(turn: u32, kept: &mut Kept) -> bool {
    const WORDS: usize = size_of::<Kept>() / size_of::<u64>();
    let Some(entry) = KEPT.get_ptr(turn & PLACE) else { return false };
    let to: *mut u64 = (&raw mut *kept).cast();
    let mut at = 0;
    while at < WORDS {
        // SAFETY: an element of an array, which stays; both are aligned as their words are.
        unsafe { to.add(at).write_volatile(entry.cast::<u64>().add(at).read_volatile()) };
        at += 1;
    }
    compiler_fence(Ordering::SeqCst);
    // SAFETY: as above.
    turn != 0 && kept.turn == turn && unsafe { (&raw const (*entry).turn).read_volatile() } == turn
}

/// Notes why the flow of this turn is about to get another endpoint.
#[inline(always)]
pub fn note_refused(turn: u32, reason: u8) {
    if let Some(kept) = KEPT.get_ptr_mut(turn & PLACE) {
        // SAFETY: an element of an array, which stays; one byte.
        unsafe { (&raw mut (*kept).refused).write_volatile(reason) };
    }
}

/// Why the flow of this turn is about to get another endpoint; 0: it is not.
#[inline(always)]
pub fn refused(turn: u32) -> u8 {
    let Some(kept) = KEPT.get_ptr(turn & PLACE) else { return 0 };
    // SAFETY: an element of an array, which stays; single fields.
    unsafe {
        let (of, refused) =
            ((&raw const (*kept).turn).read_volatile(), (&raw const (*kept).refused).read_volatile());
        if of == turn { refused } else { 0 }
    }
}
