//! Whoever watches the programs that are run by hand.

use super::{Hook, World, build};
use anyhow::{Context as _, Result};
use dataplane_common::event::Watch;
use dataplane_common::tables;
use dataplane_user::kernel::bpf;
use dataplane_user::kernel::events::{EventRing, Reader};
use dataplane_user::kernel::maps::KernelMaps;
use std::sync::PoisonError;

impl World {
    /// A reader of events, from now on, for as long as a lease lasts: the programs at these hooks are loaded before, which takes longer.
    ///
    /// # Errors
    /// If the kernel does not take a program, or does not map the ring.
    pub fn watch(&self, hooks: &[Hook]) -> Result<Reader> {
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        hooks.iter().try_for_each(|hook| object.load(hook.program()))?;
        Ok(Reader::new(EventRing::open(&self.maps)?))
    }

    /// Whether anybody watches, and how far the ring has come.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub fn watch_state(&self) -> Result<Watch> {
        self.maps.map::<tables::Watches>()?.get(&0)?.context("an array has its element")
    }

    /// Takes a turn of the ring, and writes nothing.
    ///
    /// # Errors
    /// As [`World::watch_state`].
    pub fn skip_turn(&self) -> Result<()> {
        let mut state = self.watch_state()?;
        state.head += 1;
        Ok(self.maps.map::<tables::Watches>()?.insert(&0, &state, bpf::ANY)?)
    }

    /// Sends a packet, and looks at nothing.
    ///
    /// # Errors
    /// As [`World::send`].
    pub fn run_once(&self, hook: Hook, packet: &build::Packet) -> Result<()> {
        self.time(hook, &packet.bytes()).map(drop)
    }

    /// The tables.
    pub fn maps(&self) -> &KernelMaps {
        &self.maps
    }
}
