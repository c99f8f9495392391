//! XDP programs of two instructions. One that passes all is for the peers of uplinks: without one, a veth discards in
//! silence what its peer sends by `XDP_TX` or redirect.

use anyhow::{Context, Result, ensure};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `BPF_PROG_LOAD` and `BPF_LINK_CREATE`.
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
/// `BPF_PROG_TYPE_XDP`, `BPF_XDP`.
const TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
/// `BPF_F_XDP_HAS_FRAGS`: a packet may be longer than a page.
const HAS_FRAGS: u32 = 1 << 5;
/// `XDP_FLAGS_DRV_MODE`: native.
const NATIVE: u32 = 4;
/// `XDP_DROP`, `XDP_PASS`, `XDP_TX`.
pub(crate) const DROP: u64 = 1;
const PASS: u64 = 2;
pub(crate) const TX: u64 = 3;

#[repr(C)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    licence: u64,
    log: [u32; 5],
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct Link {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

fn bpf<T>(command: i32, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of::<T>` bytes of a `repr(C)` value that outlives the call, and what it points to does too.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both commands return a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// A program that does nothing but to return this action.
pub(crate) fn program(action: u64) -> Result<OwnedFd> {
    // `r0 = action; exit`.
    let instructions = [(action << 32) | 0xb7, 0x95_u64];
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"lab_xdp\0");
    let load = Load {
        kind: TYPE_XDP,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        log: [0; 5],
        flags: HAS_FRAGS,
        name,
        interface: 0,
        attach_type: ATTACH_XDP,
    };
    bpf(PROG_LOAD, &load).context("loading an XDP program of two instructions")
}

/// Attaches a program that passes all to interfaces of the calling thread's namespace, for as long as the result lives.
pub(crate) fn pass_all(interfaces: &[String]) -> Result<Vec<OwnedFd>> {
    attach(&program(PASS)?, interfaces)
}

/// Attaches a program to interfaces of the calling thread's namespace, for as long as the result lives.
pub(crate) fn attach(program: &OwnedFd, interfaces: &[String]) -> Result<Vec<OwnedFd>> {
    interfaces
        .iter()
        .map(|name| {
            let text = CString::new(name.as_str())?;
            // SAFETY: the pointer is a string that outlives the call.
            let interface = unsafe { libc::if_nametoindex(text.as_ptr()) };
            ensure!(interface != 0, "no interface {name}");
            let link = Link {
                program: program.as_raw_fd() as u32,
                interface,
                attach_type: ATTACH_XDP,
                flags: NATIVE,
            };
            bpf(LINK_CREATE, &link).with_context(|| format!("XDP on {name}"))
        })
        .collect()
}
