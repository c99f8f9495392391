//! The contract between Portolan's agent and its eBPF programs: every map's name, key, value and capacity, and the
//! numbers both sides must agree on.
//!
//! This crate is `no_std`, knows bytes only, and never does I/O. Keys and values are `repr(C)` and `Pod`, without
//! padding, and the byte order of a field lies in its type.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod affinity;
pub mod answers;
pub mod backend;
pub mod checksum;
pub mod counter;
pub mod crc32c;
pub mod drop;
pub mod event;
pub mod filter;
pub mod flow;
pub mod fragment;
pub mod frontend;
pub mod hash;
pub mod kept;
pub mod node;
pub mod range;
pub mod service;
pub mod socket;
pub mod tables;
pub mod uplink;
pub mod word;

pub use addr::{Addr, Port, Protocol};
pub use word::read_word;
