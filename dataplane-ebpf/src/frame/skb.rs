//! The frame of tc: a socket buffer. Written through helpers only, so that a clone is copied when, and only when, the
//! packet is really changed, and checksums left to the device stay right.

use super::{ETHERNET, ETHERTYPE, Even, Frame, LINK_DESTINATION, LINK_SOURCE, Refused};
use crate::forward;
use crate::verdict::{Verdict, Way};
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT,
    TC_ACT_UNSPEC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
};
use aya_ebpf::helpers::{
    bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_skb_adjust_room, bpf_skb_change_head,
    bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skb_vlan_pop,
};
use core::ffi::c_void;
use dataplane_common::checksum::Sum;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// A packet at tc, behind `LINK` bytes of a link-layer header: [`ETHERNET`], or none on a device whose packets have none, as a
/// TUN device's.
pub struct SkbFrame<const LINK: u32> {
    skb: *mut __sk_buff,
}

impl<const LINK: u32> SkbFrame<LINK> {
    /// Wraps the context that the kernel hands to the program.
    ///
    /// # Safety
    /// `skb` must be that pointer.
    pub const unsafe fn new(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

    #[inline(always)]
    fn linear<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // SAFETY: `new` promises a valid context.
        let (data, end) = unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) };
        let start = data + offset as usize;
        if start + N > end {
            return None;
        }
        // SAFETY: the bounds were just checked; the kernel aligns packet data, and every header in it, to two bytes.
        Some(unsafe { (*(start as *const Even<[u8; N]>)).0 })
    }

    /// Puts room for an Ethernet header in front of a packet that has none: without one nothing can be sent to a device that
    /// asks for it, nor to a neighbour.
    #[inline(always)]
    fn add_link(&mut self) -> Result<(), Refused> {
        if LINK == ETHERNET {
            return Ok(());
        }
        // SAFETY: the context is valid, and no pointer into the packet lives across the call.
        if unsafe { bpf_skb_change_head(self.skb, ETHERNET, 0) } == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Takes away a VLAN tag, which says where the packet came from, not where it goes: a device that adds one does so itself.
    #[inline(always)]
    fn remove_tag(&mut self) -> Result<(), Refused> {
        // SAFETY: `new` promises a valid context, and no pointer into the packet lives across the call.
        let removed = unsafe { (*self.skb).vlan_present == 0 || bpf_skb_vlan_pop(self.skb) == 0 };
        if removed { Ok(()) } else { Err(Refused) }
    }

    /// To the way's interface, which has an Ethernet header if it has an address: up the stack as if it had come in there, or as what
    /// leaves there (`flags` of `bpf_redirect`). `source`: its link-layer source where it has no such header yet.
    #[inline(always)]
    fn hand_to(&mut self, way: &Way, flags: u32, source: [u8; 6]) -> Result<i32, Refused> {
        const NO_ADDRESS: [u8; 6] = [0; 6];
        self.remove_tag()?;
        if LINK == ETHERNET {
            self.write(0, &way.destination_mac)?;
        } else if way.destination_mac != NO_ADDRESS {
            let (_, [high, low]) = self.network().ok_or(Refused)?;
            self.add_link()?;
            let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (way.destination_mac, source);
            self.write(0, &[a, b, c, d, e, f, g, h, i, j, k, l, high, low])?;
        }
        // SAFETY: a helper without pointers.
        Ok(unsafe { bpf_redirect(way.ifindex, flags as u64) as i32 })
    }

    fn redirect_to(&mut self, way: &Way, ingress: bool) -> i32 {
        if self.remove_tag().is_err() || self.add_link().is_err() {
            return TC_ACT_SHOT;
        }
        if !ingress && !way.resolved {
            // What waits for its neighbour's address is sent to the neighbour of its route when that comes (`neigh_update`), and
            // what the node sends has a route: the one to the Service's address. Without a next hop the helper gives it a new one.
            // SAFETY: a helper to which no pointer is given.
            return unsafe { bpf_redirect_neigh(way.ifindex, core::ptr::null_mut(), 0, 0) as i32 };
        }
        // An IPv4 address is read from the first word.
        let ipv6_nh = forward::words(&way.neighbour);
        let mut neighbour = bpf_redir_neigh {
            nh_family: if way.neighbour.is_v4() { AF_INET } else { AF_INET6 },
            __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh },
        };
        // SAFETY: the parameters live on the stack for the whole call.
        let code = unsafe {
            bpf_redirect_neigh(way.ifindex, &mut neighbour, size_of::<bpf_redir_neigh>() as i32, 0)
        };
        code as i32
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N], flags: u64) -> Result<(), Refused> {
        // SAFETY: context and bytes are valid for the whole call.
        let result = unsafe { bpf_skb_store_bytes(self.skb, offset, bytes.as_ptr().cast(), N as u32, flags) };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    fn swap_macs(&mut self) -> Result<(), Refused> {
        let macs = self.read::<12>(0).ok_or(Refused)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = macs;
        self.write(0, &[g, h, i, j, k, l, a, b, c, d, e, f])
    }
}

impl<const LINK: u32> Frame for SkbFrame<LINK> {
    const LEAVES_TO_TC: bool = false;

    #[inline(always)]
    fn network(&mut self) -> Option<(u32, [u8; 2])> {
        if LINK == ETHERNET {
            return Some((LINK, self.read(ETHERTYPE)?));
        }
        // SAFETY: `new` promises a valid context. The two bytes lie in network order in the first half of the word.
        let protocol = unsafe { (*self.skb).protocol };
        Some((LINK, (protocol as u16).to_ne_bytes()))
    }

    /// A tag is no part of the packet here.
    #[inline(always)]
    fn is_tagged(&self, _l3: u32) -> bool {
        // SAFETY: `new` promises a valid context.
        unsafe { (*self.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn is_for_another_host(&self) -> bool {
        /// `PACKET_OTHERHOST`.
        const OTHER_HOST: u32 = 3;
        // SAFETY: `new` promises a valid context.
        LINK == ETHERNET && unsafe { (*self.skb).pkt_type } == OTHER_HOST
    }

    #[inline(always)]
    fn link_destination(&mut self) -> [u8; 6] {
        if LINK == ETHERNET { self.read(LINK_DESTINATION).unwrap_or_default() } else { [0; 6] }
    }

    #[inline(always)]
    fn link_source(&mut self) -> [u8; 6] {
        if LINK == ETHERNET { self.read(LINK_SOURCE).unwrap_or_default() } else { [0; 6] }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: `new` promises a valid context.
        unsafe { (*self.skb).len }
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        // SAFETY: `new` promises a valid context.
        unsafe { (*self.skb).gso_size }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.skb.cast()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: `new` promises a valid context.
        unsafe { (*self.skb).ifindex }
    }

    #[inline(always)]
    fn read<const N: usize>(&mut self, offset: u32) -> Option<[u8; N]> {
        if let Some(bytes) = self.linear(offset) {
            return Some(bytes);
        }
        let wanted = offset + N as u32;
        if wanted > self.length() {
            return None;
        }
        // SAFETY: the context is valid, and no pointer into the packet lives across the call.
        if unsafe { bpf_skb_pull_data(self.skb, wanted) } != 0 {
            return None;
        }
        self.linear(offset)
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), Refused> {
        self.store(offset, bytes, 0)
    }

    #[inline(always)]
    fn write_counted<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), Refused> {
        self.store(offset, bytes, BPF_F_RECOMPUTE_CSUM as u64)
    }

    #[inline(always)]
    fn update_checksum(
        &mut self,
        offset: u32,
        addresses: Sum,
        ports: Sum,
        optional: bool,
    ) -> Result<(), Refused> {
        // The low four bits of the flags say the size of a field; 0 means that `to` is a difference of sums.
        let marks = if optional { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        let pseudo = marks | BPF_F_PSEUDO_HDR as u64;
        // SAFETY: helpers without pointers beside the valid context.
        let failed = unsafe {
            bpf_l4_csum_replace(self.skb, offset, 0, addresses.wide() as u64, pseudo) != 0
                || (ports.0 != 0 && bpf_l4_csum_replace(self.skb, offset, 0, ports.wide() as u64, marks) != 0)
        };
        if failed { Err(Refused) } else { Ok(()) }
    }

    fn checksum_is_partial(&mut self, offset: u32) -> bool {
        // The kernel does not say it, but shows it: it leaves such a field alone when told that covered data changed.
        let Some(before) = self.read::<2>(offset) else { return false };
        let probe = Sum(if before == [0xff, 0xfe] { 2 } else { 1 });
        // SAFETY: a helper without pointers beside the valid context.
        let result = unsafe { bpf_l4_csum_replace(self.skb, offset, 0, probe.wide() as u64, 0) };
        result == 0 && self.read::<2>(offset) == Some(before)
    }

    #[inline(always)]
    fn resize(&mut self, length: u32) -> Result<(), Refused> {
        // SAFETY: the context is valid, and no pointer into the packet lives across the call.
        if unsafe { bpf_skb_change_tail(self.skb, length, 0) } == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    unsafe fn copy(&mut self, offset: u32, length: u32, to: *mut u8) -> Result<(), Refused> {
        // SAFETY: the caller promises it; the context is valid.
        if unsafe { bpf_skb_load_bytes(self.skb.cast(), offset, to.cast(), length) } == 0 {
            Ok(())
        } else {
            Err(Refused)
        }
    }

    #[inline(always)]
    unsafe fn store(&mut self, offset: u32, length: u32, from: *const u8) -> Result<(), Refused> {
        // SAFETY: as above; no pointer into the packet lives across the call.
        let result = unsafe {
            bpf_skb_store_bytes(self.skb, offset, from.cast(), length, BPF_F_RECOMPUTE_CSUM as u64)
        };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    fn cut(&mut self, length: u32) -> Result<(), Refused> {
        // SAFETY: the context is valid, and no pointer into the packet lives across the call.
        let result = unsafe { bpf_skb_adjust_room(self.skb, -(length as i32), BPF_ADJ_ROOM_MAC, 0) };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    fn mark(&mut self, bits: u32) {
        // SAFETY: `new` promises a valid context, whose mark a program may write.
        unsafe { (*self.skb).mark |= bits };
    }

    #[inline(always)]
    fn finish(&mut self, verdict: Verdict, way: &Way, ingress: bool) -> i32 {
        match verdict {
            // Not TC_ACT_OK, which would end the chain for the programs of others.
            Verdict::Pass | Verdict::Begin | Verdict::Turn | Verdict::Refuse(_) | Verdict::LeaveToTc => {
                TC_ACT_UNSPEC
            }
            Verdict::Drop(_) => TC_ACT_SHOT,
            Verdict::Forward => self.redirect_to(way, ingress),
            Verdict::HandUp => self.hand_to(way, BPF_F_INGRESS, [0; 6]).unwrap_or(TC_ACT_SHOT),
            // Replies go up by the address that the node's own packets come from.
            Verdict::SendOut => self.hand_to(way, 0, way.source_mac).unwrap_or(TC_ACT_SHOT),
            Verdict::Answer => {
                if LINK == ETHERNET && self.swap_macs().is_err() {
                    return TC_ACT_SHOT;
                }
                let flags = if ingress { 0 } else { BPF_F_INGRESS as u64 };
                // SAFETY: a helper without pointers.
                unsafe { bpf_redirect(self.ifindex(), flags) as i32 }
            }
        }
    }
}
