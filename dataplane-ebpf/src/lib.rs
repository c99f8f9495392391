//! The packet path of Portolan's eBPF programs.
#![no_std]
