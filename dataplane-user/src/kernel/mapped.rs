//! The words of an array in this process's memory: programs and agent change them at the same time, each word by atomic operations.

use super::bpf::MapFd;
use super::maps::{Map, MapError};
use dataplane_common::tables::Table;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// Bytes of a word.
pub(super) const WORD: usize = size_of::<u64>();

/// The elements of a table whose values are whole words, as long as they are mapped.
#[derive(Debug)]
pub(super) struct MappedWords {
    address: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: words that are read and written atomically, in memory that lives as long as the mapping.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps the table.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn map<T: Table>(table: &Map<T>) -> Result<Self, MapError> {
        const { assert!(size_of::<T::Value>().is_multiple_of(WORD), "each value is whole words") };
        Self::of(table.raw()).map_err(|source| MapError::Call { verb: "map", name: T::NAME, source })
    }

    /// Maps an array whose values are whole words.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn of(array: &MapFd) -> io::Result<Self> {
        let words = array.shape().max_entries * (array.shape().value_size / WORD);
        let (protection, length) = (libc::PROT_READ | libc::PROT_WRITE, words * WORD);
        // SAFETY: a new mapping at an address that the kernel chooses; it is as long as the map's elements.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                array.as_fd().as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { address, words })
    }

    /// The words, those of the first element first.
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping lives as long as `self` and is aligned to a page; programs write whole words, or parts of words of which
        // another word tells that they are being written.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.words * WORD) };
    }
}
