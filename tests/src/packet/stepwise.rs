//! A change of the tables, one entry at a time, with something between any two.

use super::World;
use anyhow::Result;
use dataplane_common::tables::Table;
use dataplane_user::kernel::maps::{KernelMaps, MapError};
use dataplane_user::sync::{Maps, MemoryMaps, Mirror};
use std::cell::RefCell;
use std::time::Instant;

/// Maps that stop after each entry.
struct Stepwise<'a> {
    maps: &'a KernelMaps,
    between: RefCell<&'a mut dyn FnMut()>,
}

impl Maps for Stepwise<'_> {
    fn capacity<T: Table>(&self) -> Result<usize, MapError> {
        self.maps.capacity::<T>()
    }

    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        self.maps.get::<T>(key)
    }

    fn visit<T: Table>(&self, visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError> {
        self.maps.visit::<T>(visit)
    }

    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        entries.iter().try_for_each(|entry| {
            self.maps.write::<T>(&[*entry])?;
            self.between.borrow_mut()();
            Ok(())
        })
    }

    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        let mut removed = 0;
        for key in keys {
            removed += self.maps.remove::<T>(&[*key])?;
            self.between.borrow_mut()();
        }
        Ok(removed)
    }

    fn calls(&self) -> u64 {
        self.maps.calls()
    }
}

impl World {
    /// As [`World::apply`], but `between` is called after each entry that was written or removed.
    ///
    /// # Errors
    /// As [`World::apply`].
    pub fn apply_stepwise(&mut self, yaml: &str, mut between: impl FnMut(&Self)) -> Result<()> {
        let nothing = Mirror::open(&MemoryMaps::default(), Instant::now())?;
        let mut mirror = std::mem::replace(&mut self.mirror, nothing);
        let change = self.compile(yaml)?;
        let (maps, world) = (self.maps.clone(), &*self);
        let mut between = || between(world);
        let maps = Stepwise { maps: &maps, between: RefCell::new(&mut between) };
        let result = change.write(&mut mirror, &maps);
        self.mirror = mirror;
        result
    }
}
