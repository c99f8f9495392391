//! What `sync` needs of maps, and maps that live in memory.

use crate::kernel::maps::MapError;
use dataplane_common::tables::{Table, TableKind};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Tables that can be read and written: the kernel's ([`crate::kernel::maps::KernelMaps`]) or [`MemoryMaps`].
pub trait Maps {
    /// How many entries the table can hold.
    ///
    /// # Errors
    /// If there is no such table.
    fn capacity<T: Table>(&self) -> Result<usize, MapError>;

    /// The value of a key; of per-CPU tables, the first CPU's.
    ///
    /// # Errors
    /// The kernel's.
    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError>;

    /// Calls `visit` with each entry. Elements of arrays that are all zero may be left out.
    ///
    /// # Errors
    /// The kernel's.
    fn visit<T: Table>(&self, visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError>;

    /// Writes all entries in their order; on a per-CPU table, the same value for each CPU.
    ///
    /// # Errors
    /// [`MapError::Full`], or the kernel's. The entries before the refused one are written.
    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError>;

    /// Removes these entries, as far as they are there. Returns how many were.
    ///
    /// # Errors
    /// The kernel's.
    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError>;

    /// How many calls into the kernel were made so far.
    fn calls(&self) -> u64;
}

type Bytes = Box<[u8]>;

/// Tables in memory with the kernel's rules: arrays always have all elements, hash tables are bounded.
#[derive(Debug, Default)]
pub struct MemoryMaps {
    tables: Mutex<BTreeMap<&'static str, BTreeMap<Bytes, Bytes>>>,
    capacities: BTreeMap<&'static str, usize>,
}

impl MemoryMaps {
    /// Tables of the default sizes, except those named here.
    pub fn with_capacities(capacities: impl IntoIterator<Item = (&'static str, usize)>) -> Self {
        Self { tables: Mutex::default(), capacities: capacities.into_iter().collect() }
    }

    fn tables(&self) -> MutexGuard<'_, BTreeMap<&'static str, BTreeMap<Bytes, Bytes>>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn room<T: Table>(&self) -> usize {
        self.capacities.get(T::NAME).copied().unwrap_or(T::CAPACITY)
    }

    fn is_array<T: Table>() -> bool {
        match T::KIND {
            TableKind::Array | TableKind::MappedArray | TableKind::PerCpuArray => true,
            TableKind::Hash | TableKind::HashByEntry | TableKind::LruHash => false,
            TableKind::LpmTrie | TableKind::SkStorage => false,
        }
    }

    /// Whether an array has this element.
    fn has_index<T: Table>(&self, key: &T::Key) -> bool {
        let mut index = [0; 4];
        let bytes = bytemuck::bytes_of(key);
        bytes.len() == index.len() && {
            index.copy_from_slice(bytes);
            (u32::from_ne_bytes(index) as usize) < self.room::<T>()
        }
    }
}

impl Maps for MemoryMaps {
    fn capacity<T: Table>(&self) -> Result<usize, MapError> {
        Ok(self.room::<T>())
    }

    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        let tables = self.tables();
        let found = tables.get(T::NAME).and_then(|table| table.get(bytemuck::bytes_of(key)));
        let zero = || (Self::is_array::<T>() && self.has_index::<T>(key)).then(bytemuck::Zeroable::zeroed);
        Ok(found.map(|value| bytemuck::pod_read_unaligned(value)).or_else(zero))
    }

    fn visit<T: Table>(&self, mut visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError> {
        for (key, value) in self.tables().get(T::NAME).into_iter().flatten() {
            visit(bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(value));
        }
        Ok(())
    }

    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        let mut tables = self.tables();
        let table = tables.entry(T::NAME).or_default();
        for (key, value) in entries {
            let (bytes, room) = (bytemuck::bytes_of(key), self.room::<T>());
            let fits = match T::KIND {
                TableKind::Array | TableKind::MappedArray | TableKind::PerCpuArray => {
                    self.has_index::<T>(key)
                }
                TableKind::Hash | TableKind::HashByEntry | TableKind::LpmTrie => {
                    table.len() < room || table.contains_key(bytes)
                }
                // Bounded by nothing but the sockets that there are.
                TableKind::SkStorage => true,
                TableKind::LruHash => {
                    if table.len() >= room && !table.contains_key(bytes) {
                        table.pop_first();
                    }
                    true
                }
            };
            if !fits {
                return Err(MapError::Full { name: T::NAME, capacity: room });
            }
            table.insert(bytes.into(), bytemuck::bytes_of(value).into());
        }
        Ok(())
    }

    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        let mut tables = self.tables();
        let table = tables.entry(T::NAME).or_default();
        Ok(keys.iter().filter(|key| table.remove(bytemuck::bytes_of(*key)).is_some()).count())
    }

    fn calls(&self) -> u64 {
        0
    }
}
