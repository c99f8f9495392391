//! What a lab leaves behind, and how it is taken away: by the lab itself, by the signal watch, and by the next lab if the
//! owner was killed.
//!
//! All that a lab makes is found by its id alone: its folder below [`LABS`], its cgroups, its pins and its namespaces. A lab
//! is a leftover when the process that its folder names is gone. Nothing else is ever touched.

use super::mounts;
use super::place::NAMESPACES;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// One folder per lab: its owner, its places, its manifests, its logs.
pub const LABS: &str = "/run/portolan-lab";
/// Where pins are made; mounted if it is not, and left mounted.
const BPFFS: &str = "/sys/fs/bpf";
/// The name of the folder of all labs' cgroups and of all labs' pins.
const FOLDER: &str = "portolan-lab";

/// The names of everything that belongs to one lab.
#[derive(Clone, Debug)]
pub(crate) struct Traces {
    pub(crate) id: String,
    /// The lab's own folder.
    pub(crate) folder: PathBuf,
    /// The cgroup above all cgroups of the lab.
    pub(crate) cgroup: PathBuf,
    /// The folder above all pin folders of the lab.
    pub(crate) pins: PathBuf,
}

impl Traces {
    pub(crate) fn of(id: &str) -> Result<Self> {
        Ok(Self {
            id: id.into(),
            folder: Path::new(LABS).join(id),
            cgroup: cgroup2()?.join(FOLDER).join(id),
            pins: Path::new(BPFFS).join(FOLDER).join(id),
        })
    }

    /// Makes the folders of a new lab that this process owns.
    pub(crate) fn claim() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        mount_bpffs()?;
        let pid = std::process::id();
        let traces = Self::of(&format!("pl-{pid}-{}", COUNT.fetch_add(1, Ordering::Relaxed)))?;
        let start = start_time(pid).context("this process is not in /proc")?;
        // The folder appears with its owner in it, so that nobody takes it for a leftover.
        let new = Path::new(LABS).join(format!(".{}", traces.id));
        fs::create_dir_all(&new).with_context(|| format!("{}: are you root?", new.display()))?;
        fs::write(new.join("owner"), format!("{pid} {start}\n"))?;
        fs::rename(&new, &traces.folder)?;
        register(&traces.id);
        for folder in [&traces.cgroup, &traces.pins] {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(traces)
    }

    /// The name of a namespace of the lab.
    pub(crate) fn namespace(&self, place: &str) -> String {
        format!("{}-{place}", self.id)
    }

    /// Takes everything away that carries the lab's id. What is gone already is no error.
    pub(crate) fn remove(&self) -> Result<()> {
        end_processes(&self.cgroup);
        remove_tree(&self.pins);
        let prefix = format!("{}-", self.id);
        for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                remove_namespace(&entry.path());
            }
        }
        remove_cgroups(&self.cgroup);
        mounts::unmount_below(&self.folder);
        remove_tree(&self.folder);
        forget(&self.id);
        let left: Vec<_> =
            [&self.cgroup, &self.pins, &self.folder].into_iter().filter(|path| path.exists()).collect();
        anyhow::ensure!(left.is_empty(), "of the lab {} could not be removed: {left:?}", self.id);
        Ok(())
    }
}

/// The labs there are, with whether their owner still lives.
pub fn labs() -> Vec<(String, bool)> {
    let mut labs: Vec<_> = fs::read_dir(LABS)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| {
            let id = entry.file_name().to_string_lossy().trim_start_matches('.').to_owned();
            let owner = fs::read_to_string(entry.path().join("owner")).unwrap_or_default();
            let lives = owner_lives(&owner) || (owner.is_empty() && id_lives(&id));
            (id, lives)
        })
        .collect();
    labs.sort();
    labs
}

/// Removes the labs whose owner is gone; returns their ids.
pub fn sweep() -> Result<Vec<String>> {
    fs::create_dir_all(LABS).with_context(|| format!("{LABS}: are you root?"))?;
    let lock = fs::File::create(Path::new(LABS).join("lock"))?;
    // SAFETY: a system call on a descriptor that lives to the end of this function.
    unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) };
    let mut removed = Vec::new();
    for (id, lives) in labs() {
        if !lives {
            Traces::of(&id)?.remove()?;
            remove_tree(&Path::new(LABS).join(format!(".{id}")));
            removed.push(id);
        }
    }
    Ok(removed)
}

/// Removes one lab by its id, whoever owns it.
pub(crate) fn remove(id: &str) -> Result<()> {
    Traces::of(id)?.remove()
}

fn owner_lives(owner: &str) -> bool {
    let mut words = owner.split_whitespace();
    let (Some(Ok(pid)), Some(start)) = (words.next().map(str::parse), words.next()) else { return false };
    start_time(pid).is_some_and(|now| now == start)
}

/// A folder without an owner: its maker is between two calls, or died there.
fn id_lives(id: &str) -> bool {
    id.split('-').nth(1).and_then(|pid| pid.parse().ok()).is_some_and(|pid| start_time(pid).is_some())
}

/// When a process started, in clock ticks: tells it apart from a later one with the same number.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; field 22 is the 20th after it. A zombie does not live.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18).map(str::to_owned) }
}

/// The first cgroup2 mount.
pub(crate) fn cgroup2() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mut words = mounts.lines().map(|line| line.split(' '));
    words
        .find_map(|mut words| {
            let place = words.nth(1)?;
            (words.next()? == "cgroup2").then(|| PathBuf::from(place))
        })
        .context("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

fn mount_bpffs() -> Result<()> {
    let mounted = fs::read_to_string("/proc/mounts")?
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(BPFFS) && line.split(' ').nth(2) == Some("bpf"));
    if mounted {
        return Ok(());
    }
    let place = CString::new(BPFFS)?;
    // SAFETY: all pointers are strings that outlive the call.
    let result =
        unsafe { libc::mount(c"bpf".as_ptr(), place.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
    anyhow::ensure!(result == 0, "mount -t bpf bpf {BPFFS}: {}", io::Error::last_os_error());
    Ok(())
}

/// Ends every process of a cgroup and of those below it, and waits until they are gone.
pub(crate) fn end_processes(cgroup: &Path) {
    if fs::write(cgroup.join("cgroup.kill"), "1").is_err() {
        return;
    }
    let end = Instant::now() + Duration::from_secs(10);
    let populated =
        || fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|text| text.contains("populated 1"));
    while populated() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Removes a cgroup and those below it.
pub(crate) fn remove_cgroups(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let end = Instant::now() + Duration::from_secs(2);
    while let Err(error) = fs::remove_dir(cgroup) {
        if error.raw_os_error() != Some(libc::EBUSY) || Instant::now() > end {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What `ip netns del` does.
pub(crate) fn remove_namespace(path: &Path) {
    if let Ok(name) = CString::new(path.as_os_str().as_bytes()) {
        // SAFETY: the pointer is a string that outlives the call.
        unsafe { libc::umount2(name.as_ptr(), libc::MNT_DETACH) };
    }
    let _ = fs::remove_file(path);
}

fn remove_tree(path: &Path) {
    let _ = fs::remove_dir_all(path);
}

static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static STATUS: AtomicI32 = AtomicI32::new(130);

/// The exit status with which the process ends when a signal ends its labs (130 unless told).
pub fn on_signal_exit_with(status: i32) {
    STATUS.store(status, Ordering::Relaxed);
}

fn live() -> std::sync::MutexGuard<'static, BTreeSet<String>> {
    LIVE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn register(id: &str) {
    static WATCH: Once = Once::new();
    live().insert(id.into());
    WATCH.call_once(|| {
        std::thread::spawn(watch_signals);
    });
}

fn forget(id: &str) {
    live().remove(id);
}

/// Waits for SIGINT, SIGTERM or SIGHUP, removes the labs of this process and ends it.
fn watch_signals() {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let signals =
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()));
        let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = signals else { return };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        let ids: Vec<_> = live().iter().cloned().collect();
        for id in ids {
            if let Err(error) = remove(&id) {
                super::complain(&format!("{error:#}"));
            }
        }
        std::process::exit(STATUS.load(Ordering::Relaxed));
    });
}
