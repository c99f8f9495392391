//! `sd_notify`: tells systemd, if it started this process, how far the agent is. Never fails: nobody may be listening.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What is told, after sd_notify(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The first complete snapshot is in the kernel.
    Ready,
    /// The kernel's tables are being audited, as SIGHUP asked.
    Reloading,
    /// The agent ends; what is in the kernel stays.
    Stopping,
}

impl State {
    fn text(self) -> String {
        match self {
            Self::Ready => "READY=1\nSTATUS=serving".to_owned(),
            // The protocol asks for the moment on the monotonic clock.
            Self::Reloading => format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_microseconds()),
            Self::Stopping => "STOPPING=1".to_owned(),
        }
    }
}

/// Tells whoever `NOTIFY_SOCKET` names.
pub(super) fn notify(state: State) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| {
        UnixDatagram::unbound()?.send_to_addr(state.text().as_bytes(), &address).map(drop)
    });
    if let Err(error) = sent {
        tracing::debug!("cannot notify {}: {error}", path.display());
    }
}

fn monotonic_microseconds() -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is as long as the kernel expects and outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec * 1_000_000 + now.tv_nsec / 1_000
}
