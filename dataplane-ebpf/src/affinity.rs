//! Session affinity: a client comes back to the endpoint it had, as long as that is one of those it may have (S1).

use crate::clock::{SECOND, nanoseconds};
use crate::maps::AFFINITIES;
use crate::select::{self, Chosen};
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use dataplane_common::affinity::{Affinity, AffinityKey, Choice};
use dataplane_common::drop::Reason;
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
    if remember(key, &chosen, BPF_NOEXIST as u64) {
        return Ok(chosen);
    }
    // What is there is stale, or another processor was quicker with a flow of the same client.
    let recalled = recall(key, member, seconds);
    if recalled != NONE {
        return select::backend(recalled).ok_or(Reason::CorruptTable);
    }
    remember(key, &chosen, BPF_ANY as u64);
    Ok(chosen)
}

/// The client has no endpoint of its own any more.
#[inline(always)]
pub fn forget(key: &AffinityKey) {
    let _ = AFFINITIES.remove(key);
}

/// The id of the backend that the client had last, if that was within so many seconds and the set holds it; else
/// [`NONE`]. Being asked counts as use.
#[inline(never)]
fn recall(key: &AffinityKey, member: u32, seconds: u32) -> u32 {
    let Some(entry) = AFFINITIES.get_ptr_mut(key) else { return NONE };
    // SAFETY: an element of a map, valid until the program ends; each word is read and written whole. If the element is
    // used anew meanwhile, the words are of two clients: their backends are asked all the same.
    let (choice, last_used): (Choice, u64) =
        unsafe { (read_word(&raw const (*entry).choice), read_word(&raw const (*entry).last_used)) };
    let now = nanoseconds();
    if now.saturating_sub(last_used) > seconds as u64 * SECOND {
        return NONE;
    }
    let (status, service) = select::owner(choice.backend);
    if status.generation() != choice.generation || !status.has(member) || service != key.service() {
        return NONE;
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*entry).last_used).write_volatile(now) };
    choice.backend
}

/// Enters what was chosen. False if `flags` forbid it.
#[inline(never)]
fn remember(key: &AffinityKey, chosen: &Chosen, flags: u64) -> bool {
    let choice = Choice { backend: chosen.id, generation: chosen.status.generation() };
    AFFINITIES.insert(key, &Affinity { choice, last_used: nanoseconds() }, flags).is_ok()
}
