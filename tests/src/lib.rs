//! The laboratory, the packet builder and the program runner that the tests share.

pub mod controlplane;
pub mod lab;
