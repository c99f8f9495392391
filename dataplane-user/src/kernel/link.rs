//! BPF links: a program's attachment as an object that can be pinned and given a new program.
//!
//! aya has these calls spread over one type per kind of program, and none of them updates a cgroup link; here all kinds
//! are one. A link that nobody holds and that is pinned nowhere detaches: what must stay is pinned by the caller.

use super::bpf::{self, bpf};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::Path;

// `enum bpf_cmd` of linux/bpf.h.
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;

// `enum bpf_link_type`.
const TYPE_CGROUP: u32 = 3;
const TYPE_XDP: u32 = 6;
const TYPE_TCX: u32 = 11;

/// `BPF_XDP` of `enum bpf_attach_type`.
pub const XDP: u32 = 37;

/// `BPF_F_BEFORE` without a reference: at the head of the chain.
const FIRST: u32 = 1 << 3;
/// `BPF_F_AFTER` without a reference: at the end of the chain.
const LAST: u32 = 1 << 4;

/// `BPF_TCX_INGRESS` of `enum bpf_attach_type`.
pub const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS` of `enum bpf_attach_type`.
const TCX_EGRESS: u32 = 47;

/// Attach type and place in the chain of a tc program: it meets a packet first as that comes in, and last as it leaves.
pub const fn tcx(is_egress: bool) -> (u32, u32) {
    if is_egress { (TCX_EGRESS, LAST) } else { (TCX_INGRESS, FIRST) }
}

/// The parts of `union bpf_attr` that links use.
#[repr(C)]
#[derive(Default)]
struct Create {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    pad: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(Default)]
struct Update {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct ByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info`; what follows is longer for kinds of link that are not used here.
#[repr(C)]
#[derive(Default)]
struct RawInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    /// The interface's index and the attach type, or the cgroup's id in one word.
    target: [u32; 2],
    attach_type: u32,
    rest: [u32; 9],
}

/// The parts of `union bpf_attr` that a link of an iterator uses.
#[repr(C)]
#[derive(Default)]
struct CreateIterator {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    pad: u32,
}

/// Has an iterator's program walk through a map: the link by which it is begun.
///
/// # Errors
/// The kernel's: `EINVAL` if the map is none that can be walked through.
pub(super) fn iterator(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // `union bpf_iter_link_info`.
    let map_fd = map.as_raw_fd() as u32;
    let mut attr = CreateIterator {
        prog_fd: program.as_raw_fd() as u32,
        attach_type: bpf::TRACE_ITER,
        iter_info: std::ptr::from_ref(&map_fd) as u64,
        iter_info_len: size_of::<u32>() as u32,
        ..Default::default()
    };
    // SAFETY: `CreateIterator` is what the command reads; the address is of a word that outlives the call.
    let fd = unsafe { bpf(LINK_CREATE, &mut attr)? };
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The interface with this index, by TCX; 0 once the interface is gone.
    Tcx(u32),
    /// The interface with this index, by XDP; 0 once the interface is gone.
    Xdp(u32),
    /// The cgroup with this id; 0 once the cgroup is gone.
    Cgroup(u64),
    /// Something that this agent never attaches to.
    Other,
}

impl Target {
    /// Whether what it was attached to is gone.
    pub fn is_gone(self) -> bool {
        match self {
            Self::Tcx(index) | Self::Xdp(index) => index == 0,
            Self::Cgroup(id) => id == 0,
            Self::Other => false,
        }
    }
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Its id, as `bpftool link` shows it.
    pub id: u32,
    /// The id of its program.
    pub program: u32,
    /// What it is attached to.
    pub target: Target,
}

/// A link that is open.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link {
    /// Attaches a program to an interface; `attach_type` and `flags` are those of [`tcx`], or [`XDP`] and its mode.
    ///
    /// # Errors
    /// The kernel's: `ENODEV` if the interface is gone, `EBUSY` if another XDP program is there.
    pub fn to_interface(
        program: BorrowedFd<'_>,
        index: u32,
        attach_type: u32,
        flags: u32,
    ) -> io::Result<Self> {
        Self::create(program, index, attach_type, flags)
    }

    /// Attaches a program to a cgroup, beside those that are there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn to_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Self> {
        Self::create(program, cgroup.as_raw_fd() as u32, attach_type, 0)
    }

    fn create(program: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<Self> {
        let mut attr =
            Create { prog_fd: program.as_raw_fd() as u32, target, attach_type, flags, ..Default::default() };
        // SAFETY: `Create` is what the command reads, and there is no address in it.
        let fd = unsafe { bpf(LINK_CREATE, &mut attr)? };
        // SAFETY: the kernel just gave us this descriptor; nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Opens a pinned link; `None` if there is no such pin.
    ///
    /// # Errors
    /// The kernel's, above all without the right to.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        match bpf::obj_get(path) {
            Ok(fd) => Ok(Some(Self(fd))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives the link another program in one step: no packet meets none or both.
    ///
    /// # Errors
    /// The kernel's: `ENOLINK` if what it was attached to is gone.
    pub fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = Update {
            link_fd: self.0.as_raw_fd() as u32,
            new_prog_fd: program.as_raw_fd() as u32,
            ..Default::default()
        };
        // SAFETY: `Update` is what the command reads, and there is no address in it.
        unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
    }

    /// Pins the link, so that it outlives this process.
    ///
    /// # Errors
    /// The kernel's: `EEXIST`, `EPERM`.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        bpf::obj_pin(self.as_fd(), path)
    }

    /// What the kernel says of it.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` if the pin was of something else than a link.
    pub fn state(&self) -> io::Result<LinkState> {
        let mut info = RawInfo::default();
        let mut attr = ByFd {
            bpf_fd: self.0.as_raw_fd() as u32,
            info_len: size_of::<RawInfo>() as u32,
            info: std::ptr::from_mut(&mut info) as u64,
        };
        // SAFETY: `info` is as long as said beside its address and outlives the call; any bytes are a valid `RawInfo`.
        unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr)? };
        let [low, high] = info.target;
        let target = match info.link_type {
            TYPE_TCX => Target::Tcx(low),
            TYPE_XDP => Target::Xdp(low),
            TYPE_CGROUP => Target::Cgroup(u64::from_ne_bytes(bytemuck::cast([low, high]))),
            _ => Target::Other,
        };
        Ok(LinkState { id: info.id, program: info.prog_id, target })
    }
}

/// The name of the interface with this index; `None` if there is none in this network namespace.
pub(crate) fn interface_name(index: u32) -> Option<String> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the length that the function asks for and outlives the call.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    let end = name.iter().position(|byte| *byte == 0)?;
    (!found.is_null()).then(|| String::from_utf8_lossy(&name[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_have_the_kernel_s_layout() {
        assert_eq!(size_of::<Create>(), 32);
        assert_eq!(size_of::<Update>(), 16);
        assert_eq!(size_of::<RawInfo>(), 64);
        assert_eq!(std::mem::offset_of!(RawInfo, target), 16);
    }
}
