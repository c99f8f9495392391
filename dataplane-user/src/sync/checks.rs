//! What must hold of the tables at every moment, and maps that check it, fail or die at a chosen write. For tests.

use super::{Maps, MemoryMaps};
use crate::compile::Endpoint;
use crate::kernel::maps::MapError;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::filter::FilterBit;
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::node::NodeAddress;
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::{EndpointSet, Service};
use dataplane_common::tables::{self, Table};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// What is looked at after each entry that was written or removed.
type Watcher = Box<dyn FnMut(&MemoryMaps) + Send>;

/// Memory maps that check, after each single entry written or removed, that no reference dangles.
pub(crate) struct CheckedMaps {
    inner: MemoryMaps,
    pub(crate) checked: Mutex<usize>,
    /// How many more entries are written before every write fails.
    left: Mutex<Option<usize>>,
    watcher: Mutex<Option<Watcher>>,
}

impl Maps for CheckedMaps {
    fn capacity<T: Table>(&self) -> Result<usize, MapError> {
        self.inner.capacity::<T>()
    }
    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        self.inner.get::<T>(key)
    }
    fn visit<T: Table>(&self, visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError> {
        self.inner.visit::<T>(visit)
    }
    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        for entry in entries {
            self.live::<T>()?;
            self.inner.write::<T>(&[*entry])?;
            self.check();
        }
        Ok(())
    }
    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        let mut removed = 0;
        for key in keys {
            self.live::<T>()?;
            removed += self.inner.remove::<T>(&[*key])?;
            self.check();
        }
        Ok(removed)
    }
    fn calls(&self) -> u64 {
        0
    }
}

/// So that an agent can be replaced by another with the same maps.
impl<M: Maps> Maps for Arc<M> {
    fn capacity<T: Table>(&self) -> Result<usize, MapError> {
        (**self).capacity::<T>()
    }
    fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>, MapError> {
        (**self).get::<T>(key)
    }
    fn visit<T: Table>(&self, visit: impl FnMut(T::Key, T::Value)) -> Result<(), MapError> {
        (**self).visit::<T>(visit)
    }
    fn write<T: Table>(&self, entries: &[(T::Key, T::Value)]) -> Result<(), MapError> {
        (**self).write::<T>(entries)
    }
    fn remove<T: Table>(&self, keys: &[T::Key]) -> Result<usize, MapError> {
        (**self).remove::<T>(keys)
    }
    fn calls(&self) -> u64 {
        (**self).calls()
    }
}

impl CheckedMaps {
    pub(crate) fn new(capacities: &[(&'static str, usize)]) -> Self {
        Self {
            inner: MemoryMaps::with_capacities(capacities.iter().copied()),
            checked: Mutex::new(0),
            left: Mutex::new(None),
            watcher: Mutex::new(None),
        }
    }

    /// For those who check when they like.
    pub(crate) fn unchecked(capacities: &[(&'static str, usize)]) -> Self {
        let maps = Self::new(capacities);
        maps.watch(Some(Box::new(|_| {})));
        maps
    }

    /// From now on so many entries are written, and then none any more; `None` ends that.
    pub(crate) fn fail_after(&self, entries: Option<usize>) {
        *self.left.lock().unwrap() = entries;
    }

    /// Called after each entry from now on.
    pub(crate) fn watch(&self, watcher: Option<Watcher>) {
        *self.watcher.lock().unwrap() = watcher;
    }

    fn live<T: Table>(&self) -> Result<(), MapError> {
        match &mut *self.left.lock().unwrap() {
            Some(0) => Err(MapError::Missing(T::NAME)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn check(&self) {
        *self.checked.lock().unwrap() += 1;
        if let Some(watcher) = &mut *self.watcher.lock().unwrap() {
            watcher(&self.inner);
        } else {
            check(&self.inner);
        }
    }
}

pub(crate) fn read<T: Table>(maps: &impl Maps) -> Vec<(T::Key, T::Value)> {
    let mut entries = Vec::new();
    maps.visit::<T>(|key, value| entries.push((key, value))).unwrap();
    entries
}

pub(crate) fn bit_is_set(maps: &impl Maps, bit: FilterBit) -> bool {
    maps.get::<tables::Filter>(&bit.word()).unwrap().unwrap() & bit.mask() != 0
}

/// What a packet to a frontend finds: the endpoints of both sets, each of which serves and passes the filter.
pub(crate) fn reach(maps: &impl Maps, key: &FrontendKey) -> Option<[BTreeSet<Endpoint>; 2]> {
    let frontend: Frontend = maps.get::<tables::Frontends>(key).unwrap()?;
    let id = frontend.service();
    let service: Service = maps.get::<tables::Services>(&id).unwrap().expect("the id is inside of the table");
    let endpoints = |set: EndpointSet| {
        let slots = set.base()..set.base() + set.count();
        let backend = |slot: u32| {
            let backend: u32 = maps.get::<tables::Slots>(&slot).unwrap().expect("a slot inside of the table");
            let backend: Backend = maps.get::<tables::Backends>(&backend).unwrap().expect("a known id");
            assert!(backend.status().has(BackendStatus::SERVING), "{key:?} leads to {backend:?}");
            assert_eq!(backend.service(), id, "{key:?} leads to the backend of another service port");
            assert!(bit_is_set(maps, FilterBit::backend(backend.addr(), backend.port(), key.proto())));
            Endpoint { addr: *backend.addr(), port: backend.port() }
        };
        slots.map(backend).collect()
    };
    Some([endpoints(service.cluster), endpoints(service.local)])
}

/// No frontend leads to what is not there, and all that a packet meets passes the filter.
pub(crate) fn check(maps: &impl Maps) {
    let addresses: Vec<_> = read::<tables::NodeAddrs>(maps);
    for (addr, _) in &addresses {
        assert!(bit_is_set(maps, FilterBit::node_address(addr)));
    }
    for (key, frontend) in read::<tables::Frontends>(maps) {
        if frontend.kind() == Ok(FrontendKind::ClosedPort) {
            assert!(bit_is_set(maps, FilterBit::service_address(key.addr())));
            continue;
        }
        reach(maps, &key);
        if !key.addr().is_unspecified() {
            assert!(bit_is_set(maps, FilterBit::service_address(key.addr())));
            continue;
        }
        let answers = |(addr, value): &&(dataplane_common::Addr, NodeAddress)| {
            value.has(NodeAddress::NODE_PORTS) && addr.is_v4() == key.addr().is_v4()
        };
        for (addr, _) in addresses.iter().filter(answers) {
            assert!(bit_is_set(maps, FilterBit::node_port(addr, key.port(), key.proto())));
        }
    }
}

/// The tables as a packet sees them: the frontends and where they lead.
pub(crate) fn view(maps: &impl Maps) -> BTreeMap<FrontendKey, [BTreeSet<Endpoint>; 2]> {
    let keys = read::<tables::Frontends>(maps).into_iter();
    let open = keys.filter(|(_, value)| value.kind() != Ok(FrontendKind::ClosedPort));
    open.map(|(key, _)| (key, reach(maps, &key).unwrap())).collect()
}

/// All that the tables say, in an order and with names that do not depend on how they came to say it: without ids, slots,
/// generations and counters.
pub(crate) fn meaning(maps: &impl Maps) -> Vec<String> {
    let backends: BTreeMap<u32, Backend> = read::<tables::Backends>(maps).into_iter().collect();
    let slots: BTreeMap<u32, u32> = read::<tables::Slots>(maps).into_iter().collect();
    let endpoint =
        |backend: &Backend| format!("{}:{} {:#x}", backend.addr(), backend.port(), backend.status().flags());
    let set = |set: EndpointSet| {
        let ids = (set.base()..set.base() + set.count()).map(|slot| slots.get(&slot).copied().unwrap_or(0));
        let mut endpoints: Vec<_> = ids.map(|id| backends.get(&id).map(endpoint)).collect();
        endpoints.sort();
        format!("{endpoints:?}")
    };
    let ports: BTreeMap<u32, String> = read::<tables::Services>(maps)
        .into_iter()
        .filter(|(_, value)| *value != Service::default())
        .map(|(id, value)| {
            (id, format!("{:?} cluster {} local {}", value.policy, set(value.cluster), set(value.local)))
        })
        .collect();
    let port = |id: u32| ports.get(&id).map_or("nothing", String::as_str);
    let mut lines = Vec::new();
    for (key, value) in read::<tables::Frontends>(maps) {
        let to = if value.service() == 0 { "closed" } else { port(value.service()) };
        lines.push(format!("frontend {key:?} {:?} {to}", value.kind()));
    }
    lines.extend(ports.values().map(|port| format!("service port {port}")));
    let live = backends.values().filter(|backend| backend.status().has(BackendStatus::SERVING));
    lines.extend(live.map(|backend| format!("backend {} of {}", endpoint(backend), port(backend.service()))));
    for (range, _) in read::<tables::SourceRanges>(maps) {
        let prefix = SourceRangeKey::new(0, *range.addr(), range.bits());
        lines.push(format!("source range {prefix:?} of {}", port(range.service())));
    }
    for (addr, value) in read::<tables::NodeAddrs>(maps) {
        lines.push(format!("address {addr} {value:?}"));
    }
    for (word, bits) in read::<tables::Filter>(maps).into_iter().filter(|(_, bits)| *bits != 0) {
        lines.push(format!("filter {word} {bits:#018x}"));
    }
    lines.push(format!("node {:?}", maps.get::<tables::Nodes>(&0).unwrap()));
    lines.sort();
    lines
}
