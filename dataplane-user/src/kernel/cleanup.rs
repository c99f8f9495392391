//! Takes everything away that the agent left in the kernel: links, clsact filters, maps, pins and folders. It says what it
//! removed, goes on after a failure, and touches nothing that another program made.

use super::clsact;
use super::hook::Hook;
use super::link::interface_name;
use super::links::LinksError;
use super::masquerade::{self, MasqueradeError};
use super::pins::{self, PinError, Pins};
use super::service_route::{self, RouteError};
use crate::admin::names::Names;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};
use std::path::Path;

/// What went wrong while cleaning up.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The pin folder, also when an agent still runs.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// Netlink.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// The routes to Services.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// The rules of netfilter.
    #[error("cannot remove the nftables table inet {table}: {0}", table = masquerade::TABLE)]
    Netfilter(#[source] MasqueradeError),
}

/// Removes everything of the agent whose pin folder is `bpffs`, and the clsact filters in this network namespace; tells each
/// thing that it removed.
///
/// # Errors
/// If an agent still uses the folder, or something cannot be removed.
pub async fn cleanup(bpffs: &Path, mut removed: impl FnMut(String)) -> Result<(), CleanupError> {
    let pins = Pins::new(bpffs);
    let _held = if pins.root().exists() { Some(pins.hold(pins::ENDING)?) } else { None };
    // First the programs, the translating ones before those that restore what they did; then what they read.
    let mut links = pins.pinned_links()?;
    links.sort_by_key(|name| is_restoring(name));
    for name in links {
        pins.remove(&pins.links().join(&name))?;
        removed(format!("link {}", describe(&name)));
    }
    filters(&mut removed).await?;
    if service_route::remove(&handle()?).await? {
        removed(format!("interface {} and its routes", service_route::DEVICE));
    }
    match masquerade::remove() {
        Ok(true) => removed(format!("nftables table inet {}", masquerade::TABLE)),
        Ok(false) => {}
        Err(error) if error.is_lacking() => {}
        Err(error) => return Err(CleanupError::Netfilter(error)),
    }
    for map in pins.pinned_maps()? {
        pins.remove(&map)?;
        removed(format!("map {}", map.file_name().unwrap_or_default().to_string_lossy()));
    }
    Names::remove(bpffs);
    if pins.root().exists() {
        pins.remove_folders()?;
        removed(format!("folder {}", pins.root().display()));
    }
    Ok(())
}

fn is_restoring(link: &str) -> bool {
    link.starts_with("recvmsg")
        || link.starts_with("getpeername")
        || Hook::ALL.iter().any(|hook| hook.is_egress() && link.starts_with(hook.program()))
}

/// The pin's name, and the name of its interface if it still has one.
fn describe(pin: &str) -> String {
    let index = pin.rsplit_once('-').and_then(|(_, index)| index.parse::<u32>().ok());
    match index.and_then(interface_name) {
        Some(interface) => format!("{pin} (interface {interface})"),
        None => pin.to_owned(),
    }
}

fn handle() -> Result<rtnetlink::Handle, LinksError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Removes this agent's filters from all interfaces, and a clsact qdisc that has none left.
async fn filters(removed: &mut impl FnMut(String)) -> Result<(), LinksError> {
    use futures::TryStreamExt as _;
    let handle = handle()?;
    let interfaces = super::links::dump(&handle).await?;
    for (index, interface) in interfaces.links {
        let gone = clsact::detach(&interface.name);
        for direction in &gone {
            removed(format!("tc filter on {} {direction}", interface.name));
        }
        let index = i32::try_from(index).unwrap_or_default();
        let failed = |what| move |source| LinksError::Dump { what, source };
        let mut left = 0;
        for request in [
            handle.traffic_filter(index).get().ingress().execute(),
            handle.traffic_filter(index).get().egress().execute(),
        ] {
            let filters: Vec<_> = request.try_collect().await.map_err(failed("tc filters"))?;
            // The kernel lists the chain as well; a filter has options.
            left += filters
                .iter()
                .filter(|filter| filter.attributes.iter().any(|it| matches!(it, TcAttribute::Options(_))))
                .count();
        }
        if !gone.is_empty() && left == 0 {
            let mut request = handle.qdisc().del(index);
            request.message_mut().header.parent = TcHandle::CLSACT;
            request.message_mut().header.handle = TcHandle { major: 0xffff, minor: 0 };
            if request.execute().await.is_ok() {
                removed(format!("clsact qdisc on {}", interface.name));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translating_programs_go_before_restoring_ones() {
        let mut links = ["connect4", "recvmsg4", "tc_pod_in-4", "tc_pod_out-4", "xdp_uplink-2"];
        links.sort_by_key(|name| is_restoring(name));
        assert_eq!(links, ["connect4", "tc_pod_in-4", "xdp_uplink-2", "recvmsg4", "tc_pod_out-4"]);
    }
}
