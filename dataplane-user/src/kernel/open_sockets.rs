//! Counts the sockets that are connected to endpoints, by walking through the storage that they have (`socket_names`): of all network
//! namespaces, whatever their state, until they are closed. Each socket that was given an endpoint says there which backend counts it.
//!
//! Only the kernel's own iterator can walk there (`bpf_iter`, Linux 5.9). Its program counts into a map, so that the walk is one piece: what
//! is handed over in several may be missed where a socket goes meanwhile.

use super::bpf::{self, MapFd, bpf, instruction};
use super::kernel_types;
use super::link;
use crate::recount::Live;
use std::io::{self, Read as _};
use std::mem::offset_of;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use dataplane_common::affinity::Choice;
use dataplane_common::socket::SocketName;

/// `BPF_ITER_CREATE` of `enum bpf_cmd`.
const ITER_CREATE: libc::c_int = 33;

/// The walk: its program, and the map that it counts into.
#[derive(Debug)]
pub struct OpenSockets {
    program: OwnedFd,
    counts: MapFd,
}

impl OpenSockets {
    /// Loads the program; there is room for so many backends.
    ///
    /// # Errors
    /// The kernel's: without BTF of its own, without the right (CAP_BPF and CAP_PERFMON).
    pub fn new(backends: usize) -> io::Result<Self> {
        let target = kernel_types::function("bpf_iter_bpf_sk_storage_map")?;
        let sizes = [size_of::<Choice>(), size_of::<u64>()];
        let counts = MapFd::create("open_sockets", bpf::TYPE_HASH, bpf::NO_PREALLOC, sizes, backends)?;
        let program = bpf::load_iterator(&program(counts.as_fd()), target)?;
        Ok(Self { program, counts })
    }

    /// Adds how many sockets each backend counts, by the storage of sockets `names`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn count(&self, names: BorrowedFd<'_>, live: &mut Live) -> io::Result<()> {
        self.walk(names)?;
        let (mut choice, mut number) = ([0; size_of::<Choice>()], [0; size_of::<u64>()]);
        // Each is taken out: the next walk begins at zero.
        while self.counts.next_key(None, &mut choice)? {
            if self.counts.lookup(&choice, &mut number)? {
                let Choice { backend, generation } = bytemuck::cast(choice);
                let sockets = u32::try_from(u64::from_ne_bytes(number)).unwrap_or(u32::MAX);
                *live.entry((backend, generation)).or_default() += sockets;
            }
            self.counts.delete(&choice)?;
        }
        Ok(())
    }

    fn walk(&self, names: BorrowedFd<'_>) -> io::Result<()> {
        #[repr(C)]
        #[derive(Default)]
        struct Create {
            link_fd: u32,
            flags: u32,
        }
        let link = link::iterator(self.program.as_fd(), names)?;
        let mut attr = Create { link_fd: link.as_raw_fd() as u32, flags: 0 };
        // SAFETY: `Create` is what the command reads, and there is no address in it.
        let fd = unsafe { bpf(ITER_CREATE, &mut attr)? };
        // SAFETY: the kernel just gave us this descriptor; nobody else has it.
        let mut walk = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut nothing = [0; 64];
        loop {
            match walk.read(&mut nothing) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // After each million of sockets.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// `if (ctx->value && (choice = value->counted)) counts[choice] += 1; return 0`
fn program(counts: BorrowedFd<'_>) -> Vec<u64> {
    const LOOKUP: i32 = 1;
    const UPDATE: i32 = 2;
    /// In `struct bpf_iter__bpf_sk_storage_map`: meta, map, sk, value.
    const VALUE: i16 = 24;
    const COUNTED: i16 = offset_of!(SocketName, counted) as i16;
    const KEY: i16 = -8;
    const ONE: i16 = -16;
    let load = |dst, src, offset| instruction(0x79, dst, src, offset, 0);
    let store = |offset, src| instruction(0x7b, 10, src, offset, 0);
    let set = |register, value| instruction(0xb7, register, 0, 0, value);
    let call = |helper| instruction(0x85, 0, 0, 0, helper);
    let if_zero = |register, skip| instruction(0x15, register, 0, skip, 0);
    let at = |register, offset: i16| {
        [instruction(0xbf, register, 10, 0, 0), instruction(0x07, register, 0, 0, i32::from(offset))]
    };
    // By a descriptor: BPF_PSEUDO_MAP_FD.
    let map = [instruction(0x18, 1, 1, 0, counts.as_raw_fd()), 0];
    let key = at(2, KEY);
    let mut program = vec![load(6, 1, VALUE), if_zero(6, 21), load(6, 6, COUNTED), if_zero(6, 19)];
    program.extend([store(KEY, 6), map[0], map[1], key[0], key[1], call(LOOKUP), if_zero(0, 3)]);
    // lock *(u64 *)(r0 + 0) += 1
    program.extend([set(1, 1), instruction(0xdb, 0, 1, 0, 0), instruction(0x05, 0, 0, 9, 0)]);
    let one = at(3, ONE);
    program.extend([instruction(0x7a, 10, 0, ONE, 1), map[0], map[1], key[0], key[1], one[0], one[1]]);
    program.extend([set(4, 0), call(UPDATE), set(0, 0), instruction(0x95, 0, 0, 0, 0)]);
    program
}
