//! The table of flows: finding, claiming, confirming, closing. Both directions are made and removed together (C4).
//!
//! A flow stays where it was entered for its whole life; its stage is in its flags. What is not established is named in a
//! queue as well, `half_open` or `closing`: when that is full its oldest flow goes, so that a flood of SYNs or a crowd of
//! ended connections takes no more room than it has.

use crate::maps::{CLOSING, FLOWS, HALF_OPEN};
use crate::repeat::{Step, Steps, repeat};
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::Queue;
use aya_ebpf::helpers::{bpf_jiffies64, bpf_map_pop_elem};
use core::mem::MaybeUninit;
use core::sync::atomic::{Ordering, compiler_fence};
use dataplane_common::Protocol;
use dataplane_common::flow::{Ended, Flow, FlowKey, Stage, tick, ticks_between};

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
        let Some(partner) = FLOWS.get_ptr_mut(&flow.partner(key.proto())) else { return };
        // SAFETY: elements of a map, valid until the program ends.
        unsafe {
            if self.is_of(key) {
                (*self.0).set(flags);
                (*partner).set(flags);
            }
        }
    }

    /// Whether the entry is that of the flow still: an element of a flow that went can be another's by now.
    #[inline(always)]
    fn is_of(self, key: &FlowKey) -> bool {
        // SAFETY: an element of a map, valid until the program ends.
        unsafe { (&raw const (*self.0).check).read_volatile() == key.check() }
    }

    /// The flow has ended: sets flags in this direction and in the other. It stays, as one of those that go first.
    #[inline(never)]
    pub fn close(self, key: &FlowKey, flow: &Flow, own: u16, others: u16) {
        let at = jiffies();
        let mut name = Ended { key: flow.partner(key.proto()), at: at as u64 };
        let Some(partner) = FLOWS.get_ptr_mut(&name.key) else { return };
        if !self.is_of(key) {
            return;
        }
        let mut client = partner;
        if !flow.has(Flow::REPLY) {
            (name.key, client) = (*key, self.0);
        }
        // SAFETY: elements of a map, valid until the program ends; one aligned store, then the flag that gives it its meaning.
        unsafe {
            (&raw mut (*client).detail).write_volatile(at);
            compiler_fence(Ordering::SeqCst);
            (*self.0).set(own | Flow::CLOSING);
            (*partner).set(others | Flow::CLOSING);
        }
        if CLOSING.push(&name, BPF_ANY as u64).is_err() {
            evict_closing();
            // Another CPU may have taken the place: without one, the flow goes when it is idle.
            let _ = CLOSING.push(&name, BPF_ANY as u64);
        }
    }
}

/// The tick of this moment.
#[inline(always)]
pub fn now() -> u32 {
    tick(jiffies())
}

#[inline(always)]
fn jiffies() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// Finds the flow with this key and copies it to `flow`, if it still belonged to `key` when the copy was complete.
#[inline(always)]
pub fn lookup(key: &FlowKey, flow: &mut Flow) -> Option<Found> {
    let entry = FLOWS.get_ptr_mut(key)?;
    // SAFETY: an element of a map, valid until the program ends; a torn copy is found out below.
    unsafe { flow.copy_from(entry) };
    compiler_fence(Ordering::SeqCst);
    let found = Found(entry);
    found.is_of(key).then_some(found)
}

/// What came of an attempt to enter a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Both directions are in the table.
    Made,
    /// Another flow has the same reply.
    Taken,
    /// There is no room.
    Full,
}

/// Which flows a claim may end, if they have the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// None.
    Nothing,
    /// Those of which nothing more is to come: closed, or a question by UDP that was answered. What comes late would be taken for
    /// the new flow's: at the client, an acknowledgement of what it never sent, which it answers by a RST.
    Over,
    /// These, and half-open ones of which nothing was seen for a while.
    Idle,
    /// All that are closing.
    Closing,
}

/// Ticks after which nothing more is to come of a flow whose last acknowledgement was not seen, or whose question was answered;
/// and after which answers that go on are a stream.
const LINGER: u32 = 2;

/// Enters a new flow, if no other flow has its reply's key, or one that `ending` names. The reply's key is claimed first, by an
/// exclusive insert.
#[inline(never)]
pub fn claim(key: &FlowKey, forward: &mut Flow, reply: &mut Flow, ending: Ending) -> Claim {
    let reply_key = forward.partner(key.proto());
    (forward.check, reply.check) = (key.check(), reply_key.check());
    if FLOWS.insert(&reply_key, &*reply, BPF_NOEXIST as u64).is_err() {
        let Some(other) = FLOWS.get_ptr(&reply_key) else { return Claim::Full };
        // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
        let other: &Flow = unsafe { &*other };
        if is_taken(other, key, ending) {
            return Claim::Taken;
        }
        remove(&reply_key, other);
        if FLOWS.insert(&reply_key, &*reply, BPF_NOEXIST as u64).is_err() {
            return Claim::Taken;
        }
    }
    if FLOWS.insert(key, &*forward, BPF_ANY as u64).is_err() {
        let _ = FLOWS.remove(&reply_key);
        return Claim::Full;
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
    let rests = is_idle(reply);
    if reply.stage() == Stage::Closing {
        return match ending {
            Ending::Nothing => true,
            Ending::Over | Ending::Idle => !reply.has(Flow::OVER) && !rests,
            Ending::Closing => false,
        };
    }
    // One that is alone and new is about to get its other half.
    let Some(client) = FLOWS.get_ptr(&owner) else { return !rests };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let client: &Flow = unsafe { &*client };
    let can_end = match ending {
        Ending::Nothing | Ending::Closing => false,
        Ending::Over => is_answered_question(client, key.proto()),
        Ending::Idle => client.stage() == Stage::HalfOpen,
    };
    !(can_end && rests && is_idle(client))
}

/// Whether nothing was seen of this direction for so long that nothing more is to be expected of a flow that ended.
#[inline(always)]
fn is_idle(half: &Flow) -> bool {
    ticks_between(half.last_seen, now()) >= LINGER
}

/// Whether a flow is that of a question by UDP that was answered, and of which no more has come of it.
#[inline(always)]
fn is_answered_question(client: &Flow, proto: u8) -> bool {
    proto == Protocol::Udp as u8 && client.stage() == Stage::HalfOpen && client.has(Flow::ANSWERED)
}

/// Names a flow that was entered among the half-open. When their queue is full its first name goes. Most often that is of a
/// flow that is further by now. One that is half-open still goes too if nothing was seen of it for a while, if it is a question that
/// was answered, or if the next ones are half-open as well.
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
    fn step(&mut self, _index: u32) -> Step {
        self.left -= 1;
        let mut oldest = MaybeUninit::uninit();
        let Some(oldest) = pop(&HALF_OPEN, &mut oldest) else { return Step::Done };
        let Some(flow) = half_open(oldest) else { return Step::Done };
        let waits = !is_idle(flow) && !is_answered_question(flow, oldest.proto());
        if waits && self.left != 0 && HALF_OPEN.push(oldest, BPF_ANY as u64).is_ok() {
            return Step::Next;
        }
        remove(oldest, flow);
        Step::Done
    }
}

/// Makes room in the full table, for some flows to come: the oldest that are closing go, or else one that is half-open.
#[inline(never)]
pub fn make_room() {
    repeat(CLEARED, &mut Clearance { made: false });
}

/// How many names are taken from the queues at once to make room.
const CLEARED: u32 = 64;

/// The search for flows that can go from the full table.
struct Clearance {
    made: bool,
}

impl Steps for Clearance {
    fn step(&mut self, _index: u32) -> Step {
        match evict_closing() {
            Some(gone) => self.made |= gone,
            None if self.made => return Step::Done,
            None => self.made = evict_half_open(),
        }
        Step::Next
    }
}

/// Takes the oldest name from `closing`, and its flow from the table; whether there was one. `None` if there is no name.
#[inline(never)]
fn evict_closing() -> Option<bool> {
    let mut name = MaybeUninit::uninit();
    let name = pop(&CLOSING, &mut name)?;
    let Some(flow) = FLOWS.get_ptr(&name.key) else { return Some(false) };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let flow: &Flow = unsafe { &*flow };
    let is_named = flow.stage() == Stage::Closing && flow.ended() as u64 == name.at;
    if is_named {
        remove(&name.key, flow);
    }
    Some(is_named)
}

/// Takes the oldest name from `half_open`, and its flow from the table; whether there was one.
#[inline(always)]
fn evict_half_open() -> bool {
    let mut oldest = MaybeUninit::uninit();
    let Some(oldest) = pop(&HALF_OPEN, &mut oldest) else { return false };
    let Some(flow) = half_open(oldest) else { return false };
    remove(oldest, flow);
    true
}

/// Takes the first name from a queue, to where it is looked at: what the queue itself gives back is on the stack twice.
#[inline(always)]
fn pop<'a, T, const N: usize>(queue: &Queue<T, N>, name: &'a mut MaybeUninit<T>) -> Option<&'a T> {
    // SAFETY: the helper writes a whole name, or fails.
    unsafe {
        let queue = (&raw const *queue).cast_mut().cast();
        (bpf_map_pop_elem(queue, name.as_mut_ptr().cast()) == 0).then(|| name.assume_init_ref())
    }
}

/// The flow with this key, if it is half-open.
#[inline(always)]
fn half_open(key: &FlowKey) -> Option<&'static Flow> {
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let flow: &Flow = unsafe { &*FLOWS.get_ptr(key)? };
    (flow.stage() == Stage::HalfOpen).then_some(flow)
}

/// Notes in the client's half what an endpoint's answer shows: the number that the client will acknowledge.
#[inline(always)]
pub fn answered(reply: &Flow, proto: u8, expected_ack: u32) {
    let Some(forward) = FLOWS.get_ptr_mut(&reply.partner(proto)) else { return };
    let flags = Flow::ANSWERED | Flow::ACK_KNOWN;
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned store, the flags last.
    unsafe {
        (&raw mut (*forward).detail).write_volatile(expected_ack);
        if !(*forward).has(flags) {
            (*forward).set(flags);
        }
    }
}

/// Notes in the client's half that an endpoint answers by UDP. Whether it has gone on answering for a while: that is a stream, whose
/// client may be silent.
#[inline(always)]
pub fn streams(reply: &Flow) -> bool {
    let Some(forward) = FLOWS.get_ptr_mut(&reply.partner(Protocol::Udp as u8)) else { return false };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read or store, the flags last.
    unsafe {
        if (*forward).has(Flow::ANSWERED) {
            return ticks_between((*forward).answered_at(), now()) >= LINGER;
        }
        (&raw mut (*forward).detail).write_volatile(now());
        compiler_fence(Ordering::SeqCst);
        (*forward).set(Flow::ANSWERED);
    }
    false
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
