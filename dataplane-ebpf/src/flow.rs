//! The table of flows: finding, claiming, confirming, closing. Both directions are made and removed together (C4).
//!
//! A flow stays where it was entered for its whole life; its stage is in its flags. What is not established is named in a
//! ring as well, `half_open` or `closing` ([`crate::ring`]): a flood of SYNs or a crowd of ended connections takes no more room than
//! it has.

use crate::global::global;
use crate::maps::FLOWS;
use crate::ring::{self, ClosingRing, HalfOpenRing};
use crate::scratch::Scratch;
use crate::{atomic, count, event};
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_jiffies64;
use core::sync::atomic::{Ordering, compiler_fence};
use dataplane_common::flow::{Flow, FlowKey, Numbers, Stage, TICK_SHIFT, tick, ticks_between};
use dataplane_common::{Protocol, read_word};

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

    /// Counts a packet of this direction.
    #[inline(always)]
    pub fn count(self, bytes: u32) {
        // SAFETY: an element of the map.
        unsafe { count::packet(self.0, bytes) };
    }

    /// Notes what this direction's segments have said.
    #[inline(always)]
    pub fn note(self, numbers: Numbers) {
        // SAFETY: an element of a map, valid until the program ends; one aligned word.
        unsafe { (&raw mut (*self.0).numbers).cast::<u64>().write_volatile(bytemuck::cast(numbers)) };
    }

    /// Sets flags in both directions.
    #[inline(never)]
    pub fn mark(self, key: &FlowKey, flow: &Flow, flags: u16) {
        let Some(partner) = FLOWS.get_ptr_mut(&flow.partner(key.proto())) else { return };
        if self.is_of(key) {
            // SAFETY: elements of a map, valid until the program ends.
            unsafe {
                set(self.0, flags);
                set(partner, flags);
            }
        }
    }

    /// Whether the entry is that of the flow still: an element of a flow that went can be another's by now.
    #[inline(always)]
    fn is_of(self, key: &FlowKey) -> bool {
        // SAFETY: an element of a map, valid until the program ends.
        unsafe { (&raw const (*self.0).check).read_volatile() == key.check() }
    }
}

/// A flow has ended: names it among the closing, and sets flags in the half of `key`, of which `flow` is a copy, and in the other. It
/// stays, as one of those that go first. `partner` is memory for the other half's key.
#[inline(never)]
pub fn close(key: &FlowKey, flow: &Flow, partner: &mut FlowKey, own: u16, others: u16) {
    *partner = flow.partner(key.proto());
    let is_reply = flow.has(Flow::REPLY);
    let client_key = if is_reply { &*partner } else { key };
    let turn = ring::name::<ClosingRing>(client_key, ring::next::<ClosingRing>());
    // Without a name it goes when it is idle, as if the end had not been seen.
    let (Some(half), Some(other)) = (FLOWS.get_ptr_mut(key), FLOWS.get_ptr_mut(&*partner)) else { return };
    if turn == 0 {
        return;
    }
    // SAFETY: elements of a map, valid until the program ends; one aligned store, then the flag that gives it its meaning.
    unsafe {
        let client = if is_reply { other } else { half };
        (&raw mut (*client).turn).write_volatile(turn);
        set(half, own | Flow::CLOSING);
        set(other, others | Flow::CLOSING);
        count::close(client);
    }
}

/// Sets flags of an entry; other CPUs may set others at the same time.
///
/// # Safety
/// `entry` must be an element of `flows`.
#[inline(always)]
unsafe fn set(entry: *mut Flow, flags: u16) {
    // SAFETY: the caller promises it; a flow is aligned as a word is, and its flags lie in the first.
    unsafe { atomic::set_bits(entry.cast(), Flow::in_first_word(flags)) };
}

/// The tick of this moment.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: a helper without arguments, and a valid static. Volatile, because the agent changes what the compiler sees.
    unsafe { tick(bpf_jiffies64(), (&raw const TICK_LENGTH).read_volatile()) }
}

/// The moment in eighths of a tick.
#[inline(always)]
pub fn moment() -> u32 {
    const EIGHTH: u32 = 3;
    // SAFETY: as above. No tick is shorter than eight jiffies.
    unsafe {
        (bpf_jiffies64() >> ((&raw const TICK_LENGTH).read_volatile().saturating_sub(EIGHTH) & 63)) as u32
    }
}

/// How many jiffies a tick lasts: the logarithm to the base of two. The agent writes it before it loads the programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata")]
static TICK_LENGTH: u32 = TICK_SHIFT;

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

/// What came of an attempt to enter a new flow. A number, for it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Claim(u32);

impl Claim {
    /// Both directions are in the table.
    pub const MADE: Self = Self(0);
    /// Another flow has the same reply.
    pub const TAKEN: Self = Self(1);
    /// There is no room.
    pub const FULL: Self = Self(2);
    /// The kernel has no memory.
    pub const NO_MEMORY: Self = Self(3);

    /// Why the kernel did not take an entry that no other has the key of.
    #[inline(always)]
    fn refused(error: i32) -> Self {
        if error == -E2BIG { Self::FULL } else { Self::NO_MEMORY }
    }
}

/// The kernel's answers to an entry: another has the key, and the table is full.
const EEXIST: i32 = 17;
const E2BIG: i32 = 7;

/// Which flows a claim may end, if they have the key. A number, for it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Ending(u32);

impl Ending {
    /// None.
    pub const NOTHING: Self = Self(0);
    /// Those of which nothing more is to come: closed, or a question by UDP that was answered. What comes late would be taken for
    /// the new flow's: at the client, an acknowledgement of what it never sent, which it answers by a RST.
    pub const OVER: Self = Self(1);
    /// These, and half-open ones of which nothing was seen for a while.
    pub const IDLE: Self = Self(2);
    /// All that are closing.
    pub const CLOSING: Self = Self(3);
}

/// Ticks after which nothing more is to come of a flow whose last acknowledgement was not seen, or whose question was answered;
/// and after which answers that go on are a stream.
const LINGER: u32 = 2;

/// Enters a new flow, if no other flow has its reply's key, or one that `ending` names. The reply's key is claimed first, by an
/// exclusive insert. What came of it is in the working memory.
#[inline(never)]
pub fn claim(scratch: &mut Scratch) {
    let made = try_claim(scratch);
    // SAFETY: an own field. Volatile, so that the verifier walks what follows once.
    unsafe { (&raw mut scratch.claim).write_volatile(made) };
}

#[inline(always)]
fn try_claim(scratch: &mut Scratch) -> Claim {
    let Scratch { key, flow: forward, reply, keys: [reply_key, owner], ending, .. } = scratch;
    *reply_key = forward.partner(key.proto());
    (forward.check, reply.check) = (key.check(), reply_key.check());
    if let Err(error) = FLOWS.insert(&*reply_key, &*reply, BPF_NOEXIST as u64) {
        if error != -EEXIST {
            return Claim::refused(error);
        }
        if is_taken(reply_key, owner, key, ending) {
            return Claim::TAKEN;
        }
        remove_half(reply_key);
        remove_half(owner);
        if FLOWS.insert(&*reply_key, &*reply, BPF_NOEXIST as u64).is_err() {
            return Claim::TAKEN;
        }
    }
    let mut entered = FLOWS.insert(&*key, &*forward, BPF_NOEXIST as u64);
    if entered == Err(-EEXIST) {
        // One that is alone; or another processor was quicker with a packet of the same flow.
        remove_half(key);
        entered = FLOWS.insert(&*key, &*forward, BPF_ANY as u64);
    }
    if let Err(error) = entered {
        let _ = FLOWS.remove(&*reply_key);
        return Claim::refused(error);
    }
    Claim::MADE
}

/// Whether what has the reply's key is a flow that goes on, and not one of `key` itself. `owner` becomes the key of its client's half.
#[inline(always)]
fn is_taken(reply_key: &FlowKey, owner: &mut FlowKey, key: &FlowKey, ending: &Ending) -> bool {
    let Some(entry) = FLOWS.get_ptr(reply_key) else { return true };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let reply: &Flow = unsafe { &*entry };
    *owner = reply.partner(key.proto());
    compiler_fence(Ordering::SeqCst);
    // It may have gone meanwhile, and be another's: what was read is of nobody then.
    if !Found(entry.cast_mut()).is_of(reply_key) {
        return true;
    }
    if *owner == *key {
        return false;
    }
    let rests = is_idle(reply);
    if reply.stage() == Stage::Closing {
        let over = reply.has(Flow::OVER) || rests;
        return !(*ending == Ending::CLOSING || *ending != Ending::NOTHING && over);
    }
    // One that is alone and new is about to get its other half.
    let Some(client) = FLOWS.get_ptr(&*owner) else { return !rests };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let client: &Flow = unsafe { &*client };
    let can_end = *ending == Ending::IDLE && client.stage() == Stage::HalfOpen
        || *ending == Ending::OVER && is_answered_question(client, key.proto());
    !(can_end && rests && is_idle(client))
}

/// Whether nothing was seen of this direction for so long that nothing more is to be expected of a flow that ended.
#[inline(always)]
fn is_idle(half: &Flow) -> bool {
    ticks_between(half.last_seen, now()) >= LINGER
}

/// Ticks for which a half-open flow waits for an answer: a slow server's, or that to the third SYN.
const PATIENCE: u32 = 8;

/// Whether an answer to this direction can still be expected.
#[inline(always)]
pub fn waits(half: &Flow) -> bool {
    ticks_between(half.last_seen, now()) < PATIENCE
}

/// Whether a flow is that of a question by UDP that was answered, and of which no more has come of it.
#[inline(always)]
pub fn is_answered_question(client: &Flow, proto: u8) -> bool {
    proto == Protocol::Udp as u8 && client.stage() == Stage::HalfOpen && client.has(Flow::ANSWERED)
}

/// Names a flow that was entered among the half-open, in this turn or a later one. One that cannot be named is removed; whether it
/// stays.
#[inline(never)]
pub fn wait(key: &FlowKey, turn: u64) -> bool {
    let given = ring::name::<HalfOpenRing>(key, turn);
    if given == turn as u32 {
        return true;
    }
    let Some(entry) = FLOWS.get_ptr_mut(key) else { return true };
    if given == 0 {
        // SAFETY: an element of the map.
        unsafe { remove_live(key, entry) };
        return false;
    }
    // SAFETY: an element of a map, valid until the program ends; one aligned store.
    unsafe { (&raw mut (*entry).turn).write_volatile(given) };
    true
}

global! {
    /// Makes room in the full table, for some flows to come: the oldest that are closing go, or else one that is half-open.
    pub fn make_room as flow_make_room() {
        if !ring::clear::<ClosingRing>() {
            ring::clear::<HalfOpenRing>();
        }
    }
}

/// Notes in the client's half what an endpoint's answer shows: the number that the client will acknowledge, and the client's own.
#[inline(always)]
pub fn answered(reply: &Flow, proto: u8, expected_ack: u32, numbers: Numbers) {
    let Some(forward) = FLOWS.get_ptr_mut(&reply.partner(proto)) else { return };
    let flags = Flow::ANSWERED | Flow::ACK_KNOWN;
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned store, the flags last.
    unsafe {
        note_rescued(forward);
        (&raw mut (*forward).detail).write_volatile(expected_ack);
        Found(forward).note(numbers);
        if !(*forward).has(flags) {
            set(forward, flags);
        }
    }
}

/// Counts a flow whose first answer comes from another endpoint than its first (L5).
///
/// # Safety
/// `forward` must be the client's half of a flow of TCP or UDP.
#[inline(always)]
unsafe fn note_rescued(forward: *const Flow) {
    // SAFETY: the caller promises it; each field is one aligned read.
    let forward: &Flow = unsafe { &*forward };
    if !forward.has(Flow::ANSWERED) && forward.kept != 0 && forward.attempt().tries() != 0 {
        count::rescued(forward.service);
    }
}

/// Notes in the client's half of a connection that was picked up in its middle that the endpoint goes on with it, from this number: who
/// acknowledges that has seen it. Where a SYN began the flow only its SYN-ACK says so.
#[inline(always)]
pub fn goes_on(reply: &Flow, proto: u8, seq: u32) {
    let Some(forward) = FLOWS.get_ptr_mut(&reply.partner(proto)) else { return };
    // SAFETY: an element of a map, valid until the program ends; one aligned read and store, the flags last.
    unsafe {
        if read_word(&raw const (*forward).numbers).ack != 0 && !(*forward).has(Flow::ACK_KNOWN) {
            (&raw mut (*forward).detail).write_volatile(seq);
            set(forward, Flow::ANSWERED | Flow::ACK_KNOWN);
        }
    }
}

/// What the segments of the other direction have said; `key` is memory for its key.
#[inline(always)]
pub fn numbers_of_peer(flow: &Flow, proto: u8, key: &mut FlowKey) -> Numbers {
    *key = flow.partner(proto);
    let Some(other) = FLOWS.get_ptr(&*key) else { return Numbers::default() };
    // SAFETY: an element of a map, valid until the program ends.
    unsafe { read_word(&raw const (*other).numbers) }
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
        note_rescued(forward);
        (&raw mut (*forward).detail).write_volatile(now());
        set(forward, Flow::ANSWERED);
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
    remove_half(key);
    remove_half(&flow.partner(key.proto()));
}

/// Removes the flow of this entry, both directions, if the entry is the key's still. Whether it was.
///
/// # Safety
/// `entry` must be an element of `flows`, which is valid until the program ends.
#[inline(never)]
pub unsafe fn remove_live(key: &FlowKey, entry: *const Flow) -> bool {
    // SAFETY: the caller promises it. What is read may be another's, which is found out.
    let partner = unsafe { (*entry).partner(key.proto()) };
    compiler_fence(Ordering::SeqCst);
    if !Found(entry.cast_mut()).is_of(key) {
        return false;
    }
    // SAFETY: the caller promises it.
    unsafe { event::tell_displaced(key, entry, &partner) };
    remove_half(key);
    remove_half(&partner);
    true
}

/// Removes one direction. What was counted in it comes to the totals; a packet of it that passes another CPU in this moment may not. The
/// flow is open no more.
#[inline(never)]
fn remove_half(key: &FlowKey) {
    if let Some(entry) = FLOWS.get_ptr_mut(key) {
        // SAFETY: an element of the map.
        unsafe {
            count::fold(entry);
            count::close(entry);
        }
    }
    let _ = FLOWS.remove(key);
}
