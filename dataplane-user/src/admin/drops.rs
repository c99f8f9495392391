//! `portolan drops`.

use super::columns::Row;
use crate::kernel::maps::{KernelMaps, MapError};
use dataplane_common::drop::{Disposition, Reason};
use dataplane_common::tables;
use serde::Serialize;

/// A reason and how often it occurred.
#[derive(Clone, Debug, Serialize)]
pub struct DropRow {
    /// Its name.
    pub reason: &'static str,
    /// How often since the maps were made.
    pub count: u64,
    /// `dropped`, `rejected` or `noted`.
    pub disposition: &'static str,
    /// When it happens and what can be done.
    pub help: &'static str,
}

impl Row for DropRow {
    const HEADINGS: &'static [&'static str] = &["REASON", "COUNT", "PACKETS-WERE", "WHAT-IT-MEANS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.reason.to_owned(),
            self.count.to_string(),
            self.disposition.to_owned(),
            self.help.to_owned(),
        ]
    }
}

/// All reasons in the order of their numbers, also those that never occurred.
pub(super) fn rows(maps: &KernelMaps) -> Result<Vec<DropRow>, MapError> {
    let reasons = maps.map::<tables::Reasons>()?;
    let row = |reason: &Reason| {
        Ok(DropRow {
            reason: reason.label(),
            count: reasons.sum(&u32::from(*reason as u8))?.unwrap_or_default(),
            disposition: match reason.disposition() {
                Disposition::Dropped => "dropped",
                Disposition::Rejected => "rejected",
                Disposition::Noted => "noted",
            },
            help: reason.help().trim(),
        })
    };
    Reason::ALL.iter().map(row).collect()
}
