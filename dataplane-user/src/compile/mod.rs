//! From objects to tables: the contract's sections 1, 2 and 4. Pure: no kernel, no client, no clock, no I/O.
//!
//! [`Compiler::update`] is the way in: it compiles the Services that are dirty ([`service()`]) and settles which of them
//! has an address that several claim. [`node()`] compiles the node's own tables.

pub mod claims;
pub mod complaint;
mod endpoints;
mod explain;
pub mod health_check;
pub mod node;
pub mod run;
pub mod selection;
pub mod service;
pub mod tables;
#[cfg(test)]
mod tests;
mod text;
pub mod update;

pub use complaint::{Complaint, ComplaintReason};
pub use explain::explain;
pub use health_check::{HealthCheck, health_check};
pub use node::{NodePortAddresses, NodeSettings, OwnAddresses, Sources, node, range_key};
pub use run::{Member, run};
pub use selection::Defaults;
pub use service::{Context, ExternalIps, service};
pub use tables::{Endpoint, NodeTables, PortTables, ServicePortName, ServiceTables};
pub use update::{Compiled, Compiler, Update};
