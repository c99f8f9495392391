//! Which files of a folder changed, by inotify, and which are being written at this moment.
//!
//! Says nothing about what the files hold. What inotify cannot see (a folder that was replaced, the far end of a
//! link, a network file system) is found by looking again from time to time.

use super::documents::ManifestError;
use super::folder::is_manifest;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;

/// Changes that follow one another this closely are taken together.
const QUIET: Duration = Duration::from_millis(20);
/// The longest that a change waits for others.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// How often the folder itself is looked at: it may have been replaced.
const LOOK_AT_FOLDER: Duration = Duration::from_secs(1);
/// How often all files are looked at.
const LOOK_AT_FILES: Duration = Duration::from_secs(10);
/// A file that is held open is read when nothing was written to it for so long.
const LONGEST_WRITE: Duration = Duration::from_secs(5);
/// Room for the events of one read.
const BUFFER: usize = 16 * 1024;

/// Follows a folder.
#[derive(Debug)]
pub(super) struct Follower {
    folder: PathBuf,
    inotify: AsyncFd<Inotify>,
    /// The watch, and device and inode of what it watches.
    watch: Option<(WatchDescriptor, Identity)>,
    /// Files that were written to and not yet closed, and when they were written to.
    writing: BTreeMap<String, Instant>,
    touched: BTreeSet<String>,
    /// Whether there is something to see that is in no file of this folder.
    look: bool,
    looked: Instant,
}

type Identity = (u64, u64);

fn identity(path: &Path) -> io::Result<Identity> {
    std::fs::metadata(path).map(|folder| (folder.dev(), folder.ino()))
}

impl Follower {
    pub(super) fn new(folder: &Path) -> Result<Self, ManifestError> {
        let failed = |what: &str, error: io::Error| ManifestError::File {
            file: folder.display().to_string(),
            reason: format!("{what}: {error}"),
        };
        // SAFETY: an `Inotify` holds the same descriptor until it is dropped.
        let register = |inotify| unsafe { AsyncFd::register(inotify) }.map_err(io::Error::from);
        let inotify = Inotify::init().and_then(register);
        let inotify =
            inotify.map_err(|error| failed("cannot be watched (fs.inotify.max_user_instances?)", error))?;
        std::fs::read_dir(folder).map_err(|error| failed("is no folder that can be listed", error))?;
        let mut follower = Self {
            folder: folder.to_owned(),
            inotify,
            watch: None,
            writing: BTreeMap::new(),
            touched: BTreeSet::new(),
            look: false,
            looked: Instant::now(),
        };
        follower.attach();
        Ok(follower)
    }

    /// Watches what now has the folder's name.
    fn attach(&mut self) {
        let now = identity(&self.folder).ok();
        if self.watch.as_ref().map(|(_, watched)| *watched) == now {
            return;
        }
        if let Some((watch, _)) = self.watch.take() {
            // It is gone already if the folder is.
            let _ = self.inotify.get_ref().watches().remove(watch);
        }
        self.look = true;
        let Some(identity) = now else { return };
        let mask = WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::ATTRIB
            | WatchMask::MOVE
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        match self.inotify.get_ref().watches().add(&self.folder, mask) {
            Ok(watch) => self.watch = Some((watch, identity)),
            Err(error) => tracing::warn!(
                folder = %self.folder.display(),
                "changes are noticed late: inotify: {error} (fs.inotify.max_user_watches?)"
            ),
        }
    }

    /// The files that are being written now: whoever reads one of them may have half a file.
    pub(super) fn unfinished(&mut self) -> BTreeSet<String> {
        self.drain();
        self.writing.keys().cloned().collect()
    }

    /// Waits until it is worth while to read again. Gives back the files that must be read even if they look the same.
    pub(super) async fn next(&mut self) -> BTreeSet<String> {
        while self.touched.is_empty() && !self.look {
            if !self.wait(LOOK_AT_FOLDER).await {
                self.tick();
            }
        }
        let deadline = Instant::now() + DEBOUNCE;
        while Instant::now() < deadline && self.wait(QUIET).await {}
        (self.look, self.looked) = (false, Instant::now());
        std::mem::take(&mut self.touched)
    }

    /// Takes in what happens within `time`; false if nothing does.
    async fn wait(&mut self, time: Duration) -> bool {
        match tokio::time::timeout(time, self.inotify.readable_mut()).await {
            Ok(Ok(mut ready)) => ready.clear_ready(),
            Ok(Err(_)) => return false,
            Err(_) => {}
        }
        self.drain()
    }

    /// Takes in what has happened; false if nothing has.
    fn drain(&mut self) -> bool {
        let mut buffer = [0; BUFFER];
        let mut any = false;
        loop {
            let Ok(events) = self.inotify.get_mut().read_events(&mut buffer) else { break };
            let events: Vec<_> = events
                .map(|event| (event.mask, event.name.map(|name| name.to_string_lossy().into_owned())))
                .collect();
            if events.is_empty() {
                break;
            }
            any = true;
            for (mask, name) in events {
                self.event(mask, name);
            }
        }
        any
    }

    fn event(&mut self, mask: EventMask, name: Option<String>) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.writing.clear();
            self.look = true;
        }
        let Some(name) = name else {
            // The folder itself was moved or removed.
            if mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED) {
                self.attach();
            }
            return;
        };
        if !is_manifest(&name) {
            // A ConfigMap volume is changed by renaming `..data`, behind links whose names stay.
            self.look |= name.starts_with("..");
            return;
        }
        let written =
            mask.contains(EventMask::MODIFY) || (mask.contains(EventMask::CREATE) && self.is_new_file(&name));
        if written {
            self.writing.insert(name, Instant::now());
        } else {
            if mask.intersects(
                EventMask::CLOSE_WRITE | EventMask::MOVED_TO | EventMask::MOVED_FROM | EventMask::DELETE,
            ) {
                self.writing.remove(&name);
            }
            self.touched.insert(name);
        }
    }

    /// Whether someone has just made this file and will close it: nobody does so with a link.
    fn is_new_file(&self, name: &str) -> bool {
        std::fs::symlink_metadata(self.folder.join(name))
            .is_ok_and(|file| file.is_file() && file.nlink() == 1)
    }

    fn tick(&mut self) {
        self.attach();
        self.look |= self.looked.elapsed() >= LOOK_AT_FILES;
        let touched = &mut self.touched;
        self.writing.retain(|name, written| {
            let goes_on = written.elapsed() < LONGEST_WRITE;
            if !goes_on {
                touched.insert(name.clone());
            }
            goes_on
        });
    }
}
