//! Privileged containers: all of root's rights, and volumes through which a mount made inside is seen outside
//! (`mountPropagation: Bidirectional`). `bwrap` cuts that tie always, so they are made here.
//!
//! A container has a mount namespace of its own, whose root is that of its image. Its network, cgroup and process namespace are
//! those of [`Place`]: a runtime would give it another process namespace, which nothing here looks at.

use super::container::Mount;
use crate::lab::Place;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

/// Folders of the machine that every container has.
const MACHINE: [&str; 3] = ["/dev", "/proc", "/sys"];

/// The command that becomes a container's program.
pub(super) fn command(
    place: &Place,
    root: &Path,
    mounts: &[Mount],
    program: &[String],
    variables: &BTreeMap<String, String>,
) -> Result<Command> {
    let (program, arguments) = program.split_first().context("an image without a program")?;
    let mut command = place.command(program)?;
    command.args(arguments).env_clear().envs(variables);
    let image = Attached::new(root, root, Tie::None)?;
    let mut attached = Vec::new();
    for folder in MACHINE {
        attached.push(Attached::new(Path::new(folder), &below(root, folder)?, Tie::None)?);
    }
    for mount in mounts {
        let tie = match (mount.comes_through, mount.read_only) {
            (true, _) => Tie::Both,
            (false, true) => Tie::ReadOnly,
            (false, false) => Tie::None,
        };
        let target = below(root, &mount.path)?;
        if mount.source.is_file() {
            File::options().create(true).append(true).open(&target)?;
        } else {
            fs::create_dir_all(&target)?;
        }
        attached.push(Attached::new(&mount.source, &target, tie)?);
    }
    // SAFETY: the closure makes system calls on descriptors and strings that it owns, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            done(libc::unshare(libc::CLONE_NEWNS))?;
            change(c"/", libc::MS_REC | libc::MS_PRIVATE)?;
            image.attach()?;
            attached.iter().try_for_each(Attached::attach)?;
            done(libc::chroot(image.target.as_ptr()))?;
            done(libc::chdir(c"/".as_ptr()))
        });
    }
    Ok(command)
}

/// A path of a container, in the root of its image, in a folder that is there.
fn below(root: &Path, path: &str) -> Result<std::path::PathBuf> {
    let target = root.join(path.trim_start_matches('/'));
    fs::create_dir_all(if MACHINE.contains(&path) { &target } else { target.parent().unwrap_or(root) })?;
    Ok(target)
}

/// How a mount of a container and the one that it was made from affect each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tie {
    None,
    /// Not, and nothing can be written.
    ReadOnly,
    /// What is mounted in one is mounted in both, where the one outside is shared.
    Both,
}

/// A copy of a mount that is in no namespace yet, and where it goes.
struct Attached {
    copy: OwnedFd,
    target: CString,
    tie: Tie,
}

impl Attached {
    fn new(source: &Path, target: &Path, tie: Tie) -> Result<Self> {
        let path = CString::new(source.as_os_str().as_bytes())?;
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as libc::c_uint;
        // SAFETY: a system call whose string outlives it.
        let copy = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        let copy = RawFd::try_from(copy)?;
        if copy < 0 {
            return Err(io::Error::last_os_error()).with_context(|| source.display().to_string());
        }
        // SAFETY: the call has made this descriptor, and nobody else has it.
        let copy = unsafe { OwnedFd::from_raw_fd(copy) };
        Ok(Self { copy, target: CString::new(target.as_os_str().as_bytes())?, tie })
    }

    /// Allocates nothing.
    fn attach(&self) -> io::Result<()> {
        // SAFETY: a system call on a descriptor and on strings that outlive it.
        let moved = unsafe {
            let (copy, nothing) = (self.copy.as_raw_fd(), c"".as_ptr());
            let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
            libc::syscall(libc::SYS_move_mount, copy, nothing, libc::AT_FDCWD, self.target.as_ptr(), flags)
        };
        done(if moved == 0 { 0 } else { -1 })?;
        match self.tie {
            Tie::Both => Ok(()),
            Tie::None => change(&self.target, libc::MS_REC | libc::MS_PRIVATE),
            Tie::ReadOnly => {
                change(&self.target, libc::MS_REC | libc::MS_PRIVATE)?;
                change(&self.target, libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY)
            }
        }
    }
}

/// Changes the mount that is there.
fn change(at: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let nothing = std::ptr::null();
    // SAFETY: a system call whose string outlives it; null is allowed for the others.
    done(unsafe { libc::mount(nothing, at.as_ptr(), nothing, flags, nothing.cast()) })
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
