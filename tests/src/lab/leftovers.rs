//! What a lab leaves behind, and how it is taken away: by the lab itself, by the signal watch, and by the next lab if the
//! owner was killed.
//!
//! All that a lab makes is found by its id alone: its folder below [`LABS`] with a BPF file system in it, its cgroups, the names
//! that its agents keep for people, and its namespaces. A lab is a leftover when the process that its folder names is gone.
//! Nothing else is ever touched, but for what labs share ([`Roots`]).

use super::mounts;
use super::place::NAMESPACES;
use super::roots::{self, LABS, Roots, unmount};
use anyhow::{Context, Result};
use dataplane_user::admin::names;
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// The names of everything that belongs to one lab.
#[derive(Clone, Debug)]
pub(crate) struct Traces {
    pub(crate) id: String,
    /// The lab's own folder.
    pub(crate) folder: PathBuf,
    /// The cgroup above all cgroups of the lab.
    pub(crate) cgroup: PathBuf,
    /// The folder above all pin folders of the lab, where a BPF file system is mounted.
    pub(crate) pins: PathBuf,
}

impl Traces {
    pub(crate) fn of(id: &str) -> Result<Self> {
        let folder = Path::new(LABS).join(id);
        let pins = folder.join("bpf");
        Ok(Self { id: id.into(), folder, cgroup: roots::cgroup()?.join(id), pins })
    }

    /// Makes the folders of a new lab that this process owns.
    pub(crate) fn claim() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let roots = Roots::hold()?;
        roots.note()?;
        let pid = std::process::id();
        let traces = Self::of(&format!("pl-{pid}-{}", COUNT.fetch_add(1, Ordering::Relaxed)))?;
        let start = start_time(pid).context("this process is not in /proc")?;
        // The folder appears with its owner in it, so that nobody takes it for a leftover.
        let new = Path::new(LABS).join(format!(".{}", traces.id));
        fs::create_dir_all(&new).with_context(|| format!("{}: are you root?", new.display()))?;
        fs::write(new.join("owner"), format!("{pid} {start}\n"))?;
        fs::rename(&new, &traces.folder)?;
        register(&traces.id);
        traces.make_folders().inspect_err(|_| drop(traces.remove_all_but_roots()))?;
        Ok(traces)
    }

    fn make_folders(&self) -> Result<()> {
        for folder in [&self.cgroup, &self.pins] {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        mount_bpffs(&self.pins)
    }

    /// The name of a namespace of the lab.
    pub(crate) fn namespace(&self, place: &str) -> String {
        format!("{}-{place}", self.id)
    }

    /// Takes everything away that carries the lab's id. What is gone already is no error.
    pub(crate) fn remove(&self) -> Result<()> {
        self.remove_all_but_roots()?;
        Roots::hold()?.leave()
    }

    fn remove_all_but_roots(&self) -> Result<()> {
        end_processes(&self.cgroup);
        remove_names(&self.pins);
        // Pins go by themselves only with the last mount of their file system, and a copy of it may be in another namespace.
        remove_tree(&self.pins);
        unmount(&self.pins);
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
    let roots = Roots::hold()?;
    let mut removed = Vec::new();
    for (id, lives) in labs() {
        if !lives {
            Traces::of(&id)?.remove_all_but_roots()?;
            remove_tree(&Path::new(LABS).join(format!(".{id}")));
            removed.push(id);
        }
    }
    roots.leave()?;
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

fn mount_bpffs(folder: &Path) -> Result<()> {
    let place = CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: all pointers are strings that outlive the call.
    let result =
        unsafe { libc::mount(c"bpf".as_ptr(), place.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
    anyhow::ensure!(result == 0, "mount -t bpf bpf {}: {}", folder.display(), io::Error::last_os_error());
    Ok(())
}

/// Removes what agents with pins below a folder wrote for people to read.
fn remove_names(pins: &Path) {
    let of_folder = names::path(pins);
    let Some(prefix) = of_folder.parent().and_then(Path::file_name) else { return };
    for entry in fs::read_dir(names::RUN_FOLDER).into_iter().flatten().flatten() {
        if entry.file_name().as_bytes().starts_with(prefix.as_bytes()) {
            remove_tree(&entry.path());
        }
    }
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
    unmount(path);
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
    let status = wait_for_signal();
    let ids: Vec<_> = live().iter().cloned().collect();
    for id in ids {
        if let Err(error) = remove(&id) {
            super::complain(&format!("{error:#}"));
        }
    }
    std::process::exit(status);
}

/// Waits for SIGINT, SIGTERM or SIGHUP, and says with which status the process is to end then.
pub fn wait_for_signal() -> i32 {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { forever() };
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let signals =
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()));
        let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = signals else { forever() };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    });
    STATUS.load(Ordering::Relaxed)
}

/// Where no signal can be waited for, its usual effect stays: it ends the process.
fn forever() -> ! {
    loop {
        std::thread::park();
    }
}
