//! The last good snapshot: the objects as they were last told, kept on disk. A node that boots while the API server is away
//! serves what it knew.
//!
//! A file is trusted only if every byte of it is as it was written, by this version's format, for this node, by root.
//! Anything else is set aside under another name and never half used. Nothing here knows the kernel or the API server.

mod file;
mod format;
pub mod servers;

pub use file::{File, Loaded, SnapshotError, remove};
pub use format::{Owner, Refusal, VERSION};
#[cfg(test)]
pub(crate) use format::{read, write};
