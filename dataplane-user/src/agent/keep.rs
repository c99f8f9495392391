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
/// What changes all the time is kept this often, if that is not too much to write.
const LONGEST: Duration = Duration::from_secs(60);
/// Bytes per second that may be written in the long run: 5.5 GB in a day, whatever changes. The disk may be etcd's.
const RATE: u64 = 64 * 1024;
/// Parts of the time that may be spent on it: one in so many.
const SHARE: u32 = 100;
/// Wait before a snapshot is written again that could not be.
const RETRY: Duration = Duration::from_secs(60);
/// How long the API server may take to tell everything before the snapshot is asked, if it does not fail before.
const PATIENCE: Duration = Duration::from_secs(10);
/// How far the clock may be behind that of the snapshot: by more, nobody knows how old it is.
const BEHIND: Duration = Duration::from_secs(5 * 60);

/// Tells when something that changes is worth keeping.
#[derive(Debug, Default)]
struct Debounce {
    kept: u64,
    seen: u64,
    first: Option<Instant>,
    last: Option<Instant>,
    not_before: Option<Instant>,
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
        let rests = self.not_before.is_some_and(|it| now < it);
        !rests && (since(self.last) >= QUIET || since(self.first) >= LONGEST)
    }

    /// This revision is being written: what comes from now on is for the next one.
    fn begun(&mut self) {
        (self.first, self.last) = (None, None);
    }

    /// This revision is kept. So many bytes were written, which took so long.
    fn done(&mut self, revision: u64, (bytes, took): (u64, Duration), now: Instant) {
        let rest = Duration::from_secs(bytes / RATE).max(took * SHARE);
        (self.kept, self.not_before) = (revision, Some(now + rest));
    }

    /// It could not be kept, and is tried again.
    fn failed(&mut self, now: Instant) {
        (self.first, self.last, self.not_before) = (Some(now), Some(now), Some(now + RETRY));
    }
}

/// Why what was kept at `taken` must not be served now.
fn refuse(taken: SystemTime, now: SystemTime, max_age: Duration) -> Option<String> {
    match now.duration_since(taken) {
        Ok(age) if age > max_age => {
            Some(format!("it is {} hours old, older than --snapshot-max-age allows", age.as_secs() / 3_600))
        }
        Ok(_) => None,
        Err(ahead) if ahead.duration() > BEHIND => Some(
            "it is from the future, so nobody knows how old it is: is this machine's clock right?".to_owned(),
        ),
        Err(_) => None,
    }
}

/// What became of a snapshot that was written: its revision, bytes and how long it took.
type Saving = JoinHandle<(u64, Result<u64, SnapshotError>, Duration)>;

/// The snapshot of this agent; none of one that reads manifests, which lie on a disk themselves, nor where none is wanted.
#[derive(Debug)]
pub(super) struct Keeping {
    file: Option<File>,
    metrics: Arc<Metrics>,
    begun: Instant,
    /// The snapshot was asked for.
    asked: bool,
    debounce: Debounce,
    saving: Option<Saving>,
    /// `--snapshot-max-age`.
    max_age: Duration,
    /// The API servers that are kept.
    servers: Vec<String>,
    /// It was said that it cannot be written.
    complained: bool,
}

impl Keeping {
    pub(super) fn new(args: &AgentArgs, settings: &Settings, metrics: Arc<Metrics>) -> Self {
        let owner = Owner { node: settings.node_name.clone(), proxy_name: settings.proxy_name.clone() };
        Self {
            file: (args.manifests.is_none() && !args.snapshot_max_age.is_zero())
                .then(|| File::new(&args.state_dir, owner)),
            max_age: args.snapshot_max_age,
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
        let loaded = tokio::task::block_in_place(|| self.load())?;
        loaded
            .inspect_err(|error| {
                tracing::error!("{error}; waiting for the API server");
                self.metrics.snapshots_refused.add(1);
            })
            .ok()
    }

    fn load(&self) -> Option<Result<Loaded, SnapshotError>> {
        let file = self.file.as_ref()?;
        let loaded = file.load().transpose()?;
        Some(loaded.and_then(|loaded| match refuse(loaded.taken, SystemTime::now(), self.max_age) {
            Some(reason) => Err(SnapshotError::Age { file: file.path(), reason }),
            None => Ok(loaded),
        }))
    }

    /// Where the snapshot is.
    pub(super) fn path(&self) -> String {
        self.file.as_ref().map(|file| file.path().display().to_string()).unwrap_or_default()
    }

    /// Keeps the objects when that is due, beside the loop.
    pub(super) async fn keep(&mut self, store: &Store) {
        let Some(file) = &self.file else { return };
        if let Some(saving) = self.saving.take_if(|saving| saving.is_finished()) {
            return self.saved(saving).await;
        }
        if self.saving.is_none() && self.debounce.is_due(store.revision(), Instant::now()) {
            self.debounce.begun();
            let (file, objects, revision) = (file.clone(), store.share(), store.revision());
            let servers = servers::of(store);
            let servers = (!servers.is_empty() && servers != self.servers).then_some(servers);
            self.servers = servers.clone().unwrap_or_else(|| std::mem::take(&mut self.servers));
            self.saving = Some(tokio::task::spawn_blocking(move || {
                let begun = Instant::now();
                let servers = servers.map_or(Ok(()), |servers| file.save_servers(&servers));
                let saved = servers.and_then(|()| file.save(&objects, SystemTime::now()));
                (revision, saved, begun.elapsed())
            }));
        }
    }

    /// Keeps what is not kept yet, before the end.
    pub(super) async fn end(mut self, store: &Store) {
        let Some(file) = self.file.clone() else { return };
        if let Some(saving) = self.saving.take() {
            self.saved(saving).await;
        }
        if self.debounce.kept != store.revision() {
            let objects = store.share();
            let result = tokio::task::block_in_place(|| file.save(&objects, SystemTime::now()));
            self.told(result.map(drop));
        }
    }

    async fn saved(&mut self, saving: Saving) {
        let result = match saving.await {
            Ok((revision, Ok(bytes), took)) => {
                self.debounce.done(revision, (bytes, took), Instant::now());
                return self.told(Ok(()));
            }
            Ok((_, Err(error), _)) => error,
            Err(error) => SnapshotError::Write { file: self.path().into(), error: error.into() },
        };
        self.debounce.failed(Instant::now());
        self.told(Err(result));
    }

    fn told(&mut self, result: Result<(), SnapshotError>) {
        match result {
            Ok(()) => {
                self.complained = false;
                self.metrics.snapshot_kept.set_now();
            }
            Err(error) => {
                self.metrics.snapshot_errors.add(1);
                if !std::mem::replace(&mut self.complained, true) {
                    tracing::warn!(
                        "{error}; trying again. Until then this node waits for the API server after a reboot"
                    );
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

    /// A snapshot that is small, and written in no time.
    const SMALL: (u64, Duration) = (20_000, Duration::from_millis(2));

    #[test]
    fn what_rests_is_kept_once() {
        let (begin, mut debounce) = (Instant::now(), Debounce::default());
        assert!(!debounce.is_due(0, begin), "there is nothing");
        assert!(!debounce.is_due(1, begin));
        assert!(!debounce.is_due(2, at(1)(begin)));
        assert!(!debounce.is_due(2, at(2)(begin)), "it changed a second ago");
        assert!(debounce.is_due(2, at(3)(begin)));
        debounce.begun();
        debounce.done(2, SMALL, at(3)(begin));
        assert!(!debounce.is_due(2, at(100)(begin)));
    }

    /// The seconds at which something is written that changes whenever `changes` says so.
    fn written(seconds: u64, cost: (u64, Duration), changes: impl Fn(u64) -> bool) -> Vec<u64> {
        let (begin, mut debounce) = (Instant::now(), Debounce::default());
        let (mut kept, mut revision) = (Vec::new(), 1);
        for second in 0..seconds {
            revision += u64::from(changes(second));
            if debounce.is_due(revision, at(second)(begin)) {
                debounce.begun();
                debounce.done(revision, cost, at(second)(begin));
                kept.push(second);
            }
        }
        kept
    }

    #[test]
    fn what_never_rests_is_kept_all_the_same_and_not_too_often() {
        assert_eq!(written(180, SMALL, |_| true), [60, 121]);
    }

    #[test]
    fn what_is_large_is_written_no_more_than_changes_are_worth() {
        const DAY: u64 = 24 * 60 * 60;
        let large = (36 << 20, Duration::from_millis(800));
        for changes in [(|_| true) as fn(u64) -> bool, |second| second % 5 == 0] {
            let times = written(DAY, large, changes);
            let bytes = times.len() as u64 * large.0;
            assert!(bytes <= 6_000_000_000, "{bytes} bytes in a day");
            assert!(times.len() >= 100, "{times:?}");
        }
        // A slow disk is not kept busy, however little is written.
        assert!(written(DAY, (1_000, Duration::from_secs(5)), |_| true).len() <= 24 * 60 * 60 / 500 + 1);
    }

    #[test]
    fn what_could_not_be_written_is_tried_again_without_another_change() {
        let (begin, mut debounce) = (Instant::now(), Debounce::default());
        assert!(!debounce.is_due(1, begin) && debounce.is_due(1, at(2)(begin)));
        debounce.begun();
        debounce.failed(at(3)(begin));
        assert!(!debounce.is_due(1, at(10)(begin)), "not at once");
        assert!(debounce.is_due(1, at(63)(begin)));
    }

    #[test]
    fn an_old_snapshot_and_one_of_unknown_age_are_refused() {
        let (now, hour) = (SystemTime::now(), Duration::from_secs(3_600));
        assert_eq!(refuse(now - hour * 23, now, hour * 24), None);
        let reason = refuse(now - hour * 25, now, hour * 24).unwrap();
        assert!(
            reason.starts_with("it is 25 hours old") && reason.contains("--snapshot-max-age"),
            "{reason}"
        );
        assert_eq!(refuse(now + Duration::from_secs(60), now, hour), None, "clocks differ");
        assert!(refuse(now + hour, now, hour).unwrap().contains("clock"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_snapshot_that_cannot_be_written_counts_as_an_error_and_never_as_kept() {
        let in_the_way = std::env::temp_dir().join(format!("portolan-keep-{}", std::process::id()));
        std::fs::write(&in_the_way, "a file where a folder should be").unwrap();
        let metrics = Arc::new(Metrics::default());
        let mut keeping = Keeping {
            file: Some(File::new(&in_the_way, Owner { node: "n1".into(), proxy_name: None })),
            metrics: metrics.clone(),
            begun: Instant::now(),
            asked: false,
            debounce: Debounce::default(),
            servers: Vec::new(),
            saving: None,
            max_age: Duration::from_secs(1),
            complained: false,
        };
        let mut store = Store::new("n1");
        store.apply(crate::model::Change::Applied(crate::model::Object::Service(
            crate::model::samples::service("web"),
        )));
        let text = || metrics.text(&crate::metrics::Observed::default());
        let begun = Instant::now();
        while !text().contains("portolan_snapshot_errors_total 1") {
            assert!(begun.elapsed() < Duration::from_secs(30), "nothing was tried");
            keeping.keep(&store).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(text().contains("portolan_snapshot_timestamp_seconds 0"));
        std::fs::remove_file(&in_the_way).unwrap();
        keeping.debounce.not_before = None;
        keeping.end(&store).await;
        assert!(!text().contains("portolan_snapshot_timestamp_seconds 0"), "the last try succeeds");
        std::fs::remove_dir_all(&in_the_way).unwrap();
    }
}
