//! Portolan's node agent: watches Services, EndpointSlices and Nodes, compiles them into tables, and keeps those
//! tables in the kernel.
//!
//! `watch` → [`model`] → [`compile`] (pure) → tables → `sync` (pure difference, then one apply) → `kernel`.

pub mod admin;
pub mod agent;
pub mod causes;
pub mod compile;
pub mod config;
pub mod expire;
pub mod health;
pub mod health_checks;
pub mod heartbeat;
pub mod http;
pub mod kernel;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod pattern;
pub mod pending;
pub mod recount;
pub mod snapshot;
pub mod status;
pub mod sync;
pub mod version;
pub mod watch;
