//! Fragments: what the first one of a datagram says, remembered for those that follow it (P20).

use crate::flow::{TICK_MASK, ticks_between};
use crate::{Addr, Port};
use bytemuck::{Pod, Zeroable};

/// What all fragments of a datagram have in common, as they arrive (RFC 791 section 3.2, RFC 8200 section 4.5). 40 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification, as its bytes stand in the packet.
    id: u32,
    proto: u32,
}

impl FragmentKey {
    /// The key of a fragment from `src` to `dst`. Over IPv6 the protocol counts with the first fragment only: pass 0.
    #[inline(always)]
    pub const fn new(src: Addr, dst: Addr, id: u32, proto: u8) -> Self {
        Self { src, dst, id, proto: proto as u32 }
    }
}

/// The transport ports of a datagram, and when its first fragment came. One word, so that a reader never sees half of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct FragmentPorts {
    /// Source port.
    pub src_port: Port,
    /// Destination port.
    pub dst_port: Port,
    /// Tick in the upper 24 bits, protocol number in the lower 8.
    tick_and_proto: u32,
}

/// For how many ticks the first fragment of a datagram is remembered: about half a minute, as long as Linux waits
/// for the rest of a datagram.
pub const FRAGMENT_TICKS: u32 = 30;

impl FragmentPorts {
    /// What a first fragment says that came at the tick `now`.
    #[inline(always)]
    pub const fn new(src_port: Port, dst_port: Port, proto: u8, now: u32) -> Self {
        Self { src_port, dst_port, tick_and_proto: (now & TICK_MASK) << 8 | proto as u32 }
    }

    /// IP protocol number.
    #[inline(always)]
    pub const fn proto(self) -> u8 {
        self.tick_and_proto as u8
    }

    /// Whether it still counts at the tick `now`: an identification is used again.
    #[inline(always)]
    pub const fn is_fresh(self, now: u32) -> bool {
        ticks_between(self.tick_and_proto >> 8, now) <= FRAGMENT_TICKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_fragment_is_forgotten_after_its_time_also_when_ticks_wrap() {
        for then in [7, TICK_MASK - 3] {
            let ports = FragmentPorts::new(Port::new(1), Port::new(2), 17, then);
            assert_eq!(ports.proto(), 17);
            assert!(ports.is_fresh(then) && ports.is_fresh((then + FRAGMENT_TICKS) & TICK_MASK));
            assert!(!ports.is_fresh((then + FRAGMENT_TICKS + 1) & TICK_MASK));
        }
    }
}
