//! Mounts of a lab: folders of a node that a container's mounts come through to. All of them lie below the lab's own folder.

use anyhow::{Context, Result, ensure};
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Makes a folder an empty file system of its own in which nothing can be made, and which shares what is mounted there with its
/// copies in other mount namespaces.
pub(crate) fn mount_bare(folder: &Path) -> Result<()> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    mount(Some(c"tmpfs"), &path, libc::MS_RDONLY)
        .and_then(|()| mount(None, &path, libc::MS_SHARED))
        .with_context(|| format!("mounting at {}", folder.display()))
}

/// One system call; without a kind of file system it changes the mount that is there.
fn mount(kind: Option<&CStr>, at: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let kind = kind.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: the strings outlive the call, and null is allowed for the others.
    match unsafe { libc::mount(kind, at.as_ptr(), kind, flags, std::ptr::null()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Unmounts what was mounted last at a folder.
pub(crate) fn unmount(folder: &Path) -> Result<()> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: the string outlives the call.
    let result = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    ensure!(result == 0, "unmounting {}: {}", folder.display(), io::Error::last_os_error());
    Ok(())
}

/// Unmounts all that lies below a folder, the last first. What cannot be unmounted stays, and so does its folder.
pub(crate) fn unmount_below(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|at| Path::new(at).starts_with(folder));
    for at in below.collect::<Vec<_>>().into_iter().rev() {
        let _ = unmount(Path::new(at));
    }
}
