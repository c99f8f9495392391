//! Keeps the kernel's tables as `compile` says they should be.
//!
//! [`Mirror`] reads the kernel's maps once, when it starts, and from then on knows what they hold. A change of a Service
//! becomes the difference to the mirror, a list of [`Op`]s in an order of which every prefix is a consistent state, and
//! one apply. The kernel is trusted, not memory: [`Mirror::audit`] reads the maps again and repairs them.
//!
//! What it must never do: remove anything before the first complete snapshot ([`Mirror::replace`]) is in; give an id or
//! a run of slots out again within [`REST`]; look at a clock (time is an argument).
//!
//! ```text
//! let maps = Arc::new(KernelMaps::open(&folder)?);         // or MemoryMaps::default() for --dry-run
//! let mut mirror = Mirror::open(&*maps, now)?;
//! mirror.set_node(&*maps, &node_tables, now)?;             // whenever they change
//! mirror.replace(&*maps, all_services, now)?;              // the first complete snapshot, and after a relist
//! mirror.change(&*maps, [(&name, Some(&tables))], now)?;   // every change after it; None: the Service is gone
//! mirror.tick(&*maps, now)?;                               // every second or so: tries again what found no room
//! mirror.audit(&*maps, now)?;                              // now and then, and when asked
//! ```

mod audit;
#[cfg(test)]
pub(crate) mod checks;
mod filter;
mod ids;
mod maps;
mod mirror;
mod op;
mod plan;
mod recover;
mod slots;
#[cfg(test)]
mod tests;

pub use filter::LingeringBits;
pub use maps::{Maps, MemoryMaps};
pub use mirror::{Mirror, Outcome, Refused};
pub use op::{Op, apply};

use std::time::Duration;

/// How long a freed id, run of slots or filter bit rests before it is used again or cleared: no program runs as long.
pub const REST: Duration = Duration::from_secs(1);
