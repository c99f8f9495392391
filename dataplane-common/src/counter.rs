//! Counters of service ports and backends.

use crate::flow::Flow;
use bytemuck::{Pod, Zeroable};

/// Traffic of a service port or a backend: value of `service_traffic` and `backend_traffic`. 40 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Traffic {
    /// Packets from clients.
    pub packets_in: u64,
    /// Their bytes, from the network header on.
    pub bytes_in: u64,
    /// Packets from endpoints.
    pub packets_out: u64,
    /// Their bytes, from the network header on.
    pub bytes_out: u64,
    /// Flows begun, by packet or at connect time.
    pub new_flows: u64,
}

impl Traffic {
    /// What is counted in a half of a flow and in no total yet.
    pub fn of_half(flow: &Flow) -> Self {
        let (packets, bytes) = (flow.counted.packets(), flow.counted.bytes());
        if flow.has(Flow::REPLY) {
            Self { packets_out: packets, bytes_out: bytes, ..Self::default() }
        } else {
            Self { packets_in: packets, bytes_in: bytes, ..Self::default() }
        }
    }
}

impl core::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.packets_in += other.packets_in;
        self.bytes_in += other.bytes_in;
        self.packets_out += other.packets_out;
        self.bytes_out += other.bytes_out;
        self.new_flows += other.new_flows;
    }
}
