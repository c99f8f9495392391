//! A frame over bytes in memory, for tests on the host.

use super::{ETHERNET, ETHERTYPE, Frame, LINK_DESTINATION, LINK_SOURCE, Refused};
use crate::verdict::{Verdict, Way};
use core::ffi::c_void;
use dataplane_common::checksum::{Sum, update};
use std::vec::Vec;

/// A packet in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceFrame {
    /// The bytes, from the link-layer header on.
    pub bytes: Vec<u8>,
    /// Whether the transport checksum is left to the device.
    pub partial: bool,
    /// The bits that were set in its mark.
    pub mark: u32,
}

impl SliceFrame {
    /// A frame whose checksums are complete.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into(), partial: false, mark: 0 }
    }
}

impl Frame for SliceFrame {
    const LEAVES_TO_TC: bool = false;

    fn network(&mut self) -> Option<(u32, [u8; 2])> {
        Some((ETHERNET, self.read(ETHERTYPE)?))
    }

    fn is_tagged(&self, l3: u32) -> bool {
        l3 != ETHERNET
    }

    fn is_for_another_host(&self) -> bool {
        false
    }

    fn link_destination(&mut self) -> [u8; 6] {
        self.read(LINK_DESTINATION).unwrap_or_default()
    }

    fn link_source(&mut self) -> [u8; 6] {
        self.read(LINK_SOURCE).unwrap_or_default()
    }

    fn length(&self) -> u32 {
        self.bytes.len() as u32
    }

    fn segment_size(&self) -> u32 {
        0
    }

    fn context(&self) -> *mut c_void {
        core::ptr::null_mut()
    }

    fn ifindex(&self) -> u32 {
        1
    }

    fn read<const N: usize>(&mut self, offset: u32) -> Option<[u8; N]> {
        self.bytes.get(offset as usize..)?.first_chunk().copied()
    }

    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), Refused> {
        let start = offset as usize;
        self.bytes.get_mut(start..start + N).ok_or(Refused)?.copy_from_slice(bytes);
        Ok(())
    }

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
        if self.partial {
            let sum = Sum(u64::from(u16::from_ne_bytes(field)) + addresses.0).fold();
            return self.write(offset, &sum.to_ne_bytes());
        }
        let new = update(field, Sum(addresses.0 + ports.0));
        self.write(offset, &if optional && new == [0; 2] { [0xff; 2] } else { new })
    }

    fn checksum_is_partial(&mut self, _offset: u32) -> bool {
        self.partial
    }

    fn resize(&mut self, length: u32) -> Result<(), Refused> {
        self.bytes.resize(length as usize, 0);
        Ok(())
    }

    unsafe fn copy(&mut self, offset: u32, length: u32, to: *mut u8) -> Result<(), Refused> {
        let (start, length) = (offset as usize, length as usize);
        let bytes = self.bytes.get(start..start + length).ok_or(Refused)?;
        // SAFETY: the caller promises it.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, length) };
        Ok(())
    }

    unsafe fn store(&mut self, offset: u32, length: u32, from: *const u8) -> Result<(), Refused> {
        let (start, length) = (offset as usize, length as usize);
        // SAFETY: the caller promises it.
        let bytes = unsafe { core::slice::from_raw_parts(from, length) };
        self.bytes.get_mut(start..start + length).ok_or(Refused)?.copy_from_slice(bytes);
        Ok(())
    }

    fn cut(&mut self, length: u32) -> Result<(), Refused> {
        let behind = ETHERNET as usize + length as usize;
        if behind > self.bytes.len() {
            return Err(Refused);
        }
        self.bytes.drain(ETHERNET as usize..behind);
        Ok(())
    }

    fn mark(&mut self, bits: u32) {
        self.mark |= bits;
    }

    fn finish(&mut self, verdict: Verdict, _way: &Way, _ingress: bool) -> i32 {
        i32::from(matches!(verdict, Verdict::Drop(_)))
    }
}
