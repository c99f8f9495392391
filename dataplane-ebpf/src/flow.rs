//! The flow tables: finding, claiming, promoting, closing. Both directions are made and removed together (C4).

use crate::maps::{CLOSING, ESTABLISHED, HALF_OPEN};
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_jiffies64;
use core::sync::atomic::{Ordering, compiler_fence};
use dataplane_common::drop::Reason;
use dataplane_common::flow::{Flow, FlowKey, tick, ticks_between};

/// How far beyond the number remembered from the SYN-ACK a client's first acknowledgement may lie: what a server may
/// send before it hears from the client.
const ACK_WINDOW: u32 = 1 << 16;

/// The table that holds a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Both ends confirmed it.
    Established,
    /// Its handshake is not complete.
    HalfOpen,
    /// It ended or was reset.
    Closing,
}

/// Where a flow was found.
#[derive(Clone, Copy)]
pub struct Found {
    /// Its table.
    pub place: Place,
    entry: *mut Flow,
}

impl Found {
    /// Notes that a packet of this direction passed; `flow` is the copy that was made.
    #[inline(always)]
    pub fn touch(&self, flow: &Flow) {
        let now = now();
        if flow.last_seen != now {
            // SAFETY: an element of a map, valid until the program ends; one aligned store.
            unsafe { (&raw mut (*self.entry).last_seen).write_volatile(now) };
        }
    }
}

/// The tick of this moment.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: a helper without arguments.
    tick(unsafe { bpf_jiffies64() } as u32)
}

/// Finds the flow with this key, in whichever table, and copies it to `flow`. A half whose partner is gone counts as
/// absent.
#[inline(always)]
pub fn lookup(key: &FlowKey, flow: &mut Flow) -> Option<Found> {
    if let Some(found) = copy(ESTABLISHED.get_ptr_mut(key), key, Place::Established, flow) {
        return Some(found);
    }
    if let Some(found) = copy(HALF_OPEN.get_ptr_mut(key), key, Place::HalfOpen, flow) {
        return HALF_OPEN.get_ptr(&flow.partner(key.proto())).is_some().then_some(found);
    }
    if let Some(found) = copy(CLOSING.get_ptr_mut(key), key, Place::Closing, flow) {
        return CLOSING.get_ptr(&flow.partner(key.proto())).is_some().then_some(found);
    }
    // It may have been promoted between the first look and the second.
    copy(ESTABLISHED.get_ptr_mut(key), key, Place::Established, flow)
}

/// Copies an entry, and gives it only if it still belonged to `key` when the copy was complete.
#[inline(always)]
fn copy(entry: Option<*mut Flow>, key: &FlowKey, place: Place, flow: &mut Flow) -> Option<Found> {
    let entry = entry?;
    // SAFETY: an element of a map, valid until the program ends; a torn copy is found out below.
    unsafe { flow.copy_from(entry) };
    compiler_fence(Ordering::SeqCst);
    // SAFETY: as above.
    let check = unsafe { (&raw const (*entry).check).read_volatile() };
    (check == key.check()).then_some(Found { place, entry })
}

/// What came of an attempt to enter a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Both directions are in `half_open`.
    Made,
    /// Another flow has the same reply.
    Taken,
    /// The table refused.
    Failed,
}

/// Which flows a claim may end, if they have the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// None.
    Nothing,
    /// Those of which nothing more is to come. What comes late would be taken for the new flow's: at the client, an
    /// acknowledgement of what it never sent, which it answers by a RST.
    Over,
    /// All that are closing.
    Closing,
}

/// Ticks after which nothing more is to come of a flow whose last acknowledgement was not seen.
const LINGER: u32 = 2;

/// Enters a new flow into `half_open`, if no other flow has its reply's key, or one that `ending` names.
///
/// The reply's key is claimed first, by an exclusive insert; then the confirmed tables are asked.
#[inline(never)]
pub fn claim(key: &FlowKey, forward: &mut Flow, reply: &mut Flow, ending: Ending) -> Claim {
    let reply_key = forward.partner(key.proto());
    (forward.check, reply.check) = (key.check(), reply_key.check());
    if ESTABLISHED.get_ptr(&reply_key).is_some() {
        return Claim::Taken;
    }
    let closing = CLOSING.get_ptr(&reply_key);
    if is_taken(closing, key) {
        if ending == Ending::Nothing || (ending == Ending::Over && !is_over(closing)) {
            return Claim::Taken;
        }
        let _ = CLOSING.remove(&reply_key);
    }
    if HALF_OPEN.insert(&reply_key, &*reply, BPF_NOEXIST as u64).is_err() {
        // A leftover of this very client, or of a flow whose other half was pushed out, may be replaced.
        if is_taken(HALF_OPEN.get_ptr(&reply_key), key) {
            return Claim::Taken;
        }
        if HALF_OPEN.insert(&reply_key, &*reply, BPF_ANY as u64).is_err() {
            return Claim::Failed;
        }
    }
    // A flow of the same reply that was promoted in between has won.
    if ESTABLISHED.get_ptr(&reply_key).is_some() {
        let _ = HALF_OPEN.remove(&reply_key);
        return Claim::Taken;
    }
    if HALF_OPEN.insert(key, &*forward, BPF_ANY as u64).is_err() {
        let _ = HALF_OPEN.remove(&reply_key);
        return Claim::Failed;
    }
    Claim::Made
}

/// Whether a reply's entry belongs to a living flow other than that of `key`.
#[inline(always)]
fn is_taken(reply: Option<*const Flow>, key: &FlowKey) -> bool {
    let Some(reply) = reply else { return false };
    // SAFETY: an element of a map, valid until the program ends.
    let owner = unsafe { (*reply).partner(key.proto()) };
    owner != *key && (HALF_OPEN.get_ptr(&owner).is_some() || CLOSING.get_ptr(&owner).is_some())
}

/// Whether nothing more is to come of a closing flow, by one of its halves.
#[inline(always)]
fn is_over(half: Option<*const Flow>) -> bool {
    let Some(half) = half else { return true };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let half: &Flow = unsafe { &*half };
    half.has(Flow::OVER) || ticks_between(half.last_seen, now()) >= LINGER
}

/// Notes in both halves of a closing flow that nothing more is to come.
#[inline(always)]
pub fn end(key: &FlowKey, flow: &Flow) {
    for key in [*key, flow.partner(key.proto())] {
        if let Some(half) = CLOSING.get_ptr_mut(&key) {
            // SAFETY: an element of a map, valid until the program ends.
            unsafe { (*half).set(Flow::OVER) };
        }
    }
}

/// Notes in the client's half what an endpoint's answer shows: the number that the client will acknowledge.
#[inline(always)]
pub fn answered(reply: &Flow, proto: u8, expected_ack: Option<u32>) {
    let Some(forward) = HALF_OPEN.get_ptr_mut(&reply.partner(proto)) else { return };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned store, the flags last.
    unsafe {
        let mut flags = Flow::ANSWERED;
        if let Some(ack) = expected_ack {
            (&raw mut (*forward).ack_or_uplink).write_volatile(ack);
            flags |= Flow::ACK_KNOWN;
        }
        if !(*forward).has(flags) {
            (*forward).set(flags);
        }
    }
}

/// Whether a client's acknowledgement proves that it saw the SYN-ACK.
#[inline(always)]
pub fn proves(forward: &Flow, ack: u32) -> bool {
    forward.has(Flow::ACK_KNOWN) && ack.wrapping_sub(forward.expected_ack()) < ACK_WINDOW
}

/// Moves a flow from `half_open` to `established`, both directions.
///
/// # Errors
/// [`Reason::EstablishedFull`]: it stays where it is.
#[inline(never)]
pub fn promote(key: &FlowKey) -> Result<(), Reason> {
    let Some(forward) = HALF_OPEN.get_ptr(key) else { return Ok(()) };
    // SAFETY: an element of a map, valid until the program ends.
    let forward: &Flow = unsafe { &*forward };
    let reply_key = forward.partner(key.proto());
    let Some(reply) = HALF_OPEN.get_ptr(&reply_key) else { return Ok(()) };
    // SAFETY: as above.
    let reply: &Flow = unsafe { &*reply };
    if ESTABLISHED.insert(&reply_key, reply, BPF_ANY as u64).is_err() {
        return Err(Reason::EstablishedFull);
    }
    if ESTABLISHED.insert(key, forward, BPF_ANY as u64).is_err() {
        let _ = ESTABLISHED.remove(&reply_key);
        return Err(Reason::EstablishedFull);
    }
    let _ = HALF_OPEN.remove(key);
    let _ = HALF_OPEN.remove(&reply_key);
    Ok(())
}

/// Notes a FIN (`flag` says whose) in both halves of an established flow.
#[inline(never)]
pub fn note_fin(key: &FlowKey, flow: &Flow, flag: u16) {
    set_flag(key, flag);
    set_flag(&flow.partner(key.proto()), flag);
}

#[inline(always)]
fn set_flag(key: &FlowKey, flag: u16) {
    if let Some(half) = ESTABLISHED.get_ptr_mut(key) {
        // SAFETY: an element of a map, valid until the program ends.
        unsafe { (*half).set(flag) };
    }
}

/// Moves an established flow that ended to `closing`, both directions: a packet finds it in one of the two throughout. `flag`,
/// [`Flow::LAST_FIN`] or [`Flow::OVER`], is set in this half.
#[inline(never)]
pub fn close(key: &FlowKey, flag: u16) {
    let Some(flow) = ESTABLISHED.get_ptr_mut(key) else { return };
    // SAFETY: an element of a map, valid until the program ends.
    unsafe { (*flow).set(flag) };
    // SAFETY: as above.
    let flow: &Flow = unsafe { &*flow };
    let partner_key = flow.partner(key.proto());
    let Some(partner) = ESTABLISHED.get_ptr(&partner_key) else { return };
    // SAFETY: as above.
    let partner: &Flow = unsafe { &*partner };
    if CLOSING.insert(&partner_key, partner, BPF_ANY as u64).is_err()
        || CLOSING.insert(key, flow, BPF_ANY as u64).is_err()
    {
        return;
    }
    let _ = ESTABLISHED.remove(key);
    let _ = ESTABLISHED.remove(&partner_key);
}

/// Removes a flow, both directions.
#[inline(never)]
pub fn remove(key: &FlowKey, flow: &Flow) {
    remove_half(key);
    remove_half(&flow.partner(key.proto()));
}

#[inline(always)]
fn remove_half(key: &FlowKey) {
    let _ = ESTABLISHED.remove(key);
    let _ = HALF_OPEN.remove(key);
    let _ = CLOSING.remove(key);
}
