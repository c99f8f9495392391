//! One write to one table, and the one place that performs it.

use super::Maps;
use crate::kernel::maps::MapError;
use bytemuck::Zeroable as _;
use dataplane_common::Addr;
use dataplane_common::backend::Backend;
use dataplane_common::counter::{Open, Traffic};
use dataplane_common::frontend::{Frontend, FrontendKey};
use dataplane_common::kept::Tries;
use dataplane_common::node::{Node, NodeAddress};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::Service;
use dataplane_common::tables;
use std::mem::discriminant;

/// One write to one table.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A word of the filter.
    Filter(u32, u64),
    /// A service port's counters begin at zero.
    ZeroServiceTraffic(u32),
    /// A backend's counters begin at zero.
    ZeroBackendTraffic(u32),
    /// Nothing is open of a backend whose id is new.
    ZeroOpen(u32),
    /// A backend, by id.
    Backend(u32, Backend),
    /// A slot and the backend id it holds.
    Slot(u32, u32),
    /// A service port, by id.
    Service(u32, Service),
    /// A range of sources that may call a service port's restricted addresses.
    SourceRange(SourceRangeKey),
    /// A range that goes.
    RemoveSourceRange(SourceRangeKey),
    /// A frontend.
    Frontend(FrontendKey, Frontend),
    /// A frontend that goes.
    RemoveFrontend(FrontendKey),
    /// An address of the node.
    NodeAddress(Addr, NodeAddress),
    /// An address that the node no longer has.
    RemoveNodeAddress(Addr),
    /// The node's settings.
    Node(Box<Node>),
}

/// Performs the ops in their order; neighbours of one kind go in one call.
///
/// # Errors
/// The first refusal. All ops before those of its call were performed.
pub fn apply<M: Maps>(maps: &M, ops: &[Op]) -> Result<(), MapError> {
    ops.chunk_by(|a, b| discriminant(a) == discriminant(b)).try_for_each(|alike| apply_alike(maps, alike))
}

fn apply_alike<M: Maps>(maps: &M, ops: &[Op]) -> Result<(), MapError> {
    /// Those parts of the ops that the pattern names.
    macro_rules! each {
        ($pattern:pat => $part:expr) => {
            ops.iter().filter_map(|op| if let $pattern = op { Some($part) } else { None }).collect::<Vec<_>>()
        };
    }
    match ops.first() {
        None => Ok(()),
        Some(Op::Filter(..)) => {
            maps.write::<tables::Filter>(&each!(Op::Filter(word, bits) => (*word, *bits)))
        }
        Some(Op::ZeroServiceTraffic(_)) => {
            maps.write::<tables::ServiceTries>(&each!(Op::ZeroServiceTraffic(id) => (*id, Tries::zeroed())))?;
            maps.write::<tables::ServiceTraffic>(
                &each!(Op::ZeroServiceTraffic(id) => (*id, Traffic::zeroed())),
            )
        }
        Some(Op::ZeroBackendTraffic(_)) => maps
            .write::<tables::BackendTraffic>(&each!(Op::ZeroBackendTraffic(id) => (*id, Traffic::zeroed()))),
        Some(Op::ZeroOpen(_)) => {
            maps.write::<tables::OpenCounts>(&each!(Op::ZeroOpen(id) => (*id, Open::default())))
        }
        Some(Op::Backend(..)) => {
            maps.write::<tables::Backends>(&each!(Op::Backend(id, backend) => (*id, *backend)))
        }
        Some(Op::Slot(..)) => maps.write::<tables::Slots>(&each!(Op::Slot(slot, id) => (*slot, *id))),
        Some(Op::Service(..)) => {
            maps.write::<tables::Services>(&each!(Op::Service(id, service) => (*id, *service)))
        }
        Some(Op::SourceRange(_)) => maps
            .write::<tables::SourceRanges>(&each!(Op::SourceRange(key) => (*key, SourceRangeKey::ALLOWED))),
        Some(Op::RemoveSourceRange(_)) => {
            maps.remove::<tables::SourceRanges>(&each!(Op::RemoveSourceRange(key) => *key)).map(drop)
        }
        Some(Op::Frontend(..)) => {
            maps.write::<tables::Frontends>(&each!(Op::Frontend(key, value) => (*key, *value)))
        }
        Some(Op::RemoveFrontend(_)) => {
            maps.remove::<tables::Frontends>(&each!(Op::RemoveFrontend(key) => *key)).map(drop)
        }
        Some(Op::NodeAddress(..)) => {
            maps.write::<tables::NodeAddrs>(&each!(Op::NodeAddress(addr, value) => (*addr, *value)))
        }
        Some(Op::RemoveNodeAddress(_)) => {
            maps.remove::<tables::NodeAddrs>(&each!(Op::RemoveNodeAddress(addr) => *addr)).map(drop)
        }
        Some(Op::Node(_)) => maps.write::<tables::Nodes>(&each!(Op::Node(node) => (0, **node))),
    }
}
