//! Tells which interface is what, and why: in the log at the start and whenever it changes, and as metrics.

use crate::kernel::links::Interfaces;
use crate::kernel::roles::{Choice, Finding, Reason, Role};
use crate::metrics::{InterfaceRole, Metrics};
use std::collections::BTreeMap;

/// What was told last.
#[derive(Debug, Default)]
pub(super) struct Roles {
    /// By index, with the name; `None` before the first time.
    told: Option<BTreeMap<u32, (String, Finding)>>,
}

impl Roles {
    /// The roles of the interfaces, as of now. Tells what is new of it.
    pub(super) fn look(
        &mut self,
        interfaces: &Interfaces,
        choice: &Choice,
        metrics: &Metrics,
    ) -> BTreeMap<u32, Role> {
        let findings = interfaces.findings(choice);
        let roles = findings.iter().filter_map(|(index, finding)| Some((*index, finding.role?))).collect();
        let name = |index: &u32| interfaces.links.get(index).map(|link| link.name.clone());
        let now: BTreeMap<u32, (String, Finding)> = findings
            .into_iter()
            .filter_map(|(index, finding)| Some((index, (name(&index)?, finding))))
            .collect();
        if self.told.as_ref() != Some(&now) {
            metrics.set_interfaces(series(&now), [Role::Uplink, Role::Pod].map(|role| count(&now, role)));
            self.tell(&now);
            self.told = Some(now);
        }
        roles
    }

    fn tell(&self, now: &BTreeMap<u32, (String, Finding)>) {
        let nothing = BTreeMap::new();
        let before = self.told.as_ref().unwrap_or(&nothing);
        for (index, told) in now.iter().filter(|(index, told)| before.get(index) != Some(told)) {
            let (name, Finding { role, reason }) = told;
            match role {
                Some(role) => {
                    tracing::debug!("{name} ({index}) is an interface of the kind {role}: {reason}")
                }
                None => tell_unserved(name, *index, reason),
            }
        }
        let uplinks = uplinks(now);
        if self.told.as_ref().map(self::uplinks).as_ref() == Some(&uplinks) {
            return;
        }
        if uplinks.is_empty() {
            tracing::warn!(
                "no uplink: no interface has an address of the node or a route, or none that --uplink names; nothing from the network \
                 is served"
            );
        } else {
            tracing::info!("uplinks: {}; pod interfaces: {}", uplinks.join(", "), count(now, Role::Pod));
        }
    }
}

fn tell_unserved(name: &str, index: u32, reason: &Reason) {
    match reason {
        Reason::LeftOver => tracing::warn!(
            "{name} is left over from another proxy: Services are served at its addresses as at others, and no node port; remove it \
             with `ip link delete {name}`"
        ),
        Reason::LinkLayer => tracing::warn!("{name} is not served: {reason}"),
        Reason::ServiceRoute
        | Reason::Named
        | Reason::DefaultRoute
        | Reason::Address(_)
        | Reason::Routes
        | Reason::GuestPort(_)
        | Reason::SingleAddresses
        | Reason::Pair
        | Reason::Loopback
        | Reason::NotNamed
        | Reason::Port(_)
        | Reason::Carries(_)
        | Reason::Ports
        | Reason::NothingBehind
        | Reason::Unused => tracing::debug!("{name} ({index}) is not served: {reason}"),
    }
}

/// The uplinks to the network by name, each with the reason.
fn uplinks(now: &BTreeMap<u32, (String, Finding)>) -> Vec<String> {
    let uplinks = now
        .values()
        .filter(|(_, finding)| finding.role == Some(Role::Uplink) && finding.reason != Reason::ServiceRoute);
    uplinks.map(|(name, finding)| format!("{name} ({})", finding.reason)).collect()
}

fn count(now: &BTreeMap<u32, (String, Finding)>, role: Role) -> u64 {
    now.values().filter(|(_, finding)| finding.role == Some(role)).count() as u64
}

/// All but pods' interfaces and loopback: those are many, or known.
fn series(now: &BTreeMap<u32, (String, Finding)>) -> Vec<InterfaceRole> {
    let told = now.values().filter(|(_, finding)| match (finding.role, &finding.reason) {
        (Some(Role::Pod), _) | (None, Reason::Loopback) => false,
        (Some(Role::Uplink) | None, _) => true,
    });
    told.map(|(name, finding)| InterfaceRole {
        interface: name.clone(),
        role: if finding.role.is_some() { "uplink" } else { "none" },
        reason: finding.reason.label(),
    })
    .collect()
}
