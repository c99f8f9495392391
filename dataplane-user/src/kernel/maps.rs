//! Maps by the types that [`dataplane_common::tables`] gives them.
//!
//! Keys and values cross the border to the kernel here and nowhere else. A map is opened only if its sizes are those of
//! its [`Table`]. Batch calls are used where there is more than one entry; map types and kernels without them get
//! single calls.

use super::bpf::{self, MapFd};
use super::mapped::WORD;
use crate::sync::Maps;
use bytemuck::Zeroable as _;
use dataplane_common::tables::{self, Table, TableKind};
use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How many entries a walk reads at once: bounds its memory, not its length.
const CHUNK: usize = 8_192;

/// `ENOTSUPP`, which the kernel returns for a map type without batch operations; libc does not name it.
const ENOTSUPP: i32 = 524;

/// Entries of a table.
pub type Entries<T> = Vec<(<T as Table>::Key, <T as Table>::Value)>;

/// What went wrong with a map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// There is no pin.
    #[error(
        "no maps of Portolan are pinned in {folder}: no agent has run with this --bpffs folder since the machine started, or \
         `portolan cleanup` removed them"
    )]
    Nothing {
        /// The folder of the pins.
        folder: PathBuf,
    },
    /// The pin cannot be opened.
    #[error("cannot open the map {path}: {source}. Is this root (CAP_BPF)?")]
    Open {
        /// The pin.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another layout of keys or values.
    #[error(
        "map `{name}` has keys of {key} and values of {value} bytes: it was made by another version of portolan"
    )]
    Shape {
        /// The map's name.
        name: &'static str,
        /// Its key size.
        key: usize,
        /// Its value size.
        value: usize,
    },
    /// No map of that name was opened.
    #[error("map `{0}` is not open")]
    Missing(&'static str),
    /// There is no room for another entry.
    #[error("map `{name}` is full with {capacity} entries: enlarge it with --map-size {name}=N")]
    Full {
        /// The map's name.
        name: &'static str,
        /// How many it holds.
        capacity: usize,
    },
    /// The kernel refused.
    #[error("cannot {verb} map `{name}`: {source}")]
    Call {
        /// What was tried.
        verb: &'static str,
        /// The map's name.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The kernel's number of a kind of table.
pub const fn map_type(kind: TableKind) -> u32 {
    match kind {
        TableKind::Array | TableKind::MappedArray => bpf::TYPE_ARRAY,
        TableKind::PerCpuArray => bpf::TYPE_PERCPU_ARRAY,
        TableKind::Hash | TableKind::HashByEntry => bpf::TYPE_HASH,
        TableKind::LruHash => bpf::TYPE_LRU_HASH,
        TableKind::LpmTrie => bpf::TYPE_LPM_TRIE,
        TableKind::SkStorage => bpf::TYPE_SK_STORAGE,
    }
}

/// The kernel's flags of a kind of table.
const fn map_flags(kind: TableKind) -> u32 {
    match kind {
        TableKind::HashByEntry | TableKind::LpmTrie | TableKind::SkStorage => bpf::NO_PREALLOC,
        TableKind::MappedArray => bpf::MMAPABLE,
        TableKind::Array | TableKind::PerCpuArray | TableKind::Hash => 0,
        TableKind::LruHash => 0,
    }
}

/// Makes a map without BTF for a table, of `capacity` entries. For tests and benchmarks; the agent's maps come from the
/// eBPF object.
///
/// # Errors
/// The kernel's.
pub fn create<T: Table>(capacity: usize) -> Result<Map<T>, MapError> {
    let sizes = [size_of::<T::Key>(), size_of::<T::Value>()];
    let fd = MapFd::create(T::NAME, map_type(T::KIND), map_flags(T::KIND), sizes, capacity);
    Map::from_map_fd(fd.map_err(|source| MapError::Call { verb: "create", name: T::NAME, source })?)
}

/// An open map with the types of its table. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct Map<T: Table> {
    fd: Arc<MapFd>,
    table: PhantomData<fn() -> T>,
}

impl<T: Table> AsFd for Map<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<T: Table> Map<T> {
    /// Opens the table's pin in `folder` (the agent's pin folder with the layout's version).
    ///
    /// # Errors
    /// If there is no such pin, or it is of another layout.
    pub fn open(folder: &Path) -> Result<Self, MapError> {
        let path = folder.join(T::NAME);
        match MapFd::open(&path) {
            Ok(fd) => Self::from_map_fd(fd),
            Err(source) => Err(MapError::Open { path, source }),
        }
    }

    /// Takes a map that is already open.
    ///
    /// # Errors
    /// If the descriptor is of no map, or of one of another layout.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MapError> {
        Self::from_map_fd(MapFd::new(fd).map_err(|source| MapError::Call {
            verb: "open",
            name: T::NAME,
            source,
        })?)
    }

    fn from_map_fd(fd: MapFd) -> Result<Self, MapError> {
        Self::from_shared(Arc::new(fd))
    }

    fn from_shared(fd: Arc<MapFd>) -> Result<Self, MapError> {
        let shape = fd.shape();
        if shape.map_type != map_type(T::KIND)
            || shape.key_size != size_of::<T::Key>()
            || shape.value_size != size_of::<T::Value>()
        {
            return Err(MapError::Shape { name: T::NAME, key: shape.key_size, value: shape.value_size });
        }
        Ok(Self { fd, table: PhantomData })
    }

    /// How many entries it can hold.
    pub fn capacity(&self) -> usize {
        self.fd.shape().max_entries
    }

    /// The map as bytes, for its id and memory.
    pub fn raw(&self) -> &MapFd {
        &self.fd
    }

    fn error(&self, verb: &'static str, source: io::Error) -> MapError {
        // A trie has its own word for it.
        if matches!(source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) {
            return MapError::Full { name: T::NAME, capacity: self.capacity() };
        }
        MapError::Call { verb, name: T::NAME, source }
    }

    /// The value of `key`; of per-CPU maps the first CPU's, see [`Self::get_per_cpu`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn get(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        Ok(self.get_per_cpu(key)?.and_then(|values| values.into_iter().next()))
    }

    /// The values of `key` on each CPU; one value if the map is not per CPU.
    ///
    /// # Errors
    /// The kernel's.
    pub fn get_per_cpu(&self, key: &T::Key) -> Result<Option<Vec<T::Value>>, MapError> {
        let mut copied = vec![0; self.fd.copied_size()];
        let found = self.fd.lookup(bytemuck::bytes_of(key), &mut copied);
        Ok(found.map_err(|e| self.error("read", e))?.then(|| self.values(&copied).collect()))
    }

    /// The values in what was copied for one key.
    fn values<'a>(&self, copied: &'a [u8]) -> impl Iterator<Item = T::Value> + use<'a, T> {
        let stride = if self.fd.shape().per_cpu() {
            size_of::<T::Value>().next_multiple_of(8)
        } else {
            size_of::<T::Value>()
        };
        copied.chunks_exact(stride).map(|part| bytemuck::pod_read_unaligned(&part[..size_of::<T::Value>()]))
    }

    /// One value as it is copied to the kernel: for per-CPU maps, the same on each CPU.
    fn copied(&self, value: &T::Value, to: &mut Vec<u8>) {
        let bytes = bytemuck::bytes_of(value);
        let end = to.len() + self.fd.copied_size();
        while to.len() < end {
            to.extend_from_slice(bytes);
            if self.fd.shape().per_cpu() {
                to.resize(to.len().next_multiple_of(8), 0);
            }
        }
    }

    /// The index of an element that is written by word, so that a program that reads a word meanwhile has the old one or the new one.
    fn index(key: &T::Key) -> Option<u32> {
        let by_word = matches!(T::KIND, TableKind::MappedArray) && size_of::<T::Value>().is_multiple_of(WORD);
        by_word.then(|| bytemuck::try_pod_read_unaligned(bytemuck::bytes_of(key)).ok()).flatten()
    }

    /// Writes one entry; `flags` is one of `bpf::{ANY, NO_EXIST, EXIST}`.
    ///
    /// # Errors
    /// [`MapError::Full`], or the kernel's.
    pub fn insert(&self, key: &T::Key, value: &T::Value, flags: u64) -> Result<(), MapError> {
        if let (true, Some(index)) = (flags == bpf::ANY, Self::index(key)) {
            return self.fd.store(index, bytemuck::bytes_of(value)).map_err(|e| self.error("write", e));
        }
        let mut copied = Vec::with_capacity(self.fd.copied_size());
        self.copied(value, &mut copied);
        self.fd.update(bytemuck::bytes_of(key), &copied, flags).map_err(|e| self.error("write", e))
    }

    /// Removes one entry; `false` if there was none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self, key: &T::Key) -> Result<bool, MapError> {
        self.fd.delete(bytemuck::bytes_of(key)).map_err(|e| self.error("remove from", e))
    }

    /// Writes all entries, in their order, with as few calls as there can be.
    ///
    /// # Errors
    /// [`MapError::Full`], or the kernel's; the entries before the refused one are written.
    pub fn insert_batch(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        if entries.len() == 1 || entries.first().is_some_and(|(key, _)| Self::index(key).is_some()) {
            return entries.iter().try_for_each(|(key, value)| self.insert(key, value, bpf::ANY));
        }
        for chunk in entries.chunks(CHUNK * 8) {
            let mut keys = Vec::with_capacity(chunk.len() * size_of::<T::Key>());
            let mut values = Vec::with_capacity(chunk.len() * self.fd.copied_size());
            for (key, value) in chunk {
                keys.extend_from_slice(bytemuck::bytes_of(key));
                self.copied(value, &mut values);
            }
            let answer = self.fd.update_batch(&keys, &values, bpf::ANY);
            let (done, result) = answer.map_err(|e| self.error("write", e))?;
            match result {
                Ok(()) => {}
                Err(e) if no_batch(&e) && done == 0 => {
                    chunk.iter().try_for_each(|(key, value)| self.insert(key, value, bpf::ANY))?;
                }
                Err(e) => return Err(self.error("write", e)),
            }
        }
        Ok(())
    }

    /// Removes all these entries, as far as they are there. Returns how many were.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_batch(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        let (mut rest, mut removed) = (keys, 0);
        loop {
            match rest {
                [] => return Ok(removed),
                [key] => return Ok(removed + usize::from(self.remove(key)?)),
                _ => {}
            }
            let answer = self.fd.delete_batch(bytemuck::cast_slice(rest));
            let (done, result) = answer.map_err(|e| self.error("remove from", e))?;
            removed += done;
            rest = &rest[done..];
            match result {
                Ok(()) => return Ok(removed),
                // The batch stops at a key that is not there: go on behind it.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => rest = rest.get(1..).unwrap_or(&[]),
                Err(e) if no_batch(&e) => {
                    let (key, behind) = (&rest[0], &rest[1..]);
                    removed += usize::from(self.remove(key)?);
                    rest = behind;
                }
                Err(e) => return Err(self.error("remove from", e)),
            }
        }
    }

    /// Calls `visit` with each entry; of per-CPU maps with the values of each CPU. Entries that come or go meanwhile may
    /// be missed, or be seen twice.
    ///
    /// # Errors
    /// The kernel's.
    pub fn visit(&self, mut visit: impl FnMut(T::Key, &[T::Value])) -> Result<(), MapError> {
        let mut length = CHUNK.min(self.capacity().max(1));
        let mut cursor = self.fd.cursor();
        let buffers =
            |length| (vec![0; length * size_of::<T::Key>()], vec![0; length * self.fd.copied_size()]);
        let (mut keys, mut values) = buffers(length);
        let mut copies = Vec::new();
        loop {
            let progress = match self.fd.lookup_batch(&mut cursor, &mut keys, &mut values) {
                Ok(progress) => progress,
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    length *= 2;
                    (keys, values) = buffers(length);
                    continue;
                }
                Err(e) if no_batch(&e) => return self.visit_singly(visit),
                Err(e) => return Err(self.error("read", e)),
            };
            let entries =
                keys.chunks_exact(size_of::<T::Key>()).zip(values.chunks_exact(self.fd.copied_size()));
            for (key, copied) in entries.take(progress.done) {
                copies.clear();
                copies.extend(self.values(copied));
                visit(bytemuck::pod_read_unaligned(key), &copies);
            }
            if progress.last {
                return Ok(());
            }
        }
    }

    /// [`Self::visit`] without batch operations.
    fn visit_singly(&self, mut visit: impl FnMut(T::Key, &[T::Value])) -> Result<(), MapError> {
        let mut next = T::Key::zeroed();
        let mut key: Option<T::Key> = None;
        while self
            .fd
            .next_key(key.as_ref().map(bytemuck::bytes_of), bytemuck::bytes_of_mut(&mut next))
            .map_err(|e| self.error("read", e))?
        {
            if let Some(values) = self.get_per_cpu(&next)? {
                visit(next, &values);
            }
            key = Some(next);
        }
        Ok(())
    }

    /// All entries; of per-CPU maps the first CPU's values.
    ///
    /// # Errors
    /// The kernel's.
    pub fn entries(&self) -> Result<Entries<T>, MapError> {
        let mut entries = Vec::new();
        self.visit(|key, values| entries.extend(values.first().map(|value| (key, *value))))?;
        Ok(entries)
    }
}

impl<T: Table> Map<T>
where
    T::Value: std::ops::AddAssign,
{
    /// The sum over the CPUs of the values of `key`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sum(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        Ok(self.get_per_cpu(key)?.map(|values| sum(&values)))
    }

    /// All entries, each summed over the CPUs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sums(&self) -> Result<Entries<T>, MapError> {
        let mut entries = Vec::new();
        self.visit(|key, values| entries.push((key, sum(values))))?;
        Ok(entries)
    }
}

/// All maps of the node, by table. What `sync`, the sweep of the flow tables, the metrics and the command line share.
#[derive(Clone, Debug, Default)]
pub struct KernelMaps {
    maps: BTreeMap<&'static str, Arc<MapFd>>,
}

impl KernelMaps {
    /// Opens every table that is pinned in `folder` (the agent's pin folder with the layout's version). A table that is
    /// not there is an error only when it is asked for.
    ///
    /// # Errors
    /// If there is no pin at all, or one cannot be opened.
    pub fn open(folder: &Path) -> Result<Self, MapError> {
        let mut maps = BTreeMap::new();
        for (name, ..) in tables::ALL {
            let path = folder.join(name);
            match MapFd::open(&path) {
                Ok(fd) => drop(maps.insert(*name, Arc::new(fd))),
                Err(source) if source.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(MapError::Open { path, source }),
            }
        }
        if maps.is_empty() {
            return Err(MapError::Nothing { folder: folder.to_owned() });
        }
        Ok(Self { maps })
    }

    /// Makes all tables anew, without BTF and pins, in their default sizes except those that are named; but for the storage of
    /// sockets, which must have BTF. For tests and benchmarks.
    ///
    /// # Errors
    /// The kernel's.
    pub fn create(capacities: &[(&str, usize)]) -> Result<Self, MapError> {
        let capacity = |name: &str, default: usize| {
            capacities.iter().find(|(known, _)| *known == name).map_or(default, |(_, capacity)| *capacity)
        };
        let mut maps = BTreeMap::new();
        macro_rules! create_each {
            ($($table:ident)+) => {$({
                type T = tables::$table;
                let map = create::<T>(capacity(T::NAME, T::CAPACITY))?;
                maps.insert(T::NAME, map.fd);
            })+};
        }
        create_each!(Nodes NodeAddrs Filter Callers Frontends Services Slots Backends Flows HalfOpen Closing Turns);
        create_each!(Rounds SourceRanges Affinities Newcomers Fragments PortTurns Outgoings);
        create_each!(ServiceTraffic BackendTraffic OpenCounts Reasons Answers SocketPeers SocketChoices Uplinks);
        create_each!(Watches Events Kept Moved ServiceTries);
        Ok(Self { maps })
    }

    /// Takes maps that are already open, by the names of their tables.
    ///
    /// # Errors
    /// If a descriptor is of no map.
    pub fn from_fds(fds: impl IntoIterator<Item = (&'static str, OwnedFd)>) -> Result<Self, MapError> {
        let open = |(name, fd)| match MapFd::new(fd) {
            Ok(fd) => Ok((name, Arc::new(fd))),
            Err(source) => Err(MapError::Call { verb: "open", name, source }),
        };
        Ok(Self { maps: fds.into_iter().map(open).collect::<Result<_, _>>()? })
    }

    /// The map of a table.
    ///
    /// # Errors
    /// If it is not there, or has another layout.
    pub fn map<T: Table>(&self) -> Result<Map<T>, MapError> {
        Map::from_shared(self.maps.get(T::NAME).cloned().ok_or(MapError::Missing(T::NAME))?)
    }

    /// How many entries a hash table has. It is walked: for tables that nobody else keeps count of.
    ///
    /// # Errors
    /// If there is no such map, or the kernel's.
    pub fn count(&self, name: &'static str) -> Result<usize, MapError> {
        let fd = self.maps.get(name).ok_or(MapError::Missing(name))?;
        let failed = |source| MapError::Call { verb: "read", name, source };
        let (mut length, mut count) = (CHUNK.min(fd.shape().max_entries.max(1)), 0);
        let mut cursor = fd.cursor();
        loop {
            let mut keys = vec![0; length * fd.shape().key_size];
            let mut values = vec![0; length * fd.copied_size()];
            match fd.lookup_batch(&mut cursor, &mut keys, &mut values) {
                Ok(progress) => {
                    count += progress.done;
                    if progress.last {
                        return Ok(count);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => length *= 2,
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// All maps that are open, as bytes: for their sizes and their memory.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &MapFd)> {
        self.maps.iter().map(|(name, fd)| (*name, &**fd))
    }
}

impl Maps for KernelMaps {
    fn capacity<T: Table>(&self) -> Result<usize, MapError> {
        Ok(self.map::<T>()?.capacity())
    }

    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        self.map::<T>()?.get(key)
    }

    fn visit<T: Table>(&self, mut visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError> {
        self.map::<T>()?.visit(|key, values| {
            if let Some(value) = values.first() {
                visit(key, *value);
            }
        })
    }

    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        self.map::<T>()?.insert_batch(entries)
    }

    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        self.map::<T>()?.remove_batch(keys)
    }

    fn calls(&self) -> u64 {
        bpf::calls()
    }
}

/// The sum of the values of all CPUs.
pub fn sum<V: bytemuck::Pod + std::ops::AddAssign>(values: &[V]) -> V {
    values.iter().fold(V::zeroed(), |mut total, value| {
        total += *value;
        total
    })
}

/// Whether the map type or the kernel has no batch operations.
fn no_batch(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EINVAL | libc::EOPNOTSUPP))
}
