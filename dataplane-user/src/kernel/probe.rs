//! What this kernel can do: asked of the kernel itself, not guessed from its version.
//!
//! What is missing is replaced, and one log line tells which way was taken; what cannot be replaced is an error that says
//! what to do.

use super::bpf::{self, TestRun, bpf, instruction};
use super::link;
use super::needs::{self, Needed};
use std::ffi::CString;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

/// The oldest kernel that was tried.
const OLDEST: (u32, u32) = (6, 1);
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: i64 = 0x6367_7270;
/// Types of the kernel itself.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

const PROG_QUERY: libc::c_int = 16;
/// Index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

/// What the kernel cannot do without which there is no dataplane.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Something that the programs need.
    #[error(
        "Linux {kernel} lacks what the programs need (in brackets the release that has it): {missing}. Linux 6.1 has all"
    )]
    Kernel {
        /// Its version.
        kernel: String,
        /// What it lacks.
        missing: String,
    },
    /// Programs at one hook interrupt each other, on one CPU.
    #[error(
        "Linux {0} has PREEMPT_RT, and since 6.18 its programs of one CPU interrupt each other, so that a packet could leave with the \
         addresses of another: boot a kernel without PREEMPT_RT"
    )]
    RealTime(String),
    /// No cgroup2.
    #[error(
        "no cgroup2 file system is mounted: mount one (`mount -t cgroup2 cgroup2 /sys/fs/cgroup`) or name it with \
         --cgroup, or do without sockets with --socket-lb=off"
    )]
    NoCgroup2,
    /// The folder given is none.
    #[error("--cgroup {path}: {reason}. `findmnt -t cgroup2` tells where cgroup2 is mounted")]
    NotCgroup2 {
        /// The folder.
        path: PathBuf,
        /// Why it cannot be used.
        reason: String,
    },
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// Its version, for people.
    pub kernel: String,
    /// Programs on interfaces are links (6.6); else they are clsact filters.
    pub tcx: bool,
    /// The route lookup names the source address (6.7); else the agent does.
    pub fib_source: bool,
    /// The kernel brings its own types.
    pub btf: bool,
    /// It is of a series that Portolan was tried on, or newer.
    pub tried: bool,
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tc = if self.tcx { "TCX links" } else { "clsact filters (no TCX)" };
        let source = if self.fib_source {
            "the kernel's route lookup"
        } else {
            "the node's primary address (no BPF_FIB_LOOKUP_SRC)"
        };
        write!(f, "Linux {}: tc programs by {tc}; source addresses by {source}", self.kernel)?;
        if !self.tried {
            write!(f, "; it has all that is needed, but kernels before 6.1 were not tried")?;
        }
        if !self.btf {
            write!(f, "; no BTF of the kernel (no {KERNEL_BTF}; CONFIG_DEBUG_INFO_BTF)")?;
        }
        Ok(())
    }
}

/// Asks the kernel.
///
/// # Errors
/// If it lacks something, or its programs interrupt each other.
pub fn features() -> Result<Features, ProbeError> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let missing = needs::missing();
    if !missing.is_empty() {
        let missing = missing.iter().map(Needed::to_string).collect::<Vec<_>>().join(", ");
        return Err(ProbeError::Kernel { kernel, missing });
    }
    if nests(
        fs::read_to_string("/sys/kernel/realtime").is_ok_and(|text| text.trim() == "1"),
        version(&kernel),
    ) {
        return Err(ProbeError::RealTime(kernel));
    }
    let fib_source = fib_source().unwrap_or_else(|error| {
        tracing::debug!("cannot probe BPF_FIB_LOOKUP_SRC: {error}");
        false
    });
    // A version that cannot be read says nothing.
    let tried = version(&kernel).is_none_or(|version| version >= OLDEST);
    Ok(Features { kernel, tcx: tcx(), fib_source, btf: Path::new(KERNEL_BTF).exists(), tried })
}

/// Whether sections with bottom halves disabled interrupt each other on one CPU: with PREEMPT_RT, since the lock that kept them apart is
/// gone (kernel commit 3253cb49cbad). The programs' memory of a CPU has one user at a time.
fn nests(is_real_time: bool, version: Option<(u32, u32)>) -> bool {
    const SINCE: (u32, u32) = (6, 18);
    is_real_time && version.is_none_or(|version| version >= SINCE)
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Whether the TCX chain of an interface can be asked for.
fn tcx() -> bool {
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        count: u32,
        pad: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    let mut attr = Query { target: LOOPBACK, attach_type: link::TCX_INGRESS, ..Default::default() };
    // SAFETY: `Query` is what the command reads, and no address in it is set: only a count is asked for.
    match unsafe { bpf(PROG_QUERY, &mut attr) } {
        Ok(_) => true,
        // More programs than the room for none.
        Err(error) => error.raw_os_error() == Some(libc::ENOSPC),
    }
}

/// Whether `bpf_fib_lookup` knows `BPF_FIB_LOOKUP_SRC`: it refuses flags that it does not know with `EINVAL` before it
/// looks at anything else.
fn fib_source() -> io::Result<bool> {
    let program = bpf::load_classifier(&fib_source_program())?;
    let packet = [0; 64];
    let run = bpf::prog_test_run(program.as_fd(), &TestRun { data: &packet, ..TestRun::default() })?;
    Ok(run.retval as i32 != -libc::EINVAL)
}

/// `return bpf_fib_lookup(skb, &(struct bpf_fib_lookup){ .family = AF_INET }, 64, BPF_FIB_LOOKUP_SRC)`
fn fib_source_program() -> Vec<u64> {
    const PARAMS: i16 = -64;
    const FIB_LOOKUP: i32 = 69;
    const LOOKUP_SRC: i32 = 1 << 4;
    let store_zero = |offset| instruction(0x7a, 10, 0, offset, 0);
    let set = |register, value| instruction(0xb7, register, 0, 0, value);
    let mut program: Vec<u64> = (0..8).map(|word| store_zero(PARAMS + 8 * word)).collect();
    program.extend([
        // *(u8 *)params = AF_INET
        instruction(0x72, 10, 0, PARAMS, libc::AF_INET),
        // r2 = fp + PARAMS
        instruction(0xbf, 2, 10, 0, 0),
        instruction(0x07, 2, 0, 0, i32::from(PARAMS)),
        set(3, 64),
        set(4, LOOKUP_SRC),
        instruction(0x85, 0, 0, 0, FIB_LOOKUP),
        instruction(0x95, 0, 0, 0, 0),
    ]);
    program
}

/// A cgroup2 folder that is open.
#[derive(Debug)]
pub struct Cgroup {
    /// Where it is.
    pub path: PathBuf,
    /// The open folder.
    pub folder: fs::File,
    /// The kernel's id of it.
    pub id: u64,
}

/// Opens the cgroup given, else the root of the cgroup2 mount.
///
/// # Errors
/// If there is none, or it is none.
pub fn cgroup(given: Option<&Path>) -> Result<Cgroup, ProbeError> {
    use std::os::unix::fs::MetadataExt as _;
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            cgroup2_mount(&mounts).ok_or(ProbeError::NoCgroup2)?
        }
    };
    let wrong = |reason: String| ProbeError::NotCgroup2 { path: path.clone(), reason };
    let folder = fs::File::open(&path).map_err(|error| wrong(error.to_string()))?;
    if file_system(&folder).map_err(|error| wrong(error.to_string()))? != CGROUP2_MAGIC {
        return Err(wrong("not on a cgroup2 file system".to_owned()));
    }
    // On 64-bit machines the inode's number is the cgroup's id.
    let id = folder.metadata().map_err(|error| wrong(error.to_string()))?.ino();
    Ok(Cgroup { path, folder, id })
}

fn file_system(file: &fs::File) -> io::Result<i64> {
    // SAFETY: all zeros are a valid `statfs`, and the kernel fills it in.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is as long as the kernel expects and outlives the call.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type)
}

/// The first cgroup2 mount in the text of `/proc/self/mounts`.
fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

/// The driver of an interface, as `ethtool -i` tells.
///
/// # Errors
/// If the interface is gone, or its driver does not say.
pub fn driver(interface: &str) -> io::Result<String> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const GDRVINFO: u32 = 3;
    #[repr(C)]
    struct DriverInfo {
        command: u32,
        driver: [u8; 32],
        rest: [u8; 160],
    }
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        data: *mut DriverInfo,
        rest: [u8; 16],
    }
    let name = CString::new(Path::new(interface).as_os_str().as_bytes())?;
    let mut info = DriverInfo { command: GDRVINFO, driver: [0; 32], rest: [0; 160] };
    let mut request = Request { name: [0; libc::IFNAMSIZ], data: &raw mut info, rest: [0; 16] };
    let length = name.as_bytes().len().min(libc::IFNAMSIZ - 1);
    request.name[..length].copy_from_slice(&name.as_bytes()[..length]);
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: `Request` is laid out as `struct ifreq` and points to a `struct ethtool_drvinfo`; both outlive the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let end = info.driver.iter().position(|byte| *byte == 0).unwrap_or(info.driver.len());
    Ok(String::from_utf8_lossy(&info.driver[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_whose_programs_interrupt_each_other_is_told_apart() {
        assert!(nests(true, Some((6, 18))) && nests(true, None));
        assert!(!nests(true, Some((6, 12))) && !nests(false, Some((6, 19))));
    }

    #[test]
    fn a_kernel_s_release_is_read_up_to_its_second_number() {
        assert_eq!(version("6.18.44-generic"), Some((6, 18)));
        assert_eq!(version("6.1"), Some((6, 1)));
        assert!(version("5.15.0-1").unwrap() < OLDEST);
        assert_eq!(version("linux"), None);
    }

    #[test]
    fn the_cgroup2_mount_is_found_beside_cgroups_of_the_first_version() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_refused_with_the_reason() {
        let error = cgroup(Some(Path::new("/proc"))).unwrap_err().to_string();
        assert!(error.contains("not on a cgroup2 file system"), "{error}");
        let error = cgroup(Some(Path::new("/does/not/exist"))).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn one_line_tells_which_way_was_taken() {
        let features =
            Features { kernel: "6.1.0".to_owned(), tcx: false, fib_source: false, btf: true, tried: false };
        let text = features.to_string();
        assert!(text.contains("clsact filters") && text.contains("primary address"), "{text}");
        assert!(text.contains("were not tried"), "{text}");
    }
}
