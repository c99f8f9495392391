//! Tells whoever watches what becomes of flows. Nobody watches most of the time: then it is the read of one word, where a flow begins or
//! ends or a packet is dropped or refused. What cannot be told is lost, and changes nothing for a packet.

use crate::atomic;
use crate::clock::nanoseconds;
use crate::global::global;
use crate::maps::{EVENTS, FLOWS, WATCH};
use crate::scratch::Scratch;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use dataplane_common::event::{self, Ended, Event, EventKind, MARKS, Place, Watch, What};
use dataplane_common::flow::{Flow, FlowKey, Stage};
use dataplane_common::{Addr, Port};

/// The element of `watch`, if somebody watches. Where the last of them has gone, the next that asks notes it.
#[inline(always)]
fn watched() -> Option<*mut Watch> {
    let watch = WATCH.get_ptr_mut(0)?;
    // SAFETY: an element of an array, which stays; aligned words.
    unsafe {
        let until = &raw mut (*watch).until;
        let seen = until.read_volatile();
        if seen == 0 {
            return None;
        }
        if seen <= nanoseconds() {
            atomic::compare_exchange(until, seen, 0);
            return None;
        }
    }
    Some(watch)
}

/// Takes the next turn, and its slot. None if another CPU has the slot at this moment, a whole round later or earlier.
#[inline(always)]
fn take(watch: *mut Watch) -> Option<(*mut Event, u64)> {
    // SAFETY: elements of arrays, which stay; aligned words.
    unsafe {
        let turn = atomic::fetch_add(&raw mut (*watch).head, 1) + 1;
        let slot = EVENTS.get_ptr_mut((turn % event::EVENTS as u64) as u32)?;
        let had = (&raw const (*slot).turn).read_volatile();
        let taken =
            had < turn && atomic::compare_exchange(&raw mut (*slot).turn, had, Event::BUSY | turn) == had;
        taken.then_some((slot, turn))
    }
}

/// Tells of the packet of a walk, and of its flow. `interface`: where it is met.
#[inline(never)]
pub fn tell(scratch: &Scratch, what: What, interface: u32) {
    let Some(watch) = watched() else {
        if what.is(EventKind::Packet) {
            unmark(&scratch.key);
        }
        return;
    };
    if what.is(EventKind::Packet) && !allows_packet(watch, &scratch.key) {
        return;
    }
    let Some((slot, turn)) = take(watch) else { return };
    let Scratch { packet, flow, .. } = scratch;
    // SAFETY: an element of an array, which stays, and which is this walk's alone; volatile, because the compiler would make calls
    // of plain copies.
    unsafe {
        let [totals_in, totals_out] =
            if what.is(EventKind::Ended) { totals(&scratch.key) } else { [(0, 0); 2] };
        (&raw mut (*slot).time).write_volatile(bpf_ktime_get_ns());
        let key = FlowKey::new(packet.src, packet.src_port, packet.dst, packet.dst_port, packet.proto);
        (&raw mut (*slot).key).cast::<[u64; 5]>().write_volatile(bytemuck::must_cast(key));
        write_ends(slot, (&flow.src, flow.src_port), (&flow.dst, flow.dst_port));
        (&raw mut (*slot).interface).write_volatile(interface);
        (&raw mut (*slot).service).write_volatile(flow.service);
        (&raw mut (*slot).backend).write_volatile(flow.backend);
        (&raw mut (*slot).packets_in).write_volatile(totals_in.0);
        (&raw mut (*slot).bytes_in).write_volatile(totals_in.1);
        (&raw mut (*slot).packets_out).write_volatile(totals_out.0);
        (&raw mut (*slot).bytes_out).write_volatile(totals_out.1);
        (&raw mut (*slot).what).write_volatile(what);
        (&raw mut (*slot).flags).write_volatile(flow.flags());
        (&raw mut (*slot).transport_flags).write_volatile(packet.flags as u16);
        (&raw mut (*slot).length).write_volatile(packet.length);
        (&raw mut (*slot).sequence).write_volatile(packet.seq);
        atomic::publish(&raw mut (*slot).turn, turn);
    }
}

/// Tells of a flow that is not established and goes, because another gets its name. Far down the chain of calls: each word that lies on
/// the stack counts, so each is written as it is read.
///
/// # Safety
/// `entry` must be an element of `flows`, that of `key`; `partner` is the key of its other half.
#[inline(never)]
pub unsafe fn tell_displaced(key: &FlowKey, entry: *const Flow, partner: &FlowKey) {
    // SAFETY: the caller promises it; each field is one aligned read.
    let flow: &Flow = unsafe { &*entry };
    if flow.stage() != Stage::HalfOpen {
        return;
    }
    let Some(watch) = watched() else { return };
    let Some((slot, turn)) = take(watch) else { return };
    // SAFETY: as in `tell`.
    unsafe {
        (&raw mut (*slot).time).write_volatile(bpf_ktime_get_ns());
        (&raw mut (*slot).key.src).cast::<[u64; 2]>().write_volatile(key.src.words());
        (&raw mut (*slot).key.dst).cast::<[u64; 2]>().write_volatile(key.dst.words());
        let ports = (&raw const key.src_port).cast::<u64>().read_volatile();
        (&raw mut (*slot).key.src_port).cast::<u64>().write_volatile(ports);
        write_ends(slot, (&flow.src, flow.src_port), (&flow.dst, flow.dst_port));
        (&raw mut (*slot).service).write_volatile(flow.service);
        (&raw mut (*slot).backend).write_volatile(flow.backend);
        (&raw mut (*slot).packets_in).write_volatile(flow.passed().0 as u32);
        (&raw mut (*slot).bytes_in).write_volatile(flow.passed().1);
        (&raw mut (*slot).flags).write_volatile(flow.flags());
        (&raw mut (*slot).what).write_volatile(What::ended(Ended::Displaced).at(Place::Room));
        write_no_packet(slot);
        (&raw mut (*slot).packets_out).write_volatile(0);
        (&raw mut (*slot).bytes_out).write_volatile(0);
        if let Some(other) = FLOWS.get_ptr(partner) {
            (&raw mut (*slot).packets_out).write_volatile((*other).passed().0 as u32);
            (&raw mut (*slot).bytes_out).write_volatile((*other).passed().1);
        }
        atomic::publish(&raw mut (*slot).turn, turn);
    }
}

/// Writes the ends of a flow's packets as they leave.
///
/// # Safety
/// `slot` must be an element of `events` that was taken.
#[inline(always)]
unsafe fn write_ends(slot: *mut Event, src: (&Addr, Port), dst: (&Addr, Port)) {
    // SAFETY: the caller promises it.
    unsafe {
        (&raw mut (*slot).src).cast::<[u64; 2]>().write_volatile(src.0.words());
        (&raw mut (*slot).dst).cast::<[u64; 2]>().write_volatile(dst.0.words());
        (&raw mut (*slot).src_port).write_volatile(src.1);
        (&raw mut (*slot).dst_port).write_volatile(dst.1);
    }
}

/// Writes what is a packet's, of what is told of none.
///
/// # Safety
/// As [`write_ends`].
#[inline(always)]
unsafe fn write_no_packet(slot: *mut Event) {
    // SAFETY: the caller promises it.
    unsafe {
        (&raw mut (*slot).interface).write_volatile(0);
        (&raw mut (*slot).transport_flags).write_volatile(0);
        (&raw mut (*slot).length).write_volatile(0);
        (&raw mut (*slot).sequence).write_volatile(0);
    }
}

/// Packets and bytes of the client, and of the endpoint, of the flow with this key.
#[inline(always)]
fn totals(key: &FlowKey) -> [(u32, u64); 2] {
    let Some(own) = FLOWS.get_ptr(key) else { return [(0, 0); 2] };
    // SAFETY: elements of a map, valid until the program ends; each field is one aligned read.
    let own: &Flow = unsafe { &*own };
    let partner = own.partner(key.proto());
    let passed = own.passed();
    let passed = (passed.0 as u32, passed.1);
    let others = match FLOWS.get_ptr(&partner) {
        Some(other) => {
            // SAFETY: as above.
            let passed = unsafe { &*other }.passed();
            (passed.0 as u32, passed.1)
        }
        None => (0, 0),
    };
    if own.has(Flow::REPLY) { [others, passed] } else { [passed, others] }
}

/// Whether another packet of a marked flow may be told: each counts against what readers have asked for.
#[inline(always)]
fn allows_packet(watch: *mut Watch, key: &FlowKey) -> bool {
    // SAFETY: an element of an array, which stays; aligned words.
    unsafe {
        if (&raw const (*watch).packets_until).read_volatile() <= nanoseconds() {
            unmark(key);
            return false;
        }
        if atomic::fetch_add(&raw mut (*watch).packets, u64::MAX) as i64 > 0 {
            return true;
        }
        atomic::add(&raw mut (*watch).missed, 1);
    }
    false
}

/// Nobody asks for the packets of this flow any more.
#[inline(always)]
fn unmark(key: &FlowKey) {
    if let Some(entry) = FLOWS.get_ptr_mut(key) {
        // SAFETY: an element of a map, valid until the program ends; its flags lie in the first word.
        unsafe { atomic::clear_bits(entry.cast(), Flow::in_first_word(Flow::WATCHED)) };
    }
}

global! {
    /// Marks the flow that the walk is about to begin, if a reader wants its packets.
    pub fn mark as event_mark(scratch: mut Scratch) {
        let Some(watch) = WATCH.get_ptr(0) else { return };
        // SAFETY: an element of an array, which stays; a mark that is being changed fits or does not.
        unsafe {
            if (&raw const (*watch).packets_until).read_volatile() == 0 {
                return;
            }
            let (now, Scratch { packet, opening, flow, reply, .. }) = (nanoseconds(), scratch);
            let (mut fits, mut at) = (0, 0);
            while at < MARKS {
                let mark = &*(&raw const (*watch).marks).cast::<event::Mark>().add(at);
                fits |= mark.fits(now, &packet.src, opening.service) as u16;
                at += 1;
            }
            let flags = fits.wrapping_neg() & Flow::WATCHED;
            flow.set(flags);
            reply.set(flags);
        }
    }
}

/// A call of a socket.
pub struct Call {
    /// Where the caller is, as far as that is known.
    pub src: Addr,
    /// What it called.
    pub addr: Addr,
    /// The port that it called.
    pub port: Port,
    /// IP protocol number.
    pub proto: u8,
    /// The endpoint that it got.
    pub dst: Addr,
    /// Its port.
    pub dst_port: Port,
    /// Id of the service port.
    pub service: u32,
    /// Id of the backend.
    pub backend: u32,
}

/// Tells of a socket's call. Such a program can be interrupted by others while it has its slot: those that come round to it lose theirs.
#[inline(never)]
pub fn tell_call(call: &Call, what: What) {
    let Some(watch) = watched() else { return };
    let Some((slot, turn)) = take(watch) else { return };
    // SAFETY: as in `tell`.
    unsafe {
        (&raw mut (*slot).time).write_volatile(bpf_ktime_get_ns());
        let key = FlowKey::new(call.src, Port::ANY, call.addr, call.port, call.proto);
        (&raw mut (*slot).key).cast::<[u64; 5]>().write_volatile(bytemuck::must_cast(key));
        write_ends(slot, (&call.src, Port::ANY), (&call.dst, call.dst_port));
        (&raw mut (*slot).service).write_volatile(call.service);
        (&raw mut (*slot).backend).write_volatile(call.backend);
        (&raw mut (*slot).bytes_in).cast::<[u64; 3]>().write_volatile([0; 3]);
        (&raw mut (*slot).what).write_volatile(what);
        (&raw mut (*slot).flags).write_volatile(0);
        write_no_packet(slot);
        atomic::publish(&raw mut (*slot).turn, turn);
    }
}

/// The place of a hook.
#[inline(always)]
pub const fn place(hook: crate::path::Hook, is_xdp: bool) -> Place {
    use crate::path::Hook;
    match hook {
        Hook::UplinkIngress if is_xdp => Place::Xdp,
        Hook::UplinkIngress => Place::UplinkIn,
        Hook::UplinkEgress => Place::UplinkOut,
        Hook::PodIngress => Place::PodIn,
        Hook::PodEgress => Place::PodOut,
    }
}
