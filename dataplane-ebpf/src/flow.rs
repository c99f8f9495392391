//! The table of flows: finding, claiming, confirming, closing. Both directions are made and removed together (C4).
//!
//! A flow stays where it was entered for its whole life; its stage is in its flags. What is not established is named in a
//! queue as well, `half_open` or `closing`: when that is full its oldest flow goes, so that a flood of SYNs or a crowd of
//! ended connections takes no more room than it has.

use crate::maps::{CLOSING, FLOWS, HALF_OPEN};
use crate::repeat::{Step, Steps, repeat};
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_jiffies64;
use core::sync::atomic::{Ordering, compiler_fence};
use dataplane_common::flow::{Flow, FlowKey, Stage, tick, ticks_between};

/// How far beyond the number remembered from the SYN-ACK a client's first acknowledgement may lie: what a server may
/// send before it hears from the client.
const ACK_WINDOW: u32 = 1 << 16;

/// Where a flow was found.
#[derive(Clone, Copy)]
pub struct Found(*mut Flow);

impl Found {
    /// Notes that a packet of this direction passed; `flow` is the copy that was made.
    #[inline(always)]
    pub fn touch(self, flow: &Flow) {
        let now = now();
        if flow.last_seen != now {
            // SAFETY: an element of a map, valid until the program ends; one aligned store.
            unsafe { (&raw mut (*self.0).last_seen).write_volatile(now) };
        }
    }

    /// Sets flags in both directions.
    #[inline(never)]
    pub fn mark(self, key: &FlowKey, flow: &Flow, flags: u16) {
        self.mark_each(key, flow, flags, flags);
    }

    /// The flow has ended: sets flags in this direction and in the other. It stays, as one of those that go first.
    #[inline(never)]
    pub fn close(self, key: &FlowKey, flow: &Flow, own: u16, others: u16) {
        self.mark_each(key, flow, own | Flow::CLOSING, others | Flow::CLOSING);
        if CLOSING.push(key, BPF_ANY as u64).is_err() {
            evict_oldest(Stage::Closing);
            // Another CPU may have taken the place: without one, the flow goes when it is idle.
            let _ = CLOSING.push(key, BPF_ANY as u64);
        }
    }

    #[inline(always)]
    fn mark_each(self, key: &FlowKey, flow: &Flow, own: u16, others: u16) {
        // SAFETY: an element of a map, valid until the program ends; it is another flow's if that took its place.
        unsafe {
            if (*self.0).check == key.check() {
                (*self.0).set(own);
            }
            if let Some(partner) = FLOWS.get_ptr_mut(&flow.partner(key.proto())) {
                (*partner).set(others);
            }
        }
    }
}

/// The tick of this moment.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: a helper without arguments.
    tick(unsafe { bpf_jiffies64() } as u32)
}

/// Finds the flow with this key and copies it to `flow`, if it still belonged to `key` when the copy was complete.
#[inline(always)]
pub fn lookup(key: &FlowKey, flow: &mut Flow) -> Option<Found> {
    let entry = FLOWS.get_ptr_mut(key)?;
    // SAFETY: an element of a map, valid until the program ends; a torn copy is found out below.
    unsafe { flow.copy_from(entry) };
    compiler_fence(Ordering::SeqCst);
    // SAFETY: as above.
    let check = unsafe { (&raw const (*entry).check).read_volatile() };
    (check == key.check()).then_some(Found(entry))
}

/// What came of an attempt to enter a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Both directions are in the table.
    Made,
    /// Another flow has the same reply.
    Taken,
    /// There is no room, and no flow that may go.
    Full,
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

/// Enters a new flow, if no other flow has its reply's key, or one that `ending` names. The reply's key is claimed first, by an
/// exclusive insert.
#[inline(never)]
pub fn claim(key: &FlowKey, forward: &mut Flow, reply: &mut Flow, ending: Ending) -> Claim {
    let reply_key = forward.partner(key.proto());
    (forward.check, reply.check) = (key.check(), reply_key.check());
    if FLOWS.insert(&reply_key, &*reply, BPF_NOEXIST as u64).is_err() {
        if let Some(other) = FLOWS.get_ptr(&reply_key) {
            // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
            let other: &Flow = unsafe { &*other };
            if is_taken(other, key, ending) {
                return Claim::Taken;
            }
            remove(&reply_key, other);
            if FLOWS.insert(&reply_key, &*reply, BPF_NOEXIST as u64).is_err() {
                return Claim::Taken;
            }
        } else {
            make_room();
            if FLOWS.insert(&reply_key, &*reply, BPF_NOEXIST as u64).is_err() {
                return Claim::Full;
            }
        }
    }
    if FLOWS.insert(key, &*forward, BPF_ANY as u64).is_err() {
        make_room();
        if FLOWS.insert(key, &*forward, BPF_ANY as u64).is_err() {
            let _ = FLOWS.remove(&reply_key);
            return Claim::Full;
        }
    }
    Claim::Made
}

/// Whether what has the reply's key is a flow that goes on, and not one of `key` itself.
#[inline(always)]
fn is_taken(reply: &Flow, key: &FlowKey, ending: Ending) -> bool {
    let owner = reply.partner(key.proto());
    if owner == *key {
        return false;
    }
    if reply.stage() == Stage::Closing {
        return match ending {
            Ending::Nothing => true,
            Ending::Over => !reply.has(Flow::OVER) && ticks_between(reply.last_seen, now()) < LINGER,
            Ending::Closing => false,
        };
    }
    // One that is alone and new is about to get its other half.
    FLOWS.get_ptr(&owner).is_some() || ticks_between(reply.last_seen, now()) < LINGER
}

/// Names a flow that was entered among the half-open. When their queue is full its first name goes. Most often that is of a
/// flow that is further by now. One that is half-open still goes too if nothing was seen of it for a while, or if the next
/// ones are half-open as well.
#[inline(never)]
pub fn wait(key: &FlowKey) {
    if HALF_OPEN.push(key, BPF_ANY as u64).is_ok() {
        return;
    }
    repeat(LOOKED_AT, &mut Displacement { left: LOOKED_AT });
    // If other CPUs have taken the place, the flow goes when it is idle.
    let _ = HALF_OPEN.push(key, BPF_ANY as u64);
}

/// How many of the oldest half-open flows are looked at when their queue is full.
const LOOKED_AT: u32 = 4;

/// The search for a name that can go from `half_open`.
struct Displacement {
    left: u32,
}

impl Steps for Displacement {
    fn step(&mut self) -> Step {
        self.left -= 1;
        let Ok(Some(oldest)) = HALF_OPEN.pop() else { return Step::Done };
        let Some(idle) = half_open_for(&oldest) else { return Step::Done };
        if idle < LINGER && self.left != 0 && HALF_OPEN.push(&oldest, BPF_ANY as u64).is_ok() {
            return Step::Next;
        }
        evict(&oldest, Stage::HalfOpen);
        Step::Done
    }
}

/// Makes room in the full table: a closing flow goes, or else one that is half-open.
#[inline(never)]
fn make_room() {
    repeat(2 * ROOM_TRIES, &mut Clearance { tries: 0 });
}

/// How many names are taken from each queue in search of a flow that can go.
const ROOM_TRIES: u32 = 8;

/// The search for a flow that can go.
struct Clearance {
    tries: u32,
}

impl Steps for Clearance {
    fn step(&mut self) -> Step {
        let stage = if self.tries < ROOM_TRIES { Stage::Closing } else { Stage::HalfOpen };
        self.tries += 1;
        if evict_oldest(stage) { Step::Done } else { Step::Next }
    }
}

/// Takes the oldest name from a queue, and the flow from the table if it still is in that stage; whether it was.
#[inline(always)]
fn evict_oldest(stage: Stage) -> bool {
    let oldest = if stage == Stage::HalfOpen { HALF_OPEN.pop() } else { CLOSING.pop() };
    match oldest {
        Ok(Some(oldest)) => evict(&oldest, stage),
        Ok(None) | Err(_) => false,
    }
}

/// Removes the flow with this key if it is in this stage; whether it was.
#[inline(never)]
fn evict(key: &FlowKey, stage: Stage) -> bool {
    let Some(flow) = FLOWS.get_ptr(key) else { return false };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let flow: &Flow = unsafe { &*flow };
    if flow.stage() != stage {
        return false;
    }
    remove(key, flow);
    true
}

/// For how many ticks nothing was seen in this direction of a flow that is half-open; `None` if it is not, or there is none.
#[inline(never)]
fn half_open_for(key: &FlowKey) -> Option<u32> {
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let flow: &Flow = unsafe { &*FLOWS.get_ptr(key)? };
    (flow.stage() == Stage::HalfOpen).then(|| ticks_between(flow.last_seen, now()))
}

/// Notes in the client's half what an endpoint's answer shows: the number that the client will acknowledge.
#[inline(always)]
pub fn answered(reply: &Flow, proto: u8, expected_ack: Option<u32>) {
    let Some(forward) = FLOWS.get_ptr_mut(&reply.partner(proto)) else { return };
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

/// Removes a flow, both directions.
#[inline(never)]
pub fn remove(key: &FlowKey, flow: &Flow) {
    // Before the first goes: it may be `flow` itself.
    let partner = flow.partner(key.proto());
    let _ = FLOWS.remove(key);
    let _ = FLOWS.remove(&partner);
}
