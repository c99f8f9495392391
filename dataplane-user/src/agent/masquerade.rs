//! Keeps netfilter's part of the translation of sources: the rules that masquerade what the programs mark. The programs mark nothing
//! before the rules are there. It runs beside the tables, and is back within a second where something takes the rules away.

use crate::heartbeat::Beat;
use crate::kernel::links::Interfaces;
use crate::kernel::masquerade::{self, Masquerade};
use crate::kernel::roles::{Choice, Kind, Role};
use crate::metrics::Metrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Time between two looks whether the rules are there.
const LOOK: Duration = Duration::from_millis(500);
/// How many times longer than one of the event loop a round may take.
pub(super) const PATIENCE: u32 = 1;

/// What the programs must know of the node's netfilter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Netfilter {
    /// The mark that is masqueraded; 0: none is.
    pub(super) mark: u32,
    /// The mark that is noted of connections; 0: none is.
    pub(super) connection_mark: u32,
    /// An uplink is a bridge that hands its packets to netfilter before tc sees them.
    pub(super) before_tc: bool,
}

/// Looks after the rules.
pub(super) struct Masquerading {
    wanted: Masquerade,
    interfaces: watch::Receiver<Interfaces>,
    choice: Choice,
    metrics: Arc<Metrics>,
    /// What was said last.
    told: Option<Result<(), String>>,
}

impl Masquerading {
    pub(super) fn new(
        wanted: Masquerade,
        interfaces: watch::Receiver<Interfaces>,
        choice: Choice,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { wanted, interfaces, choice, metrics, told: None }
    }

    /// Makes what is missing, and says what is new of it.
    pub(super) fn look(&mut self) -> Netfilter {
        let before_tc = self.has_bridge() && masquerade::bridges_call_netfilter();
        let wanted = &self.wanted;
        if !wanted.is_wanted() {
            return Netfilter { before_tc, ..Netfilter::default() };
        }
        let result = wanted.ensure();
        let [mark, connection_mark] =
            if result.is_ok() { [wanted.mark, wanted.connection_mark] } else { [0, 0] };
        self.metrics.masquerading.set(u64::from(mark != 0));
        if matches!(result, Ok(true)) && self.told == Some(Ok(())) {
            self.metrics.masquerade_restored.add(1);
            tracing::warn!(
                "something removed or changed the nftables table inet {}: it is back. What flushes the whole ruleset does that",
                masquerade::TABLE
            );
        }
        let now = result.map(drop).map_err(|error| error.to_string());
        if self.told.as_ref() != Some(&now) {
            match &now {
                Ok(()) if mark != 0 => tracing::info!(
                    "clients from outside are masqueraded by netfilter where the endpoint is on this node: mark {mark:#x}, ports {}-{}",
                    wanted.ports.start(),
                    wanted.ports.end()
                ),
                Ok(()) => {}
                Err(error) => tracing::error!("{error}"),
            }
        }
        self.told = Some(now);
        Netfilter { mark, connection_mark, before_tc }
    }

    /// Follows it for ever.
    pub(super) async fn keep(mut self, state: watch::Sender<Netfilter>, beat: Beat) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beat.beat();
            tokio::select! {
                changed = self.interfaces.changed() => if changed.is_err() { return },
                _ = looks.tick() => {}
            }
            let now = tokio::task::block_in_place(|| self.look());
            state.send_if_modified(|state| std::mem::replace(state, now) != now);
        }
    }

    /// Whether an uplink is a bridge.
    fn has_bridge(&mut self) -> bool {
        let interfaces = self.interfaces.borrow_and_update();
        let is_bridge = |index| interfaces.links.get(index).is_some_and(|link| link.kind == Kind::Bridge);
        interfaces.roles(&self.choice).iter().any(|(index, role)| *role == Role::Uplink && is_bridge(index))
    }
}
