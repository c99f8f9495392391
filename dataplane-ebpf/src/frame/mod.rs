//! The three shapes in which a packet comes: XDP, a socket buffer, a byte slice.

#[cfg(test)]
pub(crate) mod sample;
pub mod skb;
#[cfg(test)]
pub mod slice;
pub mod xdp;

use crate::verdict::{Verdict, Way};
use core::ffi::c_void;
use dataplane_common::checksum::Sum;

/// Bytes of an Ethernet header.
pub const ETHERNET: u32 = 14;
/// Offset of the EtherType in it.
const ETHERTYPE: u32 = 12;
/// Offset of the destination address in it.
const LINK_DESTINATION: u32 = 0;
/// Offset of the source address in it.
const LINK_SOURCE: u32 = 6;

/// Bytes that begin at an even address, so that the compiler may load them two by two.
#[derive(Clone, Copy)]
#[repr(C, align(2))]
struct Even<T>(T);

/// The kernel refused to change the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// A packet with its link-layer header, as the walk sees it. Offsets count from the first byte of that header.
pub trait Frame {
    /// Whether this is XDP: what it cannot finish it leaves unwritten to tc.
    const LEAVES_TO_TC: bool;

    /// The network header: its offset, and the EtherType that says of which kind it is.
    fn network(&mut self) -> Option<(u32, [u8; 2])>;

    /// Whether its packets have VLAN tags, or the like, in front of that header: a route's link-layer header does not fit.
    fn is_tagged(&self, l3: u32) -> bool;

    /// Whether the kernel found it to be addressed to another host of its link. XDP comes before that is found out.
    fn is_for_another_host(&self) -> bool;

    /// The link-layer destination address; all zero where there is none.
    fn link_destination(&mut self) -> [u8; 6];

    /// The link-layer source address; all zero where there is none.
    fn link_source(&mut self) -> [u8; 6];

    /// Length in bytes; for a packet that will be segmented, of all segments together.
    fn length(&self) -> u32;

    /// Bytes of data behind the transport header in each segment, if the packet is to be segmented; else 0.
    fn segment_size(&self) -> u32;

    /// The program's context, for helpers that ask for it.
    fn context(&self) -> *mut c_void;

    /// Index of the interface it came in on (ingress) or leaves by (egress).
    fn ifindex(&self) -> u32;

    /// `N` bytes from `offset` on, or `None` if the frame ends before.
    fn read<const N: usize>(&mut self, offset: u32) -> Option<[u8; N]>;

    /// Writes `N` bytes at `offset`.
    ///
    /// # Errors
    /// [`Refused`] if the frame ends before, or has no memory to be written to.
    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), Refused>;

    /// The same where no checksum of the network header makes up for the change (IPv6): a sum that the device computed over
    /// the packet (`CHECKSUM_COMPLETE`) follows it.
    ///
    /// # Errors
    /// As [`Frame::write`].
    #[inline(always)]
    fn write_counted<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), Refused> {
        self.write(offset, bytes)
    }

    /// Updates the transport checksum at `offset` after the addresses (in the pseudo header) and the ports changed.
    /// `optional`: a checksum of zero means none and stays (UDP, RFC 768).
    ///
    /// # Errors
    /// As [`Frame::write`].
    fn update_checksum(
        &mut self,
        offset: u32,
        addresses: Sum,
        ports: Sum,
        optional: bool,
    ) -> Result<(), Refused>;

    /// Whether the transport checksum at `offset` is only begun and left to the device to finish
    /// (`CHECKSUM_PARTIAL`): the field then holds the sum of the pseudo header alone. Otherwise the field may be changed by
    /// the question: the caller writes it.
    fn checksum_is_partial(&mut self, offset: u32) -> bool;

    /// Updates the CRC32c at `offset` after covered data changed by what `delta` says (SCTP). One that is left to the device
    /// stays as it is: the device takes it over the packet as it leaves.
    ///
    /// # Errors
    /// As [`Frame::write`].
    #[inline(always)]
    fn update_crc32c(&mut self, offset: u32, delta: u32) -> Result<(), Refused> {
        let before = self.read::<4>(offset).ok_or(Refused)?;
        if self.checksum_is_partial(offset) {
            return Ok(());
        }
        self.write(offset, &(u32::from_le_bytes(before) ^ delta).to_le_bytes())
    }

    /// Cuts or pads the frame to `length` bytes.
    ///
    /// # Errors
    /// As [`Frame::write`].
    fn resize(&mut self, length: u32) -> Result<(), Refused>;

    /// Copies `length` bytes from `offset` on to memory.
    ///
    /// # Errors
    /// [`Refused`] if the frame ends before.
    ///
    /// # Safety
    /// `to` must have room for them. There must be at least one, and the verifier must see how many there are at most.
    unsafe fn copy(&mut self, offset: u32, length: u32, to: *mut u8) -> Result<(), Refused>;

    /// Writes `length` bytes of memory at `offset`, as [`Frame::write_counted`] does.
    ///
    /// # Errors
    /// As [`Frame::write`].
    ///
    /// # Safety
    /// As [`Frame::copy`].
    unsafe fn store(&mut self, offset: u32, length: u32, from: *const u8) -> Result<(), Refused>;

    /// Takes away `length` bytes behind the link-layer header.
    ///
    /// # Errors
    /// [`Refused`] if too little would be left, or the hook cannot.
    fn cut(&mut self, length: u32) -> Result<(), Refused>;

    /// Sets bits of the packet's mark, for netfilter and rules of routing.
    fn mark(&mut self, bits: u32);

    /// Turns a verdict into the return code of the hook. `ingress`: the hook is on the way in.
    fn finish(&mut self, verdict: Verdict, way: &Way, ingress: bool) -> i32;
}
