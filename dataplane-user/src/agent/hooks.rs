//! Keeps the programs attached: to interfaces as they come and go, and to the cgroup. It runs beside the tables, so that a
//! driver that takes its time never holds up an update.

use crate::health::Health;
use crate::kernel::attach::Attachments;
use crate::kernel::links::{Choice, Interfaces, Role};
use crate::kernel::probe::Cgroup;
use crate::metrics::Metrics;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Time between two looks whether all is still attached (H2), and between tries of what failed.
const LOOK: Duration = Duration::from_secs(10);

/// What is attached, and what should be.
pub(super) struct Hooks {
    /// What is attached.
    pub(super) attachments: Attachments,
    /// The interfaces, as they are.
    pub(super) interfaces: watch::Receiver<Interfaces>,
    /// Which of them the operator chose.
    pub(super) choice: Choice,
    /// Where the socket hooks are, if they are anywhere.
    pub(super) cgroup: Option<Cgroup>,
    /// Who is told what is missing.
    pub(super) health: Arc<Health>,
    /// Where it is counted.
    pub(super) metrics: Arc<Metrics>,
    /// What was logged last, so that it is said once.
    pub(super) told: Told,
}

/// What was logged last.
#[derive(Debug, Default)]
pub(super) struct Told {
    roles: Option<BTreeMap<u32, Role>>,
    errors: BTreeSet<String>,
}

impl Hooks {
    /// Attaches all that is missing, for the first time before anybody is told that this node is ready.
    pub(super) fn start(&mut self) {
        let mut errors = self.attachments.sockets(self.cgroup.as_ref());
        errors.extend(self.attach());
        self.attachments.settled();
        self.tell(errors.iter().map(ToString::to_string).collect());
    }

    /// Follows the interfaces for ever.
    pub(super) async fn run(mut self) {
        // However often interfaces come and go.
        let mut looks = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let look = tokio::select! {
                changed = self.interfaces.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return,
                },
                _ = looks.tick() => true,
            };
            // The kernel waits for a grace period with each new link.
            tokio::task::block_in_place(|| {
                let mut errors = if look { self.look() } else { Vec::new() };
                errors.extend(self.attach());
                self.tell(errors.iter().map(ToString::to_string).collect());
            });
        }
    }

    /// Finds what somebody detached; the socket hooks among it are attached again here.
    fn look(&mut self) -> Vec<crate::kernel::attach::AttachError> {
        let lost = self.attachments.lost();
        if lost.is_empty() {
            return Vec::new();
        }
        tracing::warn!(
            "no longer attached, attaching again: {}. Does something else remove them?",
            lost.join(", ")
        );
        self.metrics.reattached.add(lost.len() as u64);
        self.health.detached(lost.iter().map(|hook| format!("{hook}: somebody detached it")).collect());
        self.attachments.sockets(self.cgroup.as_ref())
    }

    fn attach(&mut self) -> Vec<crate::kernel::attach::AttachError> {
        let interfaces = self.interfaces.borrow_and_update().clone();
        let roles = interfaces.roles(&self.choice);
        let errors = self.attachments.interfaces(&interfaces, &roles);
        self.tell_roles(&interfaces, roles);
        errors
    }

    fn tell_roles(&mut self, interfaces: &Interfaces, roles: BTreeMap<u32, Role>) {
        if self.told.roles.as_ref() == Some(&roles) {
            return;
        }
        let of =
            |wanted: Role| roles.iter().filter(move |(_, role)| **role == wanted).map(|(index, _)| *index);
        let name = |index: u32| interfaces.links.get(&index).map_or("?", |link| link.name.as_str());
        let uplinks: Vec<_> = of(Role::Uplink).map(name).collect();
        let pods = of(Role::Pod).count();
        self.metrics.interfaces[0].set(uplinks.len() as u64);
        self.metrics.interfaces[1].set(pods as u64);
        let uplinks_before = self.told.roles.as_ref().map(|roles| {
            roles
                .iter()
                .filter(|(_, role)| **role == Role::Uplink)
                .map(|(index, _)| *index)
                .collect::<Vec<_>>()
        });
        if uplinks_before != Some(of(Role::Uplink).collect()) {
            match uplinks.as_slice() {
                [] => tracing::warn!(
                    "no uplink: there is no default route and no --uplink fits, so nothing from the network is served"
                ),
                uplinks => tracing::info!("uplinks: {}; pod interfaces: {pods}", uplinks.join(", ")),
            }
        } else {
            tracing::debug!("pod interfaces: {pods}");
        }
        self.told.roles = Some(roles);
    }

    fn tell(&mut self, errors: BTreeSet<String>) {
        for error in errors.difference(&self.told.errors) {
            tracing::error!("{error}");
        }
        if errors.is_empty() && !self.told.errors.is_empty() {
            tracing::info!("all programs are attached again");
        }
        self.health.detached(errors.clone());
        self.told.errors = errors;
    }
}
