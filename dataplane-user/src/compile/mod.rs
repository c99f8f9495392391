//! From objects to tables: the contract's sections 1, 2 and 4. Pure: no kernel, no client, no clock, no I/O.

pub mod tables;

pub use tables::{Endpoint, NodeTables, PortTables, ServicePortName, ServiceTables};
