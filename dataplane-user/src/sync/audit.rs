//! Reads the kernel's maps again and repairs what differs from the mirror.

use super::Maps;
use super::mirror::Mirror;
use super::plan::Plan;
use super::recover::PortMirror;
use crate::kernel::maps::MapError;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::filter::FILTER_WORDS;
use dataplane_common::service::Service;
use dataplane_common::tables;
use std::collections::{HashMap, HashSet};
use std::time::Instant;

impl Mirror {
    /// Compares all tables with the kernel's, writes those entries again that differ, and says how many there were.
    ///
    /// Before the first complete snapshot it does nothing: nobody knows yet what the kernel should hold.
    ///
    /// # Errors
    /// If a map cannot be read or written.
    pub fn audit<M: Maps>(&mut self, maps: &M, _now: Instant) -> Result<usize, MapError> {
        if self.recovered.is_some() {
            return Ok(0);
        }
        let mut plan = Plan::default();
        self.audit_node(maps, &mut plan)?;
        self.audit_frontends(maps, &mut plan)?;
        self.audit_services(maps, &mut plan)?;
        self.audit_ranges(maps, &mut plan)?;
        self.audit_backends(maps, &mut plan)?;
        let mut words = vec![0; FILTER_WORDS];
        maps.visit::<tables::Filter>(|word, bits| {
            if let Some(to) = words.get_mut(word as usize) {
                *to = bits;
            }
        })?;
        self.filter.compare(&words);
        let ops = plan.into_ops(&mut self.filter);
        self.perform(maps, &ops)?;
        self.doubtful = false;
        Ok(ops.len())
    }

    fn ports(&self) -> impl Iterator<Item = &PortMirror> {
        self.services.values().flat_map(|service| service.ports.iter().map(|(_, port)| port))
    }

    fn audit_node<M: Maps>(&self, maps: &M, plan: &mut Plan) -> Result<(), MapError> {
        if self.node.is_some() && maps.get::<tables::Nodes>(&0)? != self.node {
            plan.node = self.node.map(Box::new);
        }
        plan.addresses = self.addresses.clone();
        maps.visit::<tables::NodeAddrs>(|addr, value| match self.addresses.get(&addr) {
            Some(wanted) if *wanted == value => drop(plan.addresses.remove(&addr)),
            Some(_) => {}
            None => drop(plan.removed_addresses.insert(addr)),
        })
    }

    fn audit_frontends<M: Maps>(&self, maps: &M, plan: &mut Plan) -> Result<(), MapError> {
        let mut missing = self.frontends.clone();
        maps.visit::<tables::Frontends>(|key, value| match self.frontends.get(&key) {
            Some(wanted) if *wanted == value => drop(missing.remove(&key)),
            Some(_) => {}
            None => drop(plan.removed_frontends.insert(key)),
        })?;
        plan.frontends.extend(missing);
        Ok(())
    }

    fn audit_services<M: Maps>(&self, maps: &M, plan: &mut Plan) -> Result<(), MapError> {
        let mut missing: HashMap<u32, Service> = self.ports().map(|port| (port.id, port.value)).collect();
        // Elements that are all zero need not be visited: those that should be so are written only if they were.
        let mut visited = HashSet::new();
        maps.visit::<tables::Services>(|id, value| match missing.get(&id) {
            Some(wanted) if *wanted == value => drop(missing.remove(&id)),
            Some(_) => drop(visited.insert(id)),
            None if value != Service::default() => plan.cleared_services.push(id),
            None => {}
        })?;
        missing.retain(|id, value| *value != Service::default() || visited.contains(id));
        plan.services.extend(missing);
        let runs = |port: &PortMirror| {
            let [cluster, local] = [(port.value.cluster, &port.cluster), (port.value.local, &port.local)]
                .map(|(run, ids)| (run.base()..).zip(ids.to_vec()));
            cluster.chain(local)
        };
        let mut slots: HashMap<u32, u32> = self.ports().flat_map(runs).collect();
        maps.visit::<tables::Slots>(|slot, id| {
            if slots.get(&slot) == Some(&id) {
                slots.remove(&slot);
            }
        })?;
        plan.slots.extend(slots);
        Ok(())
    }

    fn audit_ranges<M: Maps>(&self, maps: &M, plan: &mut Plan) -> Result<(), MapError> {
        let mut missing: HashSet<_> = self.ports().flat_map(|port| port.ranges.to_vec()).collect();
        missing.extend(&self.node_ranges);
        maps.visit::<tables::SourceRanges>(|key, _| {
            if !missing.remove(&key) {
                plan.removed_ranges.insert(key);
            }
        })?;
        plan.ranges.extend(missing);
        Ok(())
    }

    fn audit_backends<M: Maps>(&self, maps: &M, plan: &mut Plan) -> Result<(), MapError> {
        let values = |port: &PortMirror| {
            let service = port.id;
            port.backends.iter().map(|b| (b.id, self.backend_value(b, service))).collect::<Vec<_>>()
        };
        let mut missing: HashMap<u32, Backend> = self.ports().flat_map(values).collect();
        maps.visit::<tables::Backends>(|id, value| match missing.get(&id) {
            Some(wanted) if *wanted == value => drop(missing.remove(&id)),
            Some(_) => {}
            None if value.status().has(BackendStatus::SERVING) => {
                let generation = self.generations.get(id as usize).copied().unwrap_or_default();
                plan.retired.push((id, value.with_status(BackendStatus::new(generation, 0))));
            }
            None => {}
        })?;
        plan.backends.extend(missing);
        Ok(())
    }
}
