//! A place where programs of a lab run: a network namespace together with a cgroup.
//!
//! Nothing here changes the namespace or the cgroup of the calling thread: programs are started inside, closures run on a
//! thread of their own, and sockets are made by a child that lives for three system calls.

use super::network::Family;
use anyhow::{Context, Result};
use std::ffi::{CStr, CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where `ip netns` keeps named namespaces.
pub(crate) const NAMESPACES: &str = "/run/netns";

/// A network namespace and a cgroup.
#[derive(Clone, Debug)]
pub struct Place {
    name: String,
    namespace: String,
    cgroup: PathBuf,
    /// Stands in the place of `/etc/resolv.conf`.
    resolver: Option<PathBuf>,
}

impl Place {
    /// A place by its short name, the name of its namespace and the folder of its cgroup.
    pub(crate) fn new(name: &str, namespace: &str, cgroup: &Path) -> Self {
        Self { name: name.into(), namespace: namespace.into(), cgroup: cgroup.into(), resolver: None }
    }

    /// The same, where programs see this file as `/etc/resolv.conf`.
    pub(crate) fn with_resolver(mut self, file: &Path) -> Self {
        self.resolver = Some(file.into());
        self
    }

    /// What programs see as `/etc/resolv.conf`, if not the machine's own.
    pub(crate) fn resolver(&self) -> Option<&Path> {
        self.resolver.as_deref()
    }

    /// Its name within the lab, such as `node-1`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its network namespace, as `ip -n` takes it.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The folder of its cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    fn open_namespace(&self) -> Result<File> {
        let path = Path::new(NAMESPACES).join(&self.namespace);
        File::open(&path).with_context(|| format!("network namespace {}", path.display()))
    }

    /// A command that will run inside, in a process group of its own, so that Ctrl-C ends the lab in its own order.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = self.foreground_command(program)?;
        command.process_group(0);
        Ok(command)
    }

    /// As [`Place::command`], in the caller's process group: for what a person started by hand.
    pub fn foreground_command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let namespace = self.open_namespace()?;
        let members = self.cgroup.join("cgroup.procs");
        let members = OpenOptions::new()
            .write(true)
            .open(&members)
            .with_context(|| format!("cgroup {}", members.display()))?;
        let resolver =
            self.resolver.as_ref().map(|file| CString::new(file.as_os_str().as_bytes())).transpose()?;
        let mut command = Command::new(program);
        // SAFETY: the closure makes system calls on descriptors and a string that it owns, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                set_namespace(namespace.as_raw_fd())?;
                if let Some(file) = &resolver {
                    mount_resolver(file)?;
                }
                match libc::write(members.as_raw_fd(), c"0".as_ptr().cast(), 1) {
                    1 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        Ok(command)
    }

    /// Runs a command inside to its end and returns what it printed; an error if it fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.command(program)?.args(arguments).output().with_context(|| program.to_owned())?;
        anyhow::ensure!(
            output.status.success(),
            "`{program} {}` in {}: {}\n{}{}",
            arguments.join(" "),
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a closure on a thread that is in the namespace (not in the cgroup).
    pub fn enter<T: Send>(&self, closure: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = self.open_namespace()?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                set_namespace(namespace.as_raw_fd())?;
                Ok(closure())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes a setting of the namespace, such as `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.sysctls(&[(key, value)])
    }

    /// Writes several settings, in order.
    pub fn sysctls<Key: AsRef<Path> + Sync>(&self, settings: &[(Key, &str)]) -> Result<()> {
        self.enter(|| {
            settings.iter().try_for_each(|(key, value)| {
                let path = Path::new("/proc/sys").join(key);
                std::fs::write(&path, value).with_context(|| format!("{} = {value}", path.display()))
            })
        })?
    }

    /// Commands of `ip`, one per line, run inside as one batch.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        super::network::ip_batch(Some(&self.namespace), lines)
    }

    /// A socket that belongs to this namespace and this cgroup, to be used by the calling process.
    pub fn socket(&self, domain: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
        self.sockets(domain, kind, protocol, 1)?.pop().context("no socket")
    }

    /// Several sockets at once, each as [`Place::socket`] makes it.
    ///
    /// A thread cannot be in another cgroup than its process, and socket hooks go by the cgroup in which a socket was
    /// made. So a child that shares the table of descriptors is cloned into the cgroup, makes the sockets and ends.
    pub fn sockets(&self, domain: i32, kind: i32, protocol: i32, count: usize) -> Result<Vec<OwnedFd>> {
        let namespace = self.open_namespace()?;
        let cgroup = File::open(&self.cgroup).with_context(|| format!("cgroup {}", self.cgroup.display()))?;
        let made = clone_for_sockets(&namespace, &cgroup, [domain, kind, protocol], count);
        made.with_context(|| format!("a socket in {}", self.name))
    }

    /// A TCP socket, not connected.
    pub fn tcp_socket(&self, family: Family) -> Result<OwnedFd> {
        self.socket(family.domain(), libc::SOCK_STREAM, 0)
    }

    /// A UDP socket, neither bound nor connected.
    pub fn unbound_udp_socket(&self, family: Family) -> Result<UdpSocket> {
        Ok(UdpSocket::from(self.socket(family.domain(), libc::SOCK_DGRAM, 0)?))
    }

    /// A UDP socket, bound to `source` (by default: any IPv4 address, any port), not connected.
    pub fn udp_socket(&self, source: Option<SocketAddr>) -> Result<UdpSocket> {
        let source = source.unwrap_or_else(|| any_source(Family::V4));
        let socket = self.unbound_udp_socket(Family::of(source.ip()))?;
        super::client::bind(&socket, source)?;
        Ok(socket)
    }
}

/// Any address of a family, any port.
pub(crate) fn any_source(family: Family) -> SocketAddr {
    match family {
        Family::V4 => (Ipv4Addr::UNSPECIFIED, 0).into(),
        Family::V6 => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Puts a file in the place of `/etc/resolv.conf`, for the calling process and its children alone. What is unmounted outside is
/// unmounted here too, so that this process keeps no namespace of the lab alive.
fn mount_resolver(file: &CStr) -> io::Result<()> {
    let null = std::ptr::null();
    let done = |result| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: system calls; all pointers are strings that outlive them, or null where the kernel reads none.
    unsafe {
        done(libc::unshare(libc::CLONE_NEWNS))?;
        let slave = libc::MS_REC | libc::MS_SLAVE;
        done(libc::mount(null, c"/".as_ptr(), null, slave, null.cast()))?;
        done(libc::mount(file.as_ptr(), c"/etc/resolv.conf".as_ptr(), null, libc::MS_BIND, null.cast()))
    }
}

/// Moves the calling thread.
fn set_namespace(namespace: RawFd) -> io::Result<()> {
    // SAFETY: a system call on a descriptor; no memory is passed.
    match unsafe { libc::setns(namespace, libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn clone_for_sockets(
    namespace: &File,
    cgroup: &File,
    [domain, kind, protocol]: [i32; 3],
    count: usize,
) -> io::Result<Vec<OwnedFd>> {
    let (mut answers, answering) = io::pipe()?;
    let (namespace, answering_fd) = (namespace.as_raw_fd(), answering.as_raw_fd());
    // SAFETY: all zero is a valid `clone_args`.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = (libc::CLONE_FILES as u64) | CLONE_INTO_CGROUP;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM this is a fork. The child only makes system calls and ends; it allocates nothing, takes no
    // lock and runs no destructor.
    let child = unsafe {
        let child =
            libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) as libc::pid_t;
        if child == 0 {
            let inside = libc::setns(namespace, libc::CLONE_NEWNET) == 0;
            for _ in 0..count {
                let made =
                    if inside { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) } else { -1 };
                let answer = if made < 0 { -*libc::__errno_location() } else { made };
                libc::write(answering_fd, (&raw const answer).cast(), size_of::<i32>());
            }
            libc::_exit(0);
        }
        child
    };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let made = (0..count).map(|_| receive_socket(&mut answers)).collect();
    let mut status = 0;
    // SAFETY: `child` is our own child, waited for once. It has ended, or its next system call ends it.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
    made
}

fn receive_socket(answers: &mut io::PipeReader) -> io::Result<OwnedFd> {
    let mut answer = [0; size_of::<i32>()];
    io::Read::read_exact(answers, &mut answer)?;
    match i32::from_ne_bytes(answer) {
        // SAFETY: the child made this descriptor in the table we share with it, and nobody else knows it.
        made @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(made) }),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// `CLONE_INTO_CGROUP`, since 5.7.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
