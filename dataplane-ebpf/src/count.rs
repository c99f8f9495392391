//! Counters. A missing one never changes what becomes of a packet.

use crate::maps::{BACKEND_TRAFFIC, REASONS, SERVICE_TRAFFIC};
use dataplane_common::counter::Traffic;
use dataplane_common::drop::Reason;

/// Counts one occurrence of a reason.
#[inline(always)]
pub fn reason(reason: Reason) {
    if let Some(count) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: an element of this CPU alone; programs at this hook do not interrupt each other.
        unsafe { *count += 1 };
    }
}

/// Whose packet is counted.
#[derive(Clone, Copy)]
pub enum Direction {
    /// From the client.
    In,
    /// From the endpoint.
    Out,
}

/// Counts a packet of `bytes` bytes (network header on) for a service port and its backend.
#[inline(always)]
pub fn packet(service: u32, backend: u32, direction: Direction, bytes: u32) {
    let add = |traffic: &mut Traffic| match direction {
        Direction::In => {
            traffic.packets_in += 1;
            traffic.bytes_in += bytes as u64;
        }
        Direction::Out => {
            traffic.packets_out += 1;
            traffic.bytes_out += bytes as u64;
        }
    };
    of_both(service, backend, add);
}

/// Counts a new flow.
#[inline(always)]
pub fn new_flow(service: u32, backend: u32) {
    of_both(service, backend, |traffic| traffic.new_flows += 1);
}

#[inline(always)]
fn of_both(service: u32, backend: u32, add: impl Fn(&mut Traffic)) {
    if let Some(traffic) = SERVICE_TRAFFIC.get_ptr_mut(service) {
        // SAFETY: an element of this CPU alone.
        add(unsafe { &mut *traffic });
    }
    if let Some(traffic) = BACKEND_TRAFFIC.get_ptr_mut(backend) {
        // SAFETY: as above.
        add(unsafe { &mut *traffic });
    }
}
