//! Another Service proxy that comes back to this node, as kube-proxy does with a `kubeadm upgrade`: its rules are noticed and told
//! of, and nothing is done about them.

use super::{JOB, Service};
use crate::kernel::other_proxies::{self, Found};
use crate::model::{Kind, ObjectName};
use crate::watch::events::{Event, Severity, reason};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Time between two looks at netfilter, which may have many rules.
const LOOK: Duration = Duration::from_secs(30);
/// How many traces an Event names.
const NAMED: usize = 4;

/// What is known of other proxies on this node.
#[derive(Debug, Default)]
pub(super) struct Rivals {
    looked: Option<Instant>,
    looking: Option<JoinHandle<Found>>,
    /// What the last look found; before the first, nothing is known.
    known: Option<Vec<String>>,
}

impl Rivals {
    /// Takes in what a look found; what is to be told if there was nothing before. What was there when the agent began is what it takes
    /// over from.
    fn learn(&mut self, found: Vec<String>) -> Option<String> {
        let is_new = self.known.as_ref().is_some_and(Vec::is_empty) && !found.is_empty();
        let told = is_new.then(|| found.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", "));
        self.known = Some(found);
        told
    }
}

impl Service {
    /// Looks from time to time, beside the loop.
    pub(super) async fn look_for_rivals(&mut self) {
        match self.rivals.looking.take() {
            Some(looking) if !looking.is_finished() => self.rivals.looking = Some(looking),
            Some(looking) => match looking.await {
                Ok(found) => self.found_rivals(found),
                Err(error) => tracing::error!("looking for other proxies: {error}"),
            },
            None if self.rivals.looked.is_none_or(|looked| looked.elapsed() >= LOOK) => {
                self.rivals.looked = Some(Instant::now());
                let beat = self.health.heartbeat().part("the look for other proxies", JOB);
                self.rivals.looking = Some(tokio::task::spawn_blocking(move || {
                    let _at_work = beat;
                    other_proxies::look()
                }));
            }
            None => {}
        }
    }

    fn found_rivals(&mut self, found: Found) {
        for unknown in &found.unknown {
            tracing::debug!("{unknown}");
        }
        self.metrics.rivals.set(found.traces.len() as u64);
        let Some(traces) = self.rivals.learn(found.traces) else { return };
        let note = format!(
            "another Service proxy has come to this node: {traces}. Portolan serves on, and both translate; docs/take-over.md says how \
             kube-proxy is kept away"
        );
        tracing::warn!("{note}");
        let name = self.dataplane.store().node_name().clone();
        self.watch.events().publish(Event {
            kind: Kind::Node,
            name: ObjectName::new("", name.clone()),
            // What kubelet's Events about its Node have there, and `kubectl describe node` looks for.
            uid: name,
            severity: Severity::Warning,
            reason: reason::ANOTHER_PROXY,
            note,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_is_told_of_once_and_who_was_there_is_not() {
        let rules = || vec!["table kube-proxy of nftables".to_owned()];
        let mut rivals = Rivals::default();
        assert_eq!(rivals.learn(rules()), None, "what was there is taken over from");
        assert_eq!(rivals.learn(Vec::new()), None);
        assert_eq!(rivals.learn(rules()), Some(rules()[0].clone()));
        assert_eq!(rivals.learn(rules()), None);
        assert_eq!(rivals.learn(Vec::new()), None);
        assert!(rivals.learn(rules()).is_some(), "again");
    }
}
