//! Keeps the programs attached: to interfaces as they come and go, and to the cgroup. It runs beside the tables, so that a
//! driver that takes its time never holds up an update.

use super::roles::Roles;
use crate::health::{Health, Unattached};
use crate::kernel::attach::{AttachError, Attachments};
use crate::kernel::links::Interfaces;
use crate::kernel::pins::Pins;
use crate::kernel::probe::Cgroup;
use crate::kernel::roles::Choice;
use crate::kernel::service_route;
use crate::metrics::Metrics;
use crate::model::{Kind, ObjectName};
use crate::watch::events::{Event, Events, Severity, reason};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Time between two looks whether all is still attached (H2), and between tries of what failed.
const LOOK: Duration = Duration::from_secs(10);
/// How many times longer than one of the event loop a round may take: each new link waits for a grace period of the kernel, and
/// there may be hundreds.
const ROUND: u32 = 5;

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
    /// Those who look at the Node are told as well.
    pub(super) events: Events,
    /// Name of the Node.
    pub(super) node_name: Arc<str>,
    /// What the interfaces are, so that it is said once.
    pub(super) roles: Roles,
    /// What was said last, so that it is said once.
    pub(super) told: Told,
    /// The index of the device that Portolan's routes lead to, as soon as its program is attached.
    pub(super) own_device: watch::Sender<Option<u32>>,
}

/// When programs are attached.
pub(super) enum Start {
    /// Before anything is written: what an earlier agent wrote is served.
    Now(Hooks),
    /// The programs that are attached read maps of another layout, and serve what those hold. These take their place when their
    /// own maps hold all of it; then the other maps go.
    AfterTheFirstSnapshot(Hooks, Pins),
}

/// What was said last.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Of the sockets, as it was when they were last looked at.
    sockets: Unattached,
    /// Of the sockets and the interfaces.
    unattached: Unattached,
}

impl Hooks {
    /// Attaches all that is missing, for the first time before anybody is told that this node is ready.
    pub(super) fn start(&mut self) {
        self.attach_sockets();
        self.attach_interfaces();
        self.attachments.settled();
    }

    /// Follows the interfaces for ever.
    pub(super) async fn run(mut self) {
        // However often interfaces come and go.
        let mut looks = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let beat = self.health.heartbeat().part("the task that attaches programs", ROUND);
        loop {
            beat.beat();
            let look = tokio::select! {
                changed = self.interfaces.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return,
                },
                _ = looks.tick() => true,
            };
            // The kernel waits for a grace period with each new link.
            tokio::task::block_in_place(|| {
                if look {
                    self.look();
                }
                self.attach_interfaces();
            });
        }
    }

    /// Finds what somebody detached. The socket hooks among it are attached again here, and those that never could be are tried
    /// again.
    fn look(&mut self) {
        let lost = self.attachments.lost();
        if !lost.is_empty() {
            tracing::warn!(
                "no longer attached, attaching again: {}. Does something else remove them?",
                lost.join(", ")
            );
            self.metrics.reattached.add(lost.len() as u64);
        }
        self.attach_sockets();
    }

    fn attach_sockets(&mut self) {
        self.told.sockets = unattached(&self.attachments.sockets(self.cgroup.as_ref()));
    }

    fn attach_interfaces(&mut self) {
        let interfaces = self.interfaces.borrow_and_update().clone();
        let roles = self.roles.look(&interfaces, &self.choice, &self.metrics);
        let mut all = unattached(&self.attachments.interfaces(&interfaces, &roles));
        all.all.extend(self.told.sockets.all.iter().cloned());
        self.tell(all);
        let own = interfaces.links.iter().find(|(_, link)| link.name == service_route::DEVICE);
        let served = own.map(|(index, _)| *index).filter(|&index| self.attachments.takes_what_leaves(index));
        self.own_device.send_if_modified(|known| std::mem::replace(known, served) != served);
    }

    fn tell(&mut self, unattached: Unattached) {
        for error in unattached.all.difference(&self.told.unattached.all) {
            tracing::error!("{error}");
            self.events.publish(Event {
                kind: Kind::Node,
                name: ObjectName::new("", self.node_name.clone()),
                // What kubelet's Events about its Node have there, and `kubectl describe node` looks for.
                uid: self.node_name.clone(),
                severity: Severity::Warning,
                reason: reason::PROGRAM_NOT_ATTACHED,
                note: error.clone(),
            });
        }
        if unattached.all.is_empty() && !self.told.unattached.all.is_empty() {
            tracing::info!("all programs are attached");
        }
        self.health.unattached(unattached.clone());
        self.told.unattached = unattached;
    }
}

/// Errors as health has them.
fn unattached(errors: &[AttachError]) -> Unattached {
    let texts = |wanted: fn(&AttachError) -> bool| {
        errors.iter().filter(|error| wanted(error)).map(ToString::to_string).collect()
    };
    Unattached { all: texts(|_| true), deafening: texts(AttachError::is_deafening) }
}
