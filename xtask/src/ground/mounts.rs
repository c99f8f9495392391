//! What is mounted where tests run.

use anyhow::{Context as _, Result, bail};
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Where BPF file systems are mounted by custom.
const BPFFS: &str = "/sys/fs/bpf";
const RUN: &str = "/run";
/// How often one file system may be mounted over another in one place.
const LAYERS: usize = 16;

/// The first mount of cgroup2.
pub(super) fn cgroup2() -> Option<PathBuf> {
    mounted("cgroup2").into_iter().next()
}

/// Where file systems of a kind are mounted.
fn mounted(kind: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let words = mounts.lines().map(|line| line.split(' ').skip(1));
    words
        .filter_map(|mut words| Some((words.next()?, words.next()?)))
        .filter(|(_, of)| *of == kind)
        .map(|(at, _)| at.into())
        .collect()
}

/// Where something is mounted in a folder or below it, in the order of mounting.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    places.filter(|place| place.starts_with(folder) && place != Path::new(RUN)).collect()
}

/// From here on no mount is seen outside, nor one from outside here.
pub(super) fn keep_to_oneself() -> Result<()> {
    call(None, Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE)
}

/// Mounts a new file system.
pub(super) fn mount(kind: &str, source: &str, at: &Path) -> Result<()> {
    let (kind, source) = (CString::new(kind)?, CString::new(source)?);
    call(Some(&source), at, Some(&kind), 0)
}

/// Takes BPF file systems away from where agents look for one.
pub(super) fn remove_bpffs() -> Result<()> {
    for _ in 0..LAYERS {
        if !mounted("bpf").contains(&PathBuf::from(BPFFS)) {
            return Ok(());
        }
        unmount(Path::new(BPFFS))?;
    }
    bail!("{BPFFS} stays mounted")
}

/// In the place of the machine's cgroups, those of this namespace: the same file system cannot be mounted over itself.
pub(super) fn renew_cgroup2(at: &Path) -> Result<()> {
    unmount(at)?;
    mount("cgroup2", "cgroup2", at)
}

/// `/run` without what Portolan and `ip netns` keep there; all else is as it was. `aside` is a folder for a moment.
pub(super) fn renew_run(aside: &Path) -> Result<()> {
    fs::create_dir_all(aside)?;
    bind(Path::new(RUN), aside)?;
    // What is mounted below would be hidden, and go on: the namespaces and pins of laboratories beside this run.
    for path in below(Path::new(RUN)).iter().rev() {
        unmount(path)?;
    }
    mount("tmpfs", "none", Path::new(RUN))?;
    fs::set_permissions(RUN, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(aside)? {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        let at = Path::new(RUN).join(&name);
        if name == "netns" || name.as_bytes().starts_with(b"portolan") {
            below(&entry.path()).iter().rev().try_for_each(|path| unmount(path))?;
            continue;
        }
        if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, at)?;
            continue;
        }
        if kind.is_dir() {
            fs::create_dir(&at)?;
        } else {
            File::create(&at)?;
        }
        bind(&entry.path(), &at)?;
    }
    unmount(aside)?;
    Ok(fs::remove_dir(aside)?)
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    let source = CString::new(from.as_os_str().as_bytes())?;
    call(Some(&source), to, None, libc::MS_BIND | libc::MS_REC)
}

fn call(source: Option<&CStr>, at: &Path, kind: Option<&CStr>, flags: libc::c_ulong) -> Result<()> {
    let target = CString::new(at.as_os_str().as_bytes())?;
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: closed strings that outlive the call or null, where the kernel reads none, and no data.
    let result =
        unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, std::ptr::null()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).with_context(|| format!("mounting {}", at.display()))
    }
}

fn unmount(at: &Path) -> Result<()> {
    let target = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: a closed string that outlives the call.
    match unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).with_context(|| format!("unmounting {}", at.display())),
    }
}
