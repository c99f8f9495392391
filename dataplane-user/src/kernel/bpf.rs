//! The one small wrapper of `bpf(2)`: what aya has no call for, above all the batch operations.
//!
//! Every other unsafe call into the kernel's BPF interface is aya's. Buffers are checked against the sizes that the
//! kernel itself reports for a map, so the functions here are safe whatever they are given. Nothing is retried or
//! logged here; each error is the kernel's `errno`.

use super::mapped::{MappedWords, WORD};
use std::cell::Cell;
use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

// `enum bpf_cmd` of linux/bpf.h.
const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const PROG_TEST_RUN: libc::c_int = 10;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const MAP_UPDATE_BATCH: libc::c_int = 26;
const MAP_DELETE_BATCH: libc::c_int = 27;

/// `BPF_MAP_TYPE_HASH`.
pub const TYPE_HASH: u32 = 1;
/// `BPF_MAP_TYPE_ARRAY`.
pub const TYPE_ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_PERCPU_HASH`.
pub const TYPE_PERCPU_HASH: u32 = 5;
/// `BPF_MAP_TYPE_PERCPU_ARRAY`.
pub const TYPE_PERCPU_ARRAY: u32 = 6;
/// `BPF_MAP_TYPE_LRU_HASH`.
pub const TYPE_LRU_HASH: u32 = 9;
/// `BPF_MAP_TYPE_LRU_PERCPU_HASH`.
pub const TYPE_LRU_PERCPU_HASH: u32 = 10;

/// `BPF_MAP_TYPE_LPM_TRIE`.
pub const TYPE_LPM_TRIE: u32 = 11;
/// `BPF_MAP_TYPE_SK_STORAGE`.
pub const TYPE_SK_STORAGE: u32 = 24;
/// `BPF_F_NO_PREALLOC`: memory is taken when an entry is made. A trie knows no other way.
pub const NO_PREALLOC: u32 = 1;
/// `BPF_F_MMAPABLE`: the elements can be mapped into a process's memory.
pub const MMAPABLE: u32 = 1 << 10;

/// `BPF_ANY`: insert or replace.
pub const ANY: u64 = 0;
/// `BPF_NOEXIST`: insert only.
pub const NO_EXIST: u64 = 1;
/// `BPF_EXIST`: replace only.
pub const EXIST: u64 = 2;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`: what an XDP program transmits or redirects really leaves.
pub const TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

thread_local! {
    /// How many times this thread entered the kernel through this module.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// How many `bpf(2)` calls this thread has made through this module: what others do meanwhile does not count.
pub fn calls() -> u64 {
    CALLS.get()
}

/// The members of `union bpf_attr` that are used, as the kernel lays them out.
mod attr {
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Create {
        pub(super) map_type: u32,
        pub(super) key_size: u32,
        pub(super) value_size: u32,
        pub(super) max_entries: u32,
        pub(super) map_flags: u32,
        pub(super) inner_map_fd: u32,
        pub(super) numa_node: u32,
        pub(super) map_name: [u8; 16],
    }

    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Elem {
        pub(super) map_fd: u32,
        pub(super) pad: u32,
        pub(super) key: u64,
        pub(super) value: u64,
        pub(super) flags: u64,
    }

    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Batch {
        pub(super) in_batch: u64,
        pub(super) out_batch: u64,
        pub(super) keys: u64,
        pub(super) values: u64,
        pub(super) count: u32,
        pub(super) map_fd: u32,
        pub(super) elem_flags: u64,
        pub(super) flags: u64,
    }

    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Load {
        pub(super) prog_type: u32,
        pub(super) insn_cnt: u32,
        pub(super) insns: u64,
        pub(super) license: u64,
        pub(super) log_level: u32,
        pub(super) log_size: u32,
        pub(super) log_buf: u64,
        pub(super) kern_version: u32,
        pub(super) prog_flags: u32,
        pub(super) prog_name: [u8; 16],
        pub(super) prog_ifindex: u32,
        pub(super) expected_attach_type: u32,
        pub(super) prog_btf_fd: u32,
        pub(super) func_info_rec_size: u32,
        pub(super) func_info: u64,
        pub(super) func_info_cnt: u32,
        pub(super) line_info_rec_size: u32,
        pub(super) line_info: u64,
        pub(super) line_info_cnt: u32,
        pub(super) attach_btf_id: u32,
    }

    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Object {
        pub(super) pathname: u64,
        pub(super) bpf_fd: u32,
        pub(super) file_flags: u32,
    }

    #[repr(C)]
    #[derive(Default)]
    pub(super) struct ByFd {
        pub(super) bpf_fd: u32,
        pub(super) info_len: u32,
        pub(super) info: u64,
    }

    #[repr(C)]
    #[derive(Default)]
    pub(super) struct MapByFd {
        pub(super) map_type: u32,
        pub(super) id: u32,
        pub(super) key_size: u32,
        pub(super) value_size: u32,
        pub(super) max_entries: u32,
        pub(super) map_flags: u32,
        pub(super) name: [u8; 16],
    }

    #[repr(C)]
    #[derive(Default)]
    pub(super) struct TestRun {
        pub(super) prog_fd: u32,
        pub(super) retval: u32,
        pub(super) data_size_in: u32,
        pub(super) data_size_out: u32,
        pub(super) data_in: u64,
        pub(super) data_out: u64,
        pub(super) repeat: u32,
        pub(super) duration: u32,
        pub(super) ctx_size_in: u32,
        pub(super) ctx_size_out: u32,
        pub(super) ctx_in: u64,
        pub(super) ctx_out: u64,
        pub(super) flags: u32,
        pub(super) cpu: u32,
        pub(super) batch_size: u32,
        pub(super) pad: u32,
    }
}

/// One entry into the kernel, counted.
///
/// # Safety
/// `attr` must be the member of `union bpf_attr` that `command` reads, and each address in it must be valid for what
/// the kernel reads or writes there.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    CALLS.set(CALLS.get() + 1);
    // SAFETY: the caller vouches for `attr`; its size is passed along, so the kernel reads no further.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>() as libc::c_uint)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

/// The address of a buffer as the kernel wants it: none for the key of a map without keys.
fn address(bytes: &[u8]) -> u64 {
    if bytes.is_empty() { 0 } else { bytes.as_ptr() as u64 }
}

/// The address of a buffer that the kernel writes.
fn address_mut(bytes: &mut [u8]) -> u64 {
    bytes.as_mut_ptr() as u64
}

fn fd_number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// A wrong buffer size would let the kernel write past the buffer's end: the kernel never sees it.
fn check(is: usize, must_be: usize) -> io::Result<()> {
    if is == must_be { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

/// An instruction of BPF (RFC 9669, 3): its code, registers, offset and number.
pub(super) const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | ((src << 4 | dst) as u64) << 8
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}

/// Loads a tc program that is written out by instruction.
///
/// # Errors
/// The kernel's: `EINVAL` or `EACCES` if its verifier refuses it, `EPERM` without the right.
pub fn load_classifier(program: &[u64]) -> io::Result<OwnedFd> {
    const SCHED_CLS: u32 = 3;
    load(program, attr::Load { prog_type: SCHED_CLS, ..Default::default() })
}

/// Loads a program of a type (`enum bpf_prog_type`), for an attach type where the kernel must know it, with flags. What the verifier says
/// of it, closed by a zero, is written to `log`.
///
/// # Errors
/// As [`load_classifier`]; `ENOSPC` if it says more.
pub(super) fn load_program(
    program: &[u64],
    prog_type: u32,
    attach_type: u32,
    prog_flags: u32,
    log: &mut [u8],
) -> io::Result<OwnedFd> {
    let kind = attr::Load {
        prog_type,
        expected_attach_type: attach_type,
        prog_flags,
        log_level: 1,
        log_size: log.len() as u32,
        log_buf: address_mut(log),
        ..Default::default()
    };
    load(program, kind)
}

/// Loads a program of an iterator: `target` is the number of its function among the kernel's types.
///
/// # Errors
/// As [`load_classifier`].
pub fn load_iterator(program: &[u64], target: u32) -> io::Result<OwnedFd> {
    const TRACING: u32 = 26;
    let kind = attr::Load {
        prog_type: TRACING,
        expected_attach_type: TRACE_ITER,
        attach_btf_id: target,
        ..Default::default()
    };
    load(program, kind)
}

/// `BPF_TRACE_ITER` of `enum bpf_attach_type`.
pub(super) const TRACE_ITER: u32 = 28;

fn load(program: &[u64], mut attr: attr::Load) -> io::Result<OwnedFd> {
    attr.insn_cnt = program.len() as u32;
    (attr.insns, attr.license) = (program.as_ptr() as u64, c"GPL".as_ptr() as u64);
    // SAFETY: `Load` is what the command reads; all addresses are of memory that outlives the call, of the length given
    // beside it or closed by a zero.
    let fd = unsafe { bpf(PROG_LOAD, &mut attr)? };
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a pinned object: a map, a program or a link.
///
/// # Errors
/// `ENOENT` without a pin, `EACCES` or `EPERM` without the right, `EINVAL` on a file system that is no bpffs.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = attr::Object { pathname: path.as_ptr() as u64, ..Default::default() };
    // SAFETY: `path` is a closed string that outlives the call.
    let fd = unsafe { bpf(OBJ_GET, &mut attr)? };
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins an object. The folder must lie on a bpffs and `path` must not exist.
///
/// # Errors
/// The kernel's: `EEXIST`, `EPERM`, `ENOENT`.
pub fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr =
        attr::Object { pathname: path.as_ptr() as u64, bpf_fd: fd_number(object), ..Default::default() };
    // SAFETY: `path` is a closed string that outlives the call.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// How many CPUs the kernel may ever have: per-CPU values have one part for each.
///
/// # Errors
/// If `/sys/devices/system/cpu/possible` cannot be read.
pub fn possible_cpus() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    parse_cpu_list(text.trim()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// How many CPUs a list like `0-3,5` names.
fn parse_cpu_list(list: &str) -> Option<usize> {
    list.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first).map(|more| more + 1)
        })
        .sum()
}

/// What the kernel says about a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapShape {
    /// Its name, at most 15 bytes.
    pub name: String,
    /// One of the `TYPE_*` constants, or another `BPF_MAP_TYPE_*`.
    pub map_type: u32,
    /// Its id, as `bpftool map` shows it.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: usize,
    /// Bytes of a value in the kernel; of per-CPU maps, of one CPU's part.
    pub value_size: usize,
    /// How many entries it can hold.
    pub max_entries: usize,
    /// `BPF_F_*` flags it was made with.
    pub flags: u32,
}

impl MapShape {
    /// Whether there is a value for each CPU.
    pub fn per_cpu(&self) -> bool {
        matches!(self.map_type, TYPE_PERCPU_HASH | TYPE_PERCPU_ARRAY | TYPE_LRU_PERCPU_HASH)
    }
}

/// How far a batch call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Entries that were read, written or removed.
    pub done: usize,
    /// Nothing is left after them.
    pub last: bool,
}

/// An open map whose sizes are known, so that buffers can be checked before the kernel sees them.
#[derive(Debug)]
pub struct MapFd {
    fd: OwnedFd,
    shape: MapShape,
    /// Bytes of a value as it is copied to and from user space: for per-CPU maps one part, rounded up to 8, per CPU.
    copied: usize,
    /// The elements, where they were mapped.
    mapped: OnceLock<MappedWords>,
}

impl AsFd for MapFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl MapFd {
    /// Makes a map without BTF. What the programs share comes from the eBPF object; this is for what the agent or a test has alone.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without the right, `EINVAL` for a shape it does not take.
    pub fn create(
        name: &str,
        map_type: u32,
        map_flags: u32,
        [key_size, value_size]: [usize; 2],
        max_entries: usize,
    ) -> io::Result<Self> {
        let mut map_name = [0; 16];
        for (to, from) in map_name.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        let mut attr = attr::Create {
            map_type,
            key_size: key_size as u32,
            value_size: value_size as u32,
            max_entries: max_entries as u32,
            map_flags,
            map_name,
            ..Default::default()
        };
        // SAFETY: the attribute holds no address.
        let fd = unsafe { bpf(MAP_CREATE, &mut attr)? };
        // SAFETY: the kernel just gave us this descriptor; nobody else has it.
        Self::new(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Opens a pinned map.
    ///
    /// # Errors
    /// As [`obj_get`]; `EINVAL` if the object is no map.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(obj_get(path)?)
    }

    /// Takes a map that is already open.
    ///
    /// # Errors
    /// The kernel's, if the descriptor is of no map.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // A program's or a link's answer would be read as nonsense sizes: fdinfo tells maps apart.
        if fdinfo(fd.as_fd(), "map_type:")?.is_none() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut answer = attr::MapByFd::default();
        let mut attr = attr::ByFd {
            bpf_fd: fd_number(fd.as_fd()),
            info_len: size_of::<attr::MapByFd>() as u32,
            info: std::ptr::from_mut(&mut answer) as u64,
        };
        // SAFETY: `answer` is writable for `info_len` bytes and outlives the call.
        unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr)? };
        let name = answer.name.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect();
        let shape = MapShape {
            name,
            map_type: answer.map_type,
            id: answer.id,
            key_size: answer.key_size as usize,
            value_size: answer.value_size as usize,
            max_entries: answer.max_entries as usize,
            flags: answer.map_flags,
        };
        let copied = if shape.per_cpu() {
            shape.value_size.next_multiple_of(8) * possible_cpus()?
        } else {
            shape.value_size
        };
        Ok(Self { fd, shape, copied, mapped: OnceLock::new() })
    }

    /// What the kernel says about it.
    pub fn shape(&self) -> &MapShape {
        &self.shape
    }

    /// Bytes of a value as the functions below take and give it.
    pub fn copied_size(&self) -> usize {
        self.copied
    }

    /// How much kernel memory the map takes, in bytes, as `fdinfo` tells.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn memlock(&self) -> io::Result<u64> {
        let text = fdinfo(self.as_fd(), "memlock:")?;
        text.and_then(|number| number.parse().ok()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn element(&self, key: &[u8], value: u64, flags: u64) -> io::Result<attr::Elem> {
        check(key.len(), self.shape.key_size)?;
        Ok(attr::Elem { map_fd: fd_number(self.as_fd()), pad: 0, key: address(key), value, flags })
    }

    /// Copies the value of `key` into `value`; `false` if there is none.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` if a buffer has the wrong size.
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        check(value.len(), self.copied)?;
        let mut attr = self.element(key, address_mut(value), 0)?;
        // SAFETY: both buffers have the map's sizes and outlive the call.
        found(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) })
    }

    /// Writes one entry.
    ///
    /// # Errors
    /// The kernel's: `E2BIG` if the map is full or the index past its end; `EINVAL` if a buffer has the wrong size.
    pub fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        check(value.len(), self.copied)?;
        let mut attr = self.element(key, address(value), flags)?;
        // SAFETY: both buffers have the map's sizes and outlive the call; the kernel only reads them.
        unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    /// Writes one entry of an array that can be mapped, whose values are whole words: each word by one store. What the kernel copies for
    /// [`Self::update`] may be half a word for a program that reads it meanwhile, and stay so while an interrupt lasts.
    ///
    /// # Errors
    /// `EINVAL` if the value has the wrong size or is of no whole words, `E2BIG` behind the end; and the kernel's, of the mapping.
    pub fn store(&self, index: u32, value: &[u8]) -> io::Result<()> {
        check(value.len(), self.shape.value_size)?;
        check(value.len() % WORD, 0)?;
        let words = match self.mapped.get() {
            Some(words) => words,
            None => {
                let words = MappedWords::of(self)?;
                self.mapped.get_or_init(|| words)
            }
        };
        let at = index as usize * (value.len() / WORD);
        let element = words.words().get(at..at + value.len() / WORD);
        let element = element.ok_or_else(|| io::Error::from_raw_os_error(libc::E2BIG))?;
        for (word, bytes) in element.iter().zip(value.as_chunks::<WORD>().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Release);
        }
        Ok(())
    }

    /// Removes one entry; `false` if there was none.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` if the buffer has the wrong size, and for arrays.
    pub fn delete(&self, key: &[u8]) -> io::Result<bool> {
        let mut attr = self.element(key, 0, 0)?;
        // SAFETY: the key has the map's key size and outlives the call.
        found(unsafe { bpf(MAP_DELETE_ELEM, &mut attr) })
    }

    /// Copies the key after `key`, or the first, into `next`; `false` at the end.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` if a buffer has the wrong size.
    pub fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
        check(next.len(), self.shape.key_size)?;
        if let Some(key) = key {
            check(key.len(), self.shape.key_size)?;
        }
        let mut attr = attr::Elem {
            map_fd: fd_number(self.as_fd()),
            key: key.map_or(0, address),
            value: address_mut(next),
            ..Default::default()
        };
        // SAFETY: both buffers have the map's key size and outlive the call.
        found(unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) })
    }

    /// Where a walk by [`Self::lookup_batch`] begins.
    pub fn cursor(&self) -> Cursor {
        // Hash maps use four bytes, the others a key.
        Cursor { position: vec![0; self.shape.key_size.max(4)], started: false }
    }

    /// Copies as many entries from the cursor on as the buffers hold, and moves the cursor behind them.
    ///
    /// # Errors
    /// The kernel's: `ENOSPC` if the buffers are too small for one bucket of a hash map; `EINVAL` also where the map or
    /// the kernel has no batch operations, or a buffer's size is no multiple of the map's.
    pub fn lookup_batch(
        &self,
        cursor: &mut Cursor,
        keys: &mut [u8],
        values: &mut [u8],
    ) -> io::Result<Progress> {
        let count = self.entries(keys, values)?;
        check(cursor.position.len(), self.shape.key_size.max(4))?;
        let mut next = cursor.position.clone();
        let mut attr = attr::Batch {
            in_batch: if cursor.started { address(&cursor.position) } else { 0 },
            out_batch: address_mut(&mut next),
            keys: address_mut(keys),
            values: address_mut(values),
            count: count as u32,
            map_fd: fd_number(self.as_fd()),
            ..Default::default()
        };
        // SAFETY: the buffers hold `count` keys and values, the cursors what the map type uses; all outlive the call.
        let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) };
        let progress = ended(result, attr.count as usize)?;
        *cursor = Cursor { position: next, started: true };
        Ok(progress)
    }

    /// Writes entries until one fails. Returns how many were written, and why it stopped before the end.
    ///
    /// # Errors
    /// `EINVAL` if the buffers do not hold the same number of entries; otherwise the error is in the answer.
    pub fn update_batch(
        &self,
        keys: &[u8],
        values: &[u8],
        flags: u64,
    ) -> io::Result<(usize, io::Result<()>)> {
        let count = self.entries(keys, values)?;
        let mut attr = attr::Batch {
            keys: address(keys),
            values: address(values),
            count: count as u32,
            map_fd: fd_number(self.as_fd()),
            elem_flags: flags,
            ..Default::default()
        };
        // SAFETY: the buffers hold `count` keys and values and outlive the call; the kernel only reads them.
        let result = unsafe { bpf(MAP_UPDATE_BATCH, &mut attr) };
        Ok(partly(result, attr.count as usize, count))
    }

    /// Removes entries until one fails (`ENOENT` if it is not there). Returns how many were removed, and why it stopped.
    ///
    /// # Errors
    /// `EINVAL` if the buffer's size is no multiple of a key's; otherwise the error is in the answer.
    pub fn delete_batch(&self, keys: &[u8]) -> io::Result<(usize, io::Result<()>)> {
        let count = keys.len() / self.shape.key_size;
        check(keys.len(), count * self.shape.key_size)?;
        let mut attr = attr::Batch {
            keys: address(keys),
            count: count as u32,
            map_fd: fd_number(self.as_fd()),
            ..Default::default()
        };
        // SAFETY: the buffer holds `count` keys and outlives the call; the kernel only reads it.
        let result = unsafe { bpf(MAP_DELETE_BATCH, &mut attr) };
        Ok(partly(result, attr.count as usize, count))
    }

    fn entries(&self, keys: &[u8], values: &[u8]) -> io::Result<usize> {
        let count = keys.len() / self.shape.key_size;
        check(keys.len(), count * self.shape.key_size)?;
        check(values.len(), count * self.copied)?;
        Ok(count)
    }
}

/// How far a walk over a map came. Only good for the map that made it.
#[derive(Clone, Debug)]
pub struct Cursor {
    position: Vec<u8>,
    started: bool,
}

/// `ENOENT` is an answer, not an error.
fn found(result: io::Result<libc::c_int>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A batch look-up says `ENOENT` when it reached the end; what it read before counts.
fn ended(result: io::Result<libc::c_int>, done: usize) -> io::Result<Progress> {
    found(result).map(|more| Progress { done, last: !more })
}

/// A refused batch may leave `count` as it was: then nothing is known to be done.
fn partly(result: io::Result<libc::c_int>, done: usize, asked: usize) -> (usize, io::Result<()>) {
    match result {
        Ok(_) => (asked, Ok(())),
        Err(error) => (if done < asked { done } else { 0 }, Err(error)),
    }
}

/// The rest of the line that begins with `field` in the descriptor's `fdinfo`.
fn fdinfo(fd: BorrowedFd<'_>, field: &str) -> io::Result<Option<String>> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    Ok(text.lines().find_map(|line| line.strip_prefix(field)).map(|rest| rest.trim().to_owned()))
}

/// How often a program ran and for how many nanoseconds, since the kernel counts that ([`counts_runs`]).
///
/// # Errors
/// If `/proc` cannot be read.
pub fn program_runs(program: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let number = |field| {
        let text = fdinfo(program, field)?;
        text.and_then(|text| text.parse().ok()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    };
    Ok((number("run_cnt:")?, number("run_time_ns:")?))
}

/// Whether the kernel counts the runs of programs, which costs every run some nanoseconds.
pub fn counts_runs() -> bool {
    let setting = std::fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled");
    setting.is_ok_and(|setting| setting.trim() == "1")
}

/// What to run a program on.
#[derive(Clone, Debug, Default)]
pub struct TestRun<'a> {
    /// The packet, from the Ethernet header on; empty for programs without one.
    pub data: &'a [u8],
    /// The context (`__sk_buff`, `xdp_md`, …) as bytes; empty for the kernel's default.
    pub context: &'a [u8],
    /// How many times; 0 counts as 1.
    pub repeat: u32,
    /// [`TEST_XDP_LIVE_FRAMES`] or 0.
    pub flags: u32,
    /// Frames per batch with [`TEST_XDP_LIVE_FRAMES`]; 0 for the kernel's default.
    pub batch_size: u32,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TestRunResult {
    /// What the program returned at the last run.
    pub retval: u32,
    /// Mean duration of a run in nanoseconds.
    pub nanoseconds: u32,
    /// The packet after the last run.
    pub data: Vec<u8>,
    /// The context after the last run; empty if none was given.
    pub context: Vec<u8>,
}

/// How much a program may add to a packet in a test run, in bytes.
const GROWTH: usize = 512;

/// Runs a loaded program on a packet (`BPF_PROG_TEST_RUN`).
///
/// # Errors
/// The kernel's: `ENOTSUPP` (524) for a program type without test runs, `EINVAL` for a packet or context it does not take,
/// `EINTR` after a signal.
pub fn prog_test_run(program: BorrowedFd<'_>, run: &TestRun<'_>) -> io::Result<TestRunResult> {
    // Live frames really leave: the kernel gives none back and refuses a buffer.
    let live = run.flags & TEST_XDP_LIVE_FRAMES != 0;
    let mut data = vec![0; if live || run.data.is_empty() { 0 } else { run.data.len() + GROWTH }];
    let mut context = vec![0; if live { 0 } else { run.context.len() }];
    let or_none = |bytes: &[u8]| if bytes.is_empty() { 0 } else { address(bytes) };
    let mut attr = attr::TestRun {
        prog_fd: fd_number(program),
        data_size_in: run.data.len() as u32,
        data_size_out: data.len() as u32,
        data_in: or_none(run.data),
        data_out: if data.is_empty() { 0 } else { address_mut(&mut data) },
        repeat: run.repeat,
        ctx_size_in: run.context.len() as u32,
        ctx_size_out: context.len() as u32,
        ctx_in: or_none(run.context),
        ctx_out: if context.is_empty() { 0 } else { address_mut(&mut context) },
        flags: run.flags,
        batch_size: run.batch_size,
        ..Default::default()
    };
    // SAFETY: each buffer has the size given beside it and outlives the call.
    unsafe { bpf(PROG_TEST_RUN, &mut attr)? };
    data.truncate(attr.data_size_out as usize);
    context.truncate(attr.ctx_size_out as usize);
    Ok(TestRunResult { retval: attr.retval, nanoseconds: attr.duration, data, context })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_have_the_kernel_s_layout() {
        assert_eq!(size_of::<attr::Create>(), 44);
        assert_eq!(size_of::<attr::Elem>(), 32);
        assert_eq!(size_of::<attr::Batch>(), 56);
        assert_eq!(size_of::<attr::Object>(), 16);
        assert_eq!(size_of::<attr::ByFd>(), 16);
        assert_eq!(size_of::<attr::MapByFd>(), 40);
        assert_eq!(size_of::<attr::TestRun>(), 80);
    }

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(parse_cpu_list("0"), Some(1));
        assert_eq!(parse_cpu_list("0-1"), Some(2));
        assert_eq!(parse_cpu_list("0-3,5,8-9"), Some(7));
        assert_eq!(parse_cpu_list("3-1"), None);
    }
}
