//! The frame of XDP: plain memory, with every access checked against its end. Where a packet lies in several buffers, that is the
//! first, which holds all headers.

use super::{ETHERNET, ETHERTYPE, Even, Frame, LINK_DESTINATION, LINK_SOURCE, Refused};
use crate::verdict::{Verdict, Way};
use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::generated::bpf_xdp_get_buff_len;
use aya_ebpf::helpers::{bpf_xdp_adjust_tail, bpf_xdp_load_bytes};
use core::ffi::c_void;
use dataplane_common::checksum::{Sum, update};

/// EtherTypes of VLAN tags: IEEE 802.1Q, and 802.1ad's outer one.
const VLAN: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
/// Bytes of a VLAN tag.
const TAG: u32 = 4;

/// A packet at XDP.
pub struct XdpFrame {
    ctx: *mut xdp_md,
}

impl XdpFrame {
    /// Wraps the context that the kernel hands to the program.
    ///
    /// # Safety
    /// `ctx` must be that pointer.
    pub const unsafe fn new(ctx: *mut xdp_md) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: `new` promises a valid context.
        unsafe { ((*self.ctx).data as usize, (*self.ctx).data_end as usize) }
    }

    #[inline(always)]
    fn at<const N: usize>(&self, offset: u32) -> Option<*mut [u8; N]> {
        let (data, end) = self.bounds();
        let start = data + offset as usize;
        if start + N > end {
            return None;
        }
        Some(start as *mut [u8; N])
    }

    fn forward(&mut self, way: &Way) -> u32 {
        if self.write(0, &way.destination_mac).is_err() || self.write(6, &way.source_mac).is_err() {
            return xdp_action::XDP_ABORTED;
        }
        // The walk leaves every other exit to tc.
        xdp_action::XDP_TX
    }
}

impl Frame for XdpFrame {
    const LEAVES_TO_TC: bool = true;

    /// Behind at most two VLAN tags (P21). What has more is nobody's.
    #[inline(always)]
    fn network(&mut self) -> Option<(u32, [u8; 2])> {
        let ethertype = self.read(ETHERTYPE)?;
        if !VLAN.contains(&ethertype) {
            return Some((ETHERNET, ethertype));
        }
        let ethertype = self.read(ETHERTYPE + TAG)?;
        if !VLAN.contains(&ethertype) {
            return Some((ETHERNET + TAG, ethertype));
        }
        Some((ETHERNET + 2 * TAG, self.read(ETHERTYPE + 2 * TAG)?))
    }

    #[inline(always)]
    fn is_tagged(&self, l3: u32) -> bool {
        l3 != ETHERNET
    }

    #[inline(always)]
    fn is_for_another_host(&self) -> bool {
        false
    }

    #[inline(always)]
    fn link_destination(&mut self) -> [u8; 6] {
        self.read(LINK_DESTINATION).unwrap_or_default()
    }

    #[inline(always)]
    fn link_source(&mut self) -> [u8; 6] {
        self.read(LINK_SOURCE).unwrap_or_default()
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { bpf_xdp_get_buff_len(self.ctx) as u32 }
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: `new` promises a valid context.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn read<const N: usize>(&mut self, offset: u32) -> Option<[u8; N]> {
        // SAFETY: `at` checked the bounds; the kernel aligns packet data, and every header in it, to two bytes.
        self.at::<N>(offset).map(|bytes| unsafe { (*bytes.cast::<Even<[u8; N]>>()).0 })
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), Refused> {
        let target = self.at::<N>(offset).ok_or(Refused)?;
        // SAFETY: as in `read`.
        unsafe { *target.cast::<Even<[u8; N]>>() = Even(*bytes) };
        Ok(())
    }

    #[inline(always)]
    fn update_checksum(
        &mut self,
        offset: u32,
        addresses: Sum,
        ports: Sum,
        optional: bool,
    ) -> Result<(), Refused> {
        let field = self.read::<2>(offset).ok_or(Refused)?;
        if optional && field == [0; 2] {
            return Ok(());
        }
        let new = update(field, Sum(addresses.0 + ports.0));
        self.write(offset, &if optional && new == [0; 2] { [0xff; 2] } else { new })
    }

    #[inline(always)]
    fn checksum_is_partial(&mut self, _offset: u32) -> bool {
        false
    }

    #[inline(always)]
    fn resize(&mut self, length: u32) -> Result<(), Refused> {
        let delta = length as i32 - self.length() as i32;
        // SAFETY: the context is valid, and no pointer into the packet lives across the call.
        if unsafe { bpf_xdp_adjust_tail(self.ctx, delta) } == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    unsafe fn copy(&mut self, offset: u32, length: u32, to: *mut u8) -> Result<(), Refused> {
        // SAFETY: the caller promises it; the context is valid.
        if unsafe { bpf_xdp_load_bytes(self.ctx, offset, to.cast(), length) } == 0 {
            Ok(())
        } else {
            Err(Refused)
        }
    }

    /// What is written by this is left to tc.
    #[inline(always)]
    unsafe fn store(&mut self, _offset: u32, _length: u32, _from: *const u8) -> Result<(), Refused> {
        Err(Refused)
    }

    /// As above.
    #[inline(always)]
    fn cut(&mut self, _length: u32) -> Result<(), Refused> {
        Err(Refused)
    }

    /// Nothing here has a mark: the walk leaves what needs one to tc.
    #[inline(always)]
    fn mark(&mut self, _bits: u32) {}

    #[inline(always)]
    fn finish(&mut self, verdict: Verdict, way: &Way, _ingress: bool) -> i32 {
        let action = match verdict {
            Verdict::Pass | Verdict::Begin | Verdict::Turn | Verdict::Refuse(_) | Verdict::LeaveToTc => {
                xdp_action::XDP_PASS
            }
            Verdict::Drop(_) => xdp_action::XDP_DROP,
            Verdict::Forward => self.forward(way),
            // The walk leaves all of these to tc; arriving here would be a mistake that shows as an abort.
            Verdict::HandUp | Verdict::SendOut | Verdict::Answer => xdp_action::XDP_ABORTED,
        };
        action as i32
    }
}
