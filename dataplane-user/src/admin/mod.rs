//! `portolan status | services | backends | flows | drops | take-over`: what the pinned maps hold, as a table, as JSON or as YAML.
//!
//! Needs no agent and changes nothing. Names of Services are not in the kernel: they come from the file that the agent
//! keeps ([`names`]); without it, ids are shown.

pub mod names;

mod backends;
pub mod check;
pub mod clock;
mod columns;
mod drops;
pub mod explain;
mod flows;
#[cfg(test)]
mod reference;
pub mod remote;
pub mod report;
mod services;
pub mod status;
mod take_over;
pub mod watch;

use crate::config::{Output, ShowArgs};
use crate::kernel::conntrack::ConntrackError;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::pins::PinError;
use crate::kernel::rehearsal::RehearsalError;
use crate::kernel::whereabouts::WhereaboutsError;
use columns::Row;
use dataplane_common::tables::LAYOUT;
use names::Names;
use serde::Serialize;

pub use backends::BackendRow;
pub use drops::DropRow;
pub use flows::FlowRow;
pub use services::{AddressRow, ServiceRow, TrafficRow, TriesRow};
pub use take_over::{TakeOverPage, TranslatedRow};
pub use watch::EventLine;

/// Which tables are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Service ports, their addresses, endpoints and traffic.
    Services,
    /// Endpoints and their traffic.
    Backends,
    /// Flows, both directions in one row.
    Flows,
    /// What was dropped, refused or noted, and why.
    Drops,
    /// The connections that are left to another proxy.
    TakeOver,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// A map cannot be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The node's connections cannot be read.
    #[error(transparent)]
    Conntrack(#[from] ConntrackError),
    /// The pin folder cannot be read.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The programs cannot be rehearsed.
    #[error(transparent)]
    Rehearsal(#[from] RehearsalError),
    /// Nobody knows where packets come in or leave.
    #[error(transparent)]
    Whereabouts(#[from] WhereaboutsError),
    /// An end of a connection is none.
    #[error("{0}")]
    End(String),
    /// Something cannot be written.
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
    /// JSON cannot be written, or what the agent answered cannot be read.
    #[error("JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The rows cannot be written as YAML.
    #[error("cannot write YAML: {0}")]
    Yaml(#[from] serde_saphyr::ser::Error),
}

/// The text that the verb prints, with a closing line break.
///
/// # Errors
/// If there are no pinned maps in the folder, or they cannot be read.
pub fn show(view: View, args: &ShowArgs) -> Result<String, AdminError> {
    let maps = KernelMaps::open(&args.bpffs.join(LAYOUT))?;
    render(view, &maps, &Names::read(&args.bpffs), args.output)
}

/// [`show`] of maps that are open already.
///
/// # Errors
/// If a map cannot be read.
pub fn render(view: View, maps: &KernelMaps, names: &Names, output: Output) -> Result<String, AdminError> {
    match view {
        View::Services => print(&services::rows(maps, names)?, output),
        View::Backends => print(&backends::rows(maps, names)?, output),
        View::Flows => print(&flows::rows(maps, names, clock::read())?, output),
        View::Drops => {
            let mut rows = drops::rows(maps)?;
            match output {
                Output::Json | Output::Yaml | Output::Wide => {}
                // Who reads it looks for what happened here, not for all that could.
                Output::Table => rows.retain(|row| row.count > 0),
            }
            print(&rows, output)
        }
        View::TakeOver => {
            let page = take_over::page(maps, names)?;
            match output {
                Output::Json | Output::Yaml => structured(&page, output),
                Output::Table | Output::Wide => Ok(page.text()),
            }
        }
    }
}

fn print<R: Row + Serialize>(rows: &[R], output: Output) -> Result<String, AdminError> {
    match output {
        Output::Json | Output::Yaml => structured(&rows, output),
        Output::Table | Output::Wide => Ok(columns::table(rows)),
    }
}

/// For programs.
fn structured<T: Serialize>(value: &T, output: Output) -> Result<String, AdminError> {
    match output {
        Output::Yaml => Ok(serde_saphyr::to_string(value)?),
        Output::Json | Output::Table | Output::Wide => Ok(serde_json::to_string_pretty(value)? + "\n"),
    }
}
