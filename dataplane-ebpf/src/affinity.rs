//! Session affinity: a client comes back to the endpoint it had, as long as that is one of those it may have (S1).
//!
//! Who has had a connection is remembered in `affinity`. What a packet alone says of its source anybody can say: the endpoint of a
//! client of which no connection is complete is in `affinity_new`, so that a flood of forged ones makes nobody else forget.

use crate::clock::{SECOND, nanoseconds};
use crate::forward::primary;
use crate::maps::{AFFINITIES, NEWCOMERS};
use crate::select::{self, Chosen};
use crate::service;
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use dataplane_common::affinity::{Affinity, AffinityKey, Choice};
use dataplane_common::drop::Reason;
use dataplane_common::flow::{Flow, FlowKey};
use dataplane_common::read_word;
use dataplane_common::service::EndpointSet;

/// No backend's id.
const NONE: u32 = 0;

/// The endpoint of a new flow: the client's own if it had one within so many seconds and the set still holds it, else the one in the
/// slot that `place` tells, which is the client's from now on. `member`: the flag of those that the set holds.
///
/// # Errors
/// As [`select::at`].
#[inline(always)]
pub fn select(
    set: EndpointSet,
    member: u32,
    place: impl FnOnce() -> u32,
    key: &AffinityKey,
    seconds: u32,
) -> Result<Chosen, Reason> {
    let recalled = recall(key, member, seconds);
    if recalled != NONE {
        return select::backend(recalled).ok_or(Reason::CorruptTable);
    }
    let chosen = select::at(set, place())?;
    let choice = chosen.choice();
    if remember(key, choice, BPF_NOEXIST as u64) {
        return Ok(chosen);
    }
    // What is there is stale, or another processor was quicker with a flow of the same client.
    let recalled = recall(key, member, seconds);
    if recalled != NONE {
        return select::backend(recalled).ok_or(Reason::CorruptTable);
    }
    remember(key, choice, BPF_ANY as u64);
    Ok(chosen)
}

/// The endpoint of a connection that a socket makes, which nobody forges.
///
/// # Errors
/// As [`select::at`].
#[inline(always)]
pub fn select_for_socket(
    set: EndpointSet,
    member: u32,
    place: impl FnOnce() -> u32,
    key: &AffinityKey,
    seconds: u32,
) -> Result<Chosen, Reason> {
    let chosen = select(set, member, place, key, seconds)?;
    keep(key, chosen.choice());
    Ok(chosen)
}

/// The endpoint in a slot, for a connection whose endpoint is silent (L5). It is the client's as that of a client of which no connection is
/// complete: what was there before goes when this one is, so that nobody who speaks in the client's place can take it away.
///
/// # Errors
/// As [`select::at`].
#[inline(always)]
pub fn another(set: EndpointSet, place: u32, key: &AffinityKey) -> Result<Chosen, Reason> {
    let chosen = select::at(set, place)?;
    let _ = NEWCOMERS.insert(
        key,
        &Affinity { choice: chosen.choice(), last_used: nanoseconds() },
        BPF_ANY as u64,
    );
    Ok(chosen)
}

/// The id of the backend that the client had last, if that was within so many seconds and the set holds it; else
/// [`NONE`]. Being asked counts as use.
#[inline(always)]
fn recall(key: &AffinityKey, member: u32, seconds: u32) -> u32 {
    if let Some(entry) = AFFINITIES.get_ptr_mut(key) {
        // SAFETY: an element of the map.
        let recalled = unsafe { valid(entry, member, key.service(), seconds) };
        if recalled != NONE {
            return recalled;
        }
    }
    match NEWCOMERS.get_ptr_mut(key) {
        // SAFETY: as above.
        Some(entry) => unsafe { valid(entry, member, key.service(), seconds) },
        None => NONE,
    }
}

/// The id of the backend that an entry names, as [`recall`] asks for it of the service port `of`.
///
/// # Safety
/// `entry` must be an element of a map, valid until the program ends.
#[inline(never)]
unsafe fn valid(entry: *mut Affinity, member: u32, of: u32, seconds: u32) -> u32 {
    // SAFETY: the caller promises it; each word is read and written whole. If the element is used anew meanwhile, the words are of two
    // clients: their backends are asked all the same.
    let (choice, last_used): (Choice, u64) =
        unsafe { (read_word(&raw const (*entry).choice), read_word(&raw const (*entry).last_used)) };
    let now = nanoseconds();
    if now.saturating_sub(last_used) > seconds as u64 * SECOND {
        return NONE;
    }
    let (status, service) = select::owner(choice.backend);
    if status.generation() != choice.generation || !status.has(member) || service != of {
        return NONE;
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*entry).last_used).write_volatile(now) };
    choice.backend
}

/// Enters what was chosen of a client that has no endpoint; what it had is no longer valid. False if `flags` forbid it.
#[inline(never)]
fn remember(key: &AffinityKey, choice: Choice, flags: u64) -> bool {
    let _ = AFFINITIES.remove(key);
    NEWCOMERS.insert(key, &Affinity { choice, last_used: nanoseconds() }, flags).is_ok()
}

/// A flow of a client with affinity is established: its endpoint is remembered whatever others send in the client's place. `key` is that
/// of the half that `flow` is.
#[inline(never)]
pub fn proved(key: &FlowKey, flow: &Flow) {
    let client = if flow.has(Flow::REPLY) { &flow.dst } else { &key.src };
    let client = match service::node() {
        Some(node) if flow.has(Flow::NODE_CLIENT) => primary(node, client),
        Some(_) | None => client,
    };
    let choice = Choice { backend: flow.backend, generation: flow.generation };
    keep(&AffinityKey::address(*client, flow.service), choice);
}

/// Has the client keep the endpoint that it is known to have, if it is this one. Where the flood was faster, nothing is known.
#[inline(always)]
fn keep(key: &AffinityKey, choice: Choice) {
    let (last_used, flags) = match NEWCOMERS.get_ptr(key) {
        // SAFETY: an element of a map, valid until the program ends; each word is read whole.
        Some(entry) => unsafe {
            // It has begun anew meanwhile, and has another.
            if read_word(&raw const (*entry).choice) != choice {
                return;
            }
            (read_word(&raw const (*entry).last_used), BPF_ANY)
        },
        None => (nanoseconds(), BPF_NOEXIST),
    };
    let _ = AFFINITIES.insert(key, &Affinity { choice, last_used }, flags as u64);
    let _ = NEWCOMERS.remove(key);
}
