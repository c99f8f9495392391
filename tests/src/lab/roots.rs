//! What all labs of a machine share: made with the first of them, and removed with the last.
//!
//! The folder [`LABS`] with the lock, the cgroup above those of all labs, the folder in which agents keep names for people, and
//! the folder of named network namespaces with the mount that `ip netns` makes there. The last is removed only if labs made it.

use super::place::NAMESPACES;
use anyhow::{Context, Result};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// One folder per lab: its owner, its places, its manifests, its logs, its pins.
pub const LABS: &str = "/run/portolan-lab";
/// The name of the folder of all labs' cgroups.
const FOLDER: &str = "portolan-lab";
/// Who holds this file may make and remove what labs share.
const LOCK: &str = "lock";
/// This file is there if there were no named network namespaces before the first lab.
const NO_NAMESPACES: &str = "no-namespaces-before";

/// The cgroup above those of all labs.
pub(crate) fn cgroup() -> Result<PathBuf> {
    Ok(cgroup2()?.join(FOLDER))
}

/// The first cgroup2 mount.
fn cgroup2() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mut words = mounts.lines().map(|line| line.split(' '));
    words
        .find_map(|mut words| {
            let place = words.nth(1)?;
            (words.next()? == "cgroup2").then(|| PathBuf::from(place))
        })
        .context("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// What labs share, while nobody else makes or removes any of it.
#[derive(Debug)]
pub(crate) struct Roots {
    _lock: File,
}

impl Roots {
    /// Waits until nobody else has it.
    pub(crate) fn hold() -> Result<Self> {
        let path = Path::new(LABS).join(LOCK);
        loop {
            fs::create_dir_all(LABS).with_context(|| format!("{LABS}: are you root?"))?;
            let lock = match File::create(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                lock => lock?,
            };
            // SAFETY: a system call on a descriptor that this function owns.
            unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) };
            // Whoever had it may have removed the file: then the next one locks another.
            if fs::metadata(&path).is_ok_and(|now| lock.metadata().is_ok_and(|own| own.ino() == now.ino())) {
                return Ok(Self { _lock: lock });
            }
        }
    }

    /// Notes what there is before a lab is made.
    pub(crate) fn note(&self) -> Result<()> {
        if !Path::new(NAMESPACES).exists() {
            File::create(Path::new(LABS).join(NO_NAMESPACES))?;
        }
        Ok(())
    }

    /// Removes all of it, unless there still is a lab.
    pub(crate) fn leave(self) -> Result<()> {
        let labs = || fs::read_dir(LABS).into_iter().flatten().flatten();
        if labs().any(|entry| entry.path().is_dir()) {
            return Ok(());
        }
        // What others have in these folders by now keeps them.
        let _ = fs::remove_dir(cgroup()?);
        let _ = fs::remove_dir(dataplane_user::admin::names::RUN_FOLDER);
        if Path::new(LABS).join(NO_NAMESPACES).exists() {
            remove_namespaces();
        }
        for file in labs() {
            fs::remove_file(file.path())?;
        }
        Ok(fs::remove_dir(LABS)?)
    }
}

/// Takes away the folder of named namespaces and the mount on it, if nothing is in it any more.
fn remove_namespaces() {
    let is_empty = || fs::read_dir(NAMESPACES).is_ok_and(|mut entries| entries.next().is_none());
    if is_empty() {
        unmount(Path::new(NAMESPACES));
        let _ = fs::remove_dir(NAMESPACES);
    }
}

/// Unmounts what is mounted at a path, if anything is.
pub(crate) fn unmount(path: &Path) {
    if let Ok(name) = CString::new(path.as_os_str().as_bytes()) {
        // SAFETY: the pointer is a string that outlives the call.
        unsafe { libc::umount2(name.as_ptr(), libc::MNT_DETACH) };
    }
}
