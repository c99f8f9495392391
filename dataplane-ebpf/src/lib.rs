//! The packet path of Portolan's eBPF programs.
//!
//! [`path::walk`] is the whole of it: parse, flow, service, select, route, claim, translate. XDP and tc run the same walk
//! through a [`frame::Frame`]; a third frame over a byte slice lets parsing and rewriting be tested on the host.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key by value is one more copy on a stack of 512 bytes"
)]

#[cfg(test)]
extern crate std;

pub mod affinity;
pub mod atomic;
pub mod clock;
pub mod connect;
pub mod count;
pub mod event;
pub mod flow;
pub mod forward;
pub mod fragment;
pub mod frame;
pub mod global;
pub mod icmp;
pub mod interest;
pub mod kept;
pub mod limit;
pub mod maps;
pub mod nat;
pub mod outgoing;
pub mod parse;
pub mod path;
pub mod reject;
pub mod repeat;
pub mod ring;
pub mod scratch;
pub mod select;
pub mod service;
pub mod uplink;
pub mod verdict;
