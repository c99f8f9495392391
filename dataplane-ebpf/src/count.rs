//! Counters. A missing one never changes what becomes of a packet.
//!
//! Packets are counted in the half of the flow that they are of, by one atomic addition. From there they come to the totals of Service
//! and endpoint: when the agent sweeps the flows, when a flow goes, and when its word is full.

use crate::atomic;
use crate::global::global;
use crate::maps::{BACKEND_TRAFFIC, FLOWS, OPEN, REASONS, SERVICE_TRAFFIC, SERVICE_TRIES};
use crate::repeat::{Step, Steps, repeat};
use crate::select;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_skb_load_bytes;
use bytemuck::Zeroable as _;
use core::mem::offset_of;
use dataplane_common::counter::{Open, Traffic};
use dataplane_common::drop::Reason;
use dataplane_common::flow::{Counted, Flow, FlowKey};
use dataplane_common::read_word;

/// Counts one occurrence of a reason.
#[inline(always)]
pub fn reason(reason: Reason) {
    numbered(reason as u32);
}

/// The same of the reason with this number.
#[inline(always)]
fn numbered(reason: u32) {
    if let Some(count) = REASONS.get_ptr_mut(reason) {
        // SAFETY: an element of this CPU alone; programs at this hook do not interrupt each other.
        unsafe { *count += 1 };
    }
}

global! {
    /// Counts a flow that gets another endpoint for the reason with this number (L5).
    pub fn moved as count_moved(; service: u32, number: u32) {
        numbered(number);
        let Some(tries) = SERVICE_TRIES.get_ptr_mut(&service) else { return };
        // SAFETY: an element of a map, valid until the program ends; an aligned word.
        unsafe {
            let word = if number == Reason::MovedRefused as u32 {
                &raw mut (*tries).refused
            } else if number == Reason::MovedUnreachable as u32 {
                &raw mut (*tries).unreachable
            } else if number == Reason::MovedUdp as u32 {
                &raw mut (*tries).udp
            } else {
                &raw mut (*tries).silent
            };
            atomic::add(word, 1);
        }
    }
}

global! {
    /// Counts a flow that was answered by another endpoint than its first (L5).
    pub fn rescued as count_rescued(; service: u32) {
        reason(Reason::Rescued);
        if let Some(tries) = SERVICE_TRIES.get_ptr_mut(&service) {
            // SAFETY: as above.
            unsafe { atomic::add(&raw mut (*tries).rescued, 1) };
        }
    }
}

/// Counts a packet of `bytes` bytes (network header on) in its half of a flow.
///
/// # Safety
/// `entry` must be an element of `flows`.
#[inline(always)]
pub unsafe fn packet(entry: *mut Flow, bytes: u32) {
    // SAFETY: the caller promises it; an aligned word of an element, which is valid until the program ends.
    unsafe {
        let before = atomic::fetch_add((&raw mut (*entry).counted).cast(), Counted::packet(bytes).word());
        if Counted::from_word(before).is_full() {
            fold(entry);
        }
    }
}

/// Adds what was counted in a half of a flow to the totals. Whoever takes it adds it, so it comes there once.
///
/// # Safety
/// As [`packet`].
#[inline(always)]
pub unsafe fn fold(entry: *mut Flow) {
    // SAFETY: the caller promises it.
    unsafe { count_fold(entry) };
}

/// [`fold`] as a global function ([`crate::global`]), of a pointer: other CPUs change the element.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn count_fold(entry: *mut Flow) -> u32 {
    if entry.is_null() {
        return 0;
    }
    // SAFETY: an element of a map; totals are elements of arrays, which stay.
    unsafe {
        let counted = Counted::from_word(atomic::swap((&raw mut (*entry).counted).cast(), 0));
        if counted.is_zero() {
            return 0;
        }
        // The word whose upper half the packets are.
        let packets = (&raw mut (*entry).service).cast();
        atomic::add(packets, counted.packets() << u32::BITS);
        atomic::add(&raw mut (*entry).bytes, counted.bytes());
        let flow = &*entry;
        // Without a branch: the verifier walks each way through here at each place where a flow may go.
        let direction = flow.has(Flow::REPLY) as usize * DIRECTION;
        if let Some(total) = SERVICE_TRAFFIC.get_ptr_mut(flow.service) {
            add(total, direction, counted);
        }
        if select::status(flow.backend).generation() == flow.generation
            && let Some(total) = BACKEND_TRAFFIC.get_ptr_mut(flow.backend)
        {
            add(total, direction, counted);
        }
    }
    0
}

/// Bytes from what clients sent in a total to what endpoints sent.
const DIRECTION: usize = offset_of!(Traffic, packets_out);
const _: () = assert!(offset_of!(Traffic, packets_in) == 0 && offset_of!(Traffic, bytes_in) == 8);
const _: () = assert!(offset_of!(Traffic, bytes_out) == DIRECTION + 8);

/// Adds to the packets and bytes of a total that are so many bytes behind its beginning.
///
/// # Safety
/// `total` must be an element of an array of totals, and `direction` 0 or [`DIRECTION`].
#[inline(always)]
unsafe fn add(total: *mut Traffic, direction: usize, counted: Counted) {
    // SAFETY: the caller promises it.
    unsafe {
        let packets: *mut u64 = total.byte_add(direction).cast();
        atomic::add(packets, counted.packets());
        atomic::add(packets.add(1), counted.bytes());
    }
}

/// Counts a new flow.
#[inline(always)]
pub fn new_flow(service: u32, backend: u32) {
    if let Some(total) = SERVICE_TRAFFIC.get_ptr_mut(service) {
        // SAFETY: an element of an array, which stays; an aligned word.
        unsafe { atomic::add(&raw mut (*total).new_flows, 1) };
    }
    if let Some(total) = BACKEND_TRAFFIC.get_ptr_mut(backend) {
        // SAFETY: as above.
        unsafe { atomic::add(&raw mut (*total).new_flows, 1) };
    }
}

/// Counts a flow or a connected socket that began among what is open of its backend.
#[inline(always)]
pub fn begun(backend: u32) {
    if let Some(open) = OPEN.get_ptr_mut(backend) {
        // SAFETY: an element of an array, which stays; one aligned word.
        unsafe { atomic::add(open.cast(), Open::BEGUN) };
    }
}

/// Counts one off that ended, unless its backend is gone and its id another's: with that its count began at zero.
#[inline(always)]
pub fn ended(backend: u32, generation: u32) {
    if select::status(backend).generation() == generation
        && let Some(open) = OPEN.get_ptr_mut(backend)
    {
        // SAFETY: an element of an array, which stays; one aligned word.
        unsafe { atomic::add(open.cast(), Open::ENDED) };
    }
}

/// Counts a flow off that is over or about to be removed. Whoever takes the flag away does it, so it is done once; only the client's half
/// has it.
///
/// # Safety
/// As [`packet`].
#[inline(always)]
pub unsafe fn close(entry: *mut Flow) {
    const COUNTED: u64 = Flow::in_first_word(Flow::COUNTED_OPEN);
    // SAFETY: the caller promises it; a flow is aligned as a word is, and its flags lie in the first.
    unsafe {
        if !(*entry).has(Flow::COUNTED_OPEN) || atomic::fetch_clear(entry.cast(), COUNTED) & COUNTED == 0 {
            return;
        }
        ended((*entry).backend, (*entry).generation);
    }
}

/// How many open connections the backend with an id has.
#[inline(always)]
pub fn open(backend: u32) -> u32 {
    // SAFETY: an element of an array, which stays; one aligned word.
    OPEN.get_ptr(backend).map_or(0, |open| unsafe { read_word::<Open>(open) }.count())
}

/// How many keys the agent names at once: the kernel lets a test packet have as many bytes as fit into a page beside its own.
const NAMED: u32 = 64;

/// Adds to the totals what was counted in the halves of flows whose keys a test packet of the agent is made of; with `END` the flows are
/// about to be removed, and counted off as well.
#[inline(always)]
pub fn fold_named<const END: bool>(packet: *mut __sk_buff) {
    repeat(NAMED, &mut Folding::<END> { packet });
}

/// The way through such a packet.
struct Folding<const END: bool> {
    packet: *mut __sk_buff,
}

impl<const END: bool> Steps for Folding<END> {
    fn step(&mut self, index: u32) -> Step {
        let mut key = FlowKey::zeroed();
        let at = index * size_of::<FlowKey>() as u32;
        // SAFETY: the packet is the program's context; the key is as long as what is read.
        let read = unsafe {
            bpf_skb_load_bytes(self.packet.cast(), at, (&raw mut key).cast(), size_of::<FlowKey>() as u32)
        };
        if read != 0 {
            return Step::Done;
        }
        if let Some(entry) = FLOWS.get_ptr_mut(&key) {
            // SAFETY: an element of the map.
            unsafe {
                fold(entry);
                if END {
                    close(entry);
                }
            }
        }
        Step::Next
    }
}
