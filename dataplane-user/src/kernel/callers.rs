//! The filter of replies, in this process's memory: which addresses the replies of flows go to.
//!
//! A program marks a cell with its tick when a flow begins, then enters the flow; the agent alone clears cells. A cell that is
//! cleared although a flow needs it would leave replies untranslated. So only such a cell is cleared as was marked long before
//! the table of flows was read, has no flow in it, and holds the same mark still: programs may mark it at any moment.

use super::mapped::MappedWords;
use super::maps::{Map, MapError};
use dataplane_common::filter::{CALLER_CELLS, caller_cell, caller_mark, caller_tick};
use dataplane_common::flow::{FlowKey, ticks_since};
use dataplane_common::tables::{Callers, Table as _};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// After how many ticks a mark is old: the program that wrote or found it has long entered its flow.
const OLD: u32 = 8;

/// The cells, as long as they are mapped: between sweeps they need not be in this process's memory.
#[derive(Debug)]
pub struct CallerCells(MappedWords);

impl CallerCells {
    /// Maps the table.
    ///
    /// # Errors
    /// The kernel's, or [`MapError::Call`] if the table has another number of cells.
    pub fn map(table: &Map<Callers>) -> Result<Self, MapError> {
        if table.capacity() != CALLER_CELLS {
            let source = io::Error::from(io::ErrorKind::InvalidData);
            return Err(MapError::Call { verb: "map", name: Callers::NAME, source });
        }
        MappedWords::map(table).map(Self)
    }

    fn cells(&self) -> &[AtomicU64] {
        self.0.words()
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
