//! The ops of one change, kept by phase: whatever order they are found in, they are performed in the one that is safe.

use super::Op;
use super::filter::Filter;
use dataplane_common::Addr;
use dataplane_common::backend::Backend;
use dataplane_common::frontend::{Frontend, FrontendKey};
use dataplane_common::node::{Node, NodeAddress};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::Service;
use std::collections::{BTreeMap, BTreeSet};

/// What is to be written, by phase.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Service ports whose counters begin at zero.
    pub(super) zero_services: Vec<u32>,
    /// Backends whose counters begin at zero.
    pub(super) zero_backends: Vec<u32>,
    /// New backends, and those whose flags change for the better.
    pub(super) backends: Vec<(u32, Backend)>,
    /// New runs.
    pub(super) slots: Vec<(u32, u32)>,
    /// New ranges of sources.
    pub(super) ranges: Vec<SourceRangeKey>,
    /// Service ports that flip to new runs.
    pub(super) services: Vec<(u32, Service)>,
    /// New frontends, and those that lead elsewhere now.
    pub(super) frontends: Vec<(FrontendKey, Frontend)>,
    /// Frontends that go, unless another Service took them over meanwhile.
    pub(super) removed_frontends: BTreeSet<FrontendKey>,
    /// Service ports that go.
    pub(super) cleared_services: Vec<u32>,
    /// Ranges of sources that go.
    pub(super) removed_ranges: BTreeSet<SourceRangeKey>,
    /// Backends that stop serving.
    pub(super) retired: Vec<(u32, Backend)>,
    /// Addresses of the node.
    pub(super) addresses: BTreeMap<Addr, NodeAddress>,
    /// Addresses that the node no longer has.
    pub(super) removed_addresses: BTreeSet<Addr>,
    /// The node's settings.
    pub(super) node: Option<Box<Node>>,
}

impl Plan {
    /// The ops in an order of which every prefix is consistent: what is referred to is there before what refers to it,
    /// and goes after it.
    pub(super) fn into_ops(self, filter: &mut Filter) -> Vec<Op> {
        let mut ops = filter.take_ops();
        ops.extend(self.addresses.into_iter().map(|(addr, value)| Op::NodeAddress(addr, value)));
        ops.extend(self.zero_services.into_iter().map(Op::ZeroServiceTraffic));
        ops.extend(self.zero_backends.iter().copied().map(Op::ZeroBackendTraffic));
        ops.extend(self.backends.into_iter().map(|(id, value)| Op::Backend(id, value)));
        // After the id's new generation, from which on what ends of the one before it is not counted off here.
        ops.extend(self.zero_backends.into_iter().map(Op::ZeroOpen));
        ops.extend(self.slots.into_iter().map(|(slot, id)| Op::Slot(slot, id)));
        // S2: there before the policy that asks for them, and gone after it; where they change, the new ones come first.
        ops.extend(self.ranges.into_iter().map(Op::SourceRange));
        ops.extend(self.node.map(Op::Node));
        ops.extend(self.services.into_iter().map(|(id, value)| Op::Service(id, value)));
        ops.extend(self.frontends.into_iter().map(|(key, value)| Op::Frontend(key, value)));
        ops.extend(self.removed_frontends.into_iter().map(Op::RemoveFrontend));
        ops.extend(self.cleared_services.into_iter().map(|id| Op::Service(id, Service::default())));
        ops.extend(self.removed_ranges.into_iter().map(Op::RemoveSourceRange));
        ops.extend(self.retired.into_iter().map(|(id, value)| Op::Backend(id, value)));
        ops.extend(self.removed_addresses.into_iter().map(Op::RemoveNodeAddress));
        ops
    }
}
