//! How many flows and connected sockets of each backend are open (L2), in this process's memory: what the agent removes or brings it
//! counts as the programs do, by one atomic addition.

use super::mapped::MappedWords;
use super::maps::{Map, MapError};
use dataplane_common::counter::Open;
use dataplane_common::tables::OpenCounts;
use std::sync::atomic::Ordering;

/// The counts, as long as they are mapped.
#[derive(Debug)]
pub struct OpenCells(MappedWords);

impl OpenCells {
    /// Maps the table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(table: &Map<OpenCounts>) -> Result<Self, MapError> {
        MappedWords::map(table).map(Self)
    }

    /// All of them at this moment, by backend.
    pub fn read(&self) -> Vec<Open> {
        self.0.words().iter().map(|word| Open::from_word(word.load(Ordering::SeqCst))).collect()
    }

    /// Counts a flow of a backend that began.
    pub fn begun(&self, backend: u32) {
        self.add(backend, Open::BEGUN);
    }

    /// Counts one off that ended.
    pub fn ended(&self, backend: u32) {
        self.add(backend, Open::ENDED);
    }

    /// Puts a count right by so many.
    pub fn correct(&self, backend: u32, by: i64) {
        self.add(backend, by as u64);
    }

    fn add(&self, backend: u32, what: u64) {
        if let Some(word) = self.0.words().get(backend as usize) {
            word.fetch_add(what, Ordering::SeqCst);
        }
    }
}
