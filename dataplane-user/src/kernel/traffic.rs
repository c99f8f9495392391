//! What is counted in flows and in no total yet: whoever wants to know the traffic of this moment adds it to the totals.

use super::maps::MapError;
use crate::sync::Maps;
use dataplane_common::counter::Traffic;
use dataplane_common::tables::Flows;
use std::collections::HashMap;

/// The traffic that flows have counted since they were last folded.
#[derive(Clone, Debug, Default)]
pub struct InFlows {
    services: HashMap<u32, Traffic>,
    backends: HashMap<(u32, u32), Traffic>,
}

impl InFlows {
    /// Walks through all flows.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read<M: Maps>(maps: &M) -> Result<Self, MapError> {
        let mut found = Self::default();
        maps.visit::<Flows>(|_, flow| {
            if !flow.counted.is_zero() {
                let traffic = Traffic::of_half(&flow);
                *found.services.entry(flow.service).or_default() += traffic;
                *found.backends.entry((flow.backend, flow.generation)).or_default() += traffic;
            }
        })?;
        Ok(found)
    }

    /// The total of a service port, with what its flows have counted.
    #[must_use]
    pub fn with_service(&self, id: u32, mut total: Traffic) -> Traffic {
        total += self.services.get(&id).copied().unwrap_or_default();
        total
    }

    /// The total of a backend that has this generation of its id, with what its flows have counted.
    #[must_use]
    pub fn with_backend(&self, id: u32, generation: u32, mut total: Traffic) -> Traffic {
        total += self.backends.get(&(id, generation)).copied().unwrap_or_default();
        total
    }
}
