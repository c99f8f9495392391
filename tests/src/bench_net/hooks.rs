//! Programs that do nothing where Portolan's tc programs would be: what the hooks cost whoever uses them.

use crate::lab::Node;
use crate::packet::index;
use anyhow::{Context, Result, ensure};
use dataplane_user::kernel::hook::Hook;
use dataplane_user::kernel::link::{self, Link};
use dataplane_user::kernel::object::{Object, Options};
use dataplane_user::kernel::probe;
use dataplane_user::kernel::roles::Role;
use std::os::fd::BorrowedFd;

/// The program that does nothing, of Portolan's object.
const EMPTY: &str = "tc_empty";
/// The uplink of every node.
const UPLINK: &str = "eth0";

/// Attaches the empty program to the uplink and to the pod interfaces that a node has by now, for as long as the result lives.
pub(super) fn attach_empty(node: &Node) -> Result<Vec<Link>> {
    ensure!(probe::features()?.tcx, "this kernel has no TCX (it came with Linux 6.6)");
    // A link holds its program; the maps, which that does not use, end with the object.
    let mut object = Object::open(&Options::default())?;
    object.load(EMPTY)?;
    let program = object.program(EMPTY)?;
    let pods = node.pods_by_name().into_iter().map(|pod| (pod.node_interface(), Role::Pod));
    let interfaces: Vec<_> = [(UPLINK.to_owned(), Role::Uplink)].into_iter().chain(pods).collect();
    node.place().enter(|| {
        let hooks = |(name, role): &(String, Role)| Hook::of(*role, true).map(|hook| (name.clone(), hook));
        interfaces.iter().flat_map(hooks).map(|(name, hook)| attach(program, &name, hook)).collect()
    })?
}

/// Attaches it to an interface of the calling thread's namespace, in the place of the program of a hook.
fn attach(program: BorrowedFd<'_>, interface: &str, hook: Hook) -> Result<Link> {
    let (attach_type, order) = link::tcx(hook.is_egress());
    Link::to_interface(program, index(interface)?, attach_type, order)
        .with_context(|| format!("{EMPTY} in the place of {} on {interface}", hook.program()))
}
