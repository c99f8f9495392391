//! The filter of replies, in this process's memory: which addresses the replies of flows go to.
//!
//! A program marks a cell with its tick when a flow begins, then enters the flow; the agent alone clears cells. A cell that is
//! cleared although a flow needs it would leave replies untranslated. So only such a cell is cleared as was marked long before
//! the table of flows was read, has no flow in it, and holds the same mark still: programs may mark it at any moment.

use super::maps::{Map, MapError};
use dataplane_common::filter::{CALLER_CELLS, caller_cell, caller_mark, caller_tick};
use dataplane_common::flow::{FlowKey, ticks_since};
use dataplane_common::tables::Callers;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// After how many ticks a mark is old: the program that wrote or found it has long entered its flow.
const OLD: u32 = 8;

/// Bytes of the map's elements.
const LENGTH: usize = CALLER_CELLS * size_of::<u64>();

/// The cells, as long as they are mapped: between sweeps they need not be in this process's memory.
#[derive(Debug)]
pub struct CallerCells(NonNull<AtomicU64>);

impl CallerCells {
    /// Maps the table.
    ///
    /// # Errors
    /// The kernel's, or [`MapError::Shape`] if the table has another number of cells.
    pub fn map(table: &Map<Callers>) -> Result<Self, MapError> {
        let failed = |source| MapError::Call { verb: "map", name: "callers", source };
        if table.capacity() != CALLER_CELLS {
            return Err(failed(io::Error::from(io::ErrorKind::InvalidData)));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses; it is as long as the map's elements.
        let address = unsafe {
            let fd = table.as_fd().as_raw_fd();
            libc::mmap(std::ptr::null_mut(), LENGTH, protection, libc::MAP_SHARED, fd, 0)
        };
        if address == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let cells = NonNull::new(address.cast());
        cells.map(Self).ok_or_else(|| failed(io::Error::from(io::ErrorKind::AddrNotAvailable)))
    }

    fn cells(&self) -> &[AtomicU64] {
        // SAFETY: the mapping lives as long as `self` and is aligned to a page; programs write whole words.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), CALLER_CELLS) }
    }

    /// Marks all cells. For a table that is new or was in other programs' hands: flows may be there whose cells nobody marked.
    pub fn mark_all(&self, tick: u32) {
        self.cells().iter().for_each(|cell| cell.store(caller_mark(tick), Ordering::Relaxed));
    }

    /// The cells whose marks are old at the tick `now`. To be asked before the flows are read.
    pub fn old(&self, now: u32) -> OldMarks {
        let marks = (0..).zip(self.cells()).map(|(index, cell)| (index, cell.load(Ordering::Relaxed)));
        let is_old = |mark: u64| mark != 0 && ticks_since(caller_tick(mark), now) >= OLD;
        OldMarks(marks.filter(|(_, mark)| is_old(*mark)).collect())
    }

    /// Clears the cells that hold these marks still.
    pub fn clear(&self, marks: &OldMarks) {
        for (index, mark) in &marks.0 {
            if let Some(cell) = self.cells().get(*index as usize) {
                // One that was marked anew meanwhile is needed.
                let _ = cell.compare_exchange(*mark, 0, Ordering::SeqCst, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for CallerCells {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), LENGTH) };
    }
}

/// Cells and their marks, which may be cleared if no flow needs them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OldMarks(HashMap<u32, u64>);

impl OldMarks {
    /// Takes the cell out that replies with this key must find marked.
    pub fn keep_for(&mut self, key: &FlowKey) {
        if !self.0.is_empty() {
            self.0.remove(&caller_cell(&key.dst, key.proto()));
        }
    }
}
