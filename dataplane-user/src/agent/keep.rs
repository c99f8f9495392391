//! When the objects are kept on disk, and when they are taken from there: a node that boots while the API server is away
//! serves what it knew. Writing is done beside the loop.

use super::settings::Settings;
use crate::config::AgentArgs;
use crate::metrics::Metrics;
use crate::model::Store;
use crate::snapshot::{File, Loaded, Owner, SnapshotError, servers};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::task::JoinHandle;

/// What has not changed for so long is kept.
const QUIET: Duration = Duration::from_secs(2);
/// What changes all the time is kept this often.
const LONGEST: Duration = Duration::from_secs(60);
/// How long the API server may take to tell everything before the snapshot is asked, if it does not fail before.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tells when something that changes is worth keeping.
#[derive(Debug, Default)]
struct Debounce {
    kept: u64,
    seen: u64,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Debounce {
    /// Whether this revision is to be kept now.
    fn is_due(&mut self, revision: u64, now: Instant) -> bool {
        if revision == self.kept {
            return false;
        }
        if revision != self.seen {
            self.seen = revision;
            self.last = Some(now);
            self.first.get_or_insert(now);
        }
        let since = |moment: Option<Instant>| moment.map_or(Duration::ZERO, |it| now.duration_since(it));
        since(self.last) >= QUIET || since(self.first) >= LONGEST
    }

    /// This revision is kept, or was tried to be.
    fn done(&mut self, revision: u64) {
        (self.kept, self.seen, self.first, self.last) = (revision, revision, None, None);
    }
}

/// The snapshot of this agent; none of one that reads manifests, which lie on a disk themselves.
#[derive(Debug)]
pub(super) struct Keeping {
    file: Option<File>,
    metrics: Arc<Metrics>,
    begun: Instant,
    /// The snapshot was asked for.
    asked: bool,
    debounce: Debounce,
    /// The API servers that are kept.
    servers: Vec<String>,
    saving: Option<JoinHandle<Result<(), SnapshotError>>>,
    /// It was said that it cannot be written.
    complained: bool,
}

impl Keeping {
    pub(super) fn new(args: &AgentArgs, settings: &Settings, metrics: Arc<Metrics>) -> Self {
        let owner = Owner { node: settings.node_name.clone(), proxy_name: settings.proxy_name.clone() };
        Self {
            file: args.manifests.is_none().then(|| File::new(&args.state_dir, owner)),
            metrics,
            begun: Instant::now(),
            asked: false,
            debounce: Debounce::default(),
            servers: Vec::new(),
            saving: None,
            complained: false,
        }
    }

    /// The snapshot, once, when the API server fails or takes too long.
    pub(super) fn ask(&mut self, fails: bool) -> Option<Loaded> {
        if self.asked || !(fails || self.begun.elapsed() >= PATIENCE) {
            return None;
        }
        self.asked = true;
        let loaded = tokio::task::block_in_place(|| self.file.as_ref()?.load().transpose())?;
        loaded
            .inspect_err(|error| {
                tracing::error!("{error}; waiting for the API server");
                self.metrics.snapshots_refused.add(1);
            })
            .ok()
    }

    /// Where the snapshot is.
    pub(super) fn path(&self) -> String {
        self.file.as_ref().map(|file| file.path().display().to_string()).unwrap_or_default()
    }

    /// Keeps the objects when that is due, beside the loop.
    pub(super) async fn keep(&mut self, store: &Store) {
        let Some(file) = &self.file else { return };
        if let Some(saving) = self.saving.take_if(|saving| saving.is_finished()) {
            let result = saving.await;
            self.told(result.unwrap_or(Ok(())));
            return;
        }
        if self.saving.is_none() && self.debounce.is_due(store.revision(), Instant::now()) {
            self.debounce.done(store.revision());
            let (file, objects, servers) = (file.clone(), store.share(), servers::of(store));
            let servers = (!servers.is_empty() && servers != self.servers).then_some(servers);
            self.servers = servers.clone().unwrap_or_else(|| std::mem::take(&mut self.servers));
            self.saving = Some(tokio::task::spawn_blocking(move || {
                if let Some(servers) = servers {
                    file.save_servers(&servers)?;
                }
                file.save(&objects, SystemTime::now())
            }));
        }
    }

    /// Keeps what is not kept yet, before the end.
    pub(super) async fn end(mut self, store: &Store) {
        let Some(file) = self.file.clone() else { return };
        if let Some(saving) = self.saving.take() {
            let result = saving.await;
            self.told(result.unwrap_or(Ok(())));
        }
        if self.debounce.kept != store.revision() {
            let objects = store.share();
            let result = tokio::task::block_in_place(|| file.save(&objects, SystemTime::now()));
            self.told(result);
        }
    }

    fn told(&mut self, result: Result<(), SnapshotError>) {
        match result {
            Ok(()) => {
                self.complained = false;
                self.metrics.snapshot_kept.set_now();
            }
            Err(error) => {
                self.metrics.snapshot_errors.add(1);
                // Whatever changes next is tried; the same revision is not.
                if !std::mem::replace(&mut self.complained, true) {
                    tracing::warn!("{error}; after a reboot this node waits for the API server");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> impl Fn(Instant) -> Instant {
        move |begin| begin + Duration::from_secs(seconds)
    }

    #[test]
    fn what_rests_is_kept_once() {
        let (begin, mut debounce) = (Instant::now(), Debounce::default());
        assert!(!debounce.is_due(0, begin), "there is nothing");
        assert!(!debounce.is_due(1, begin));
        assert!(!debounce.is_due(2, at(1)(begin)));
        assert!(!debounce.is_due(2, at(2)(begin)), "it changed a second ago");
        assert!(debounce.is_due(2, at(3)(begin)));
        debounce.done(2);
        assert!(!debounce.is_due(2, at(100)(begin)));
    }

    #[test]
    fn what_never_rests_is_kept_all_the_same_and_not_too_often() {
        let (begin, mut debounce) = (Instant::now(), Debounce::default());
        let mut kept = Vec::new();
        for second in 0..180 {
            if debounce.is_due(second + 1, at(second)(begin)) {
                debounce.done(second + 1);
                kept.push(second);
            }
        }
        assert_eq!(kept, [60, 121]);
    }
}
