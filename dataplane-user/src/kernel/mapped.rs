//! The words of an array in this process's memory: programs and agent change them at the same time, each word by atomic operations.

use super::maps::{Map, MapError};
use dataplane_common::tables::Table;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// The elements of a table whose values are words, as long as they are mapped.
#[derive(Debug)]
pub(super) struct MappedWords {
    address: NonNull<AtomicU64>,
    words: usize,
}

impl MappedWords {
    /// Maps the table.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn map<T: Table>(table: &Map<T>) -> Result<Self, MapError> {
        const { assert!(size_of::<T::Value>() == size_of::<u64>(), "each value is a word") };
        let failed = |source| MapError::Call { verb: "map", name: T::NAME, source };
        let (protection, words) = (libc::PROT_READ | libc::PROT_WRITE, table.capacity());
        // SAFETY: a new mapping at an address that the kernel chooses; it is as long as the map's elements.
        let address = unsafe {
            let fd = table.as_fd().as_raw_fd();
            libc::mmap(std::ptr::null_mut(), words * size_of::<u64>(), protection, libc::MAP_SHARED, fd, 0)
        };
        if address == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let address = NonNull::new(address.cast());
        let address = address.ok_or_else(|| failed(io::Error::from(io::ErrorKind::AddrNotAvailable)))?;
        Ok(Self { address, words })
    }

    /// The words, by the index of their element.
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping lives as long as `self` and is aligned to a page; programs write whole words.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.words * size_of::<u64>()) };
    }
}
