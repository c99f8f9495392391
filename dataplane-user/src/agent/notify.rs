//! Tells systemd, if it started this process, how far the agent is (sd_notify(3)). Never fails: nobody may be listening.

use sd_notify::NotifyState;

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The first complete snapshot is in the kernel.
    Ready,
    /// The kernel's tables are being audited, as SIGHUP asked.
    Reloading,
    /// The agent is alive (H5): without this systemd starts it anew after `WatchdogSec=`.
    Alive,
    /// The agent ends; what is in the kernel stays.
    Stopping,
}

/// Tells whoever `NOTIFY_SOCKET` names.
pub(super) fn notify(state: State) {
    let sent = match state {
        State::Ready => sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("serving")]),
        // The protocol asks for the moment on the monotonic clock.
        State::Reloading => NotifyState::monotonic_usec_now()
            .and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now])),
        State::Alive => sd_notify::notify(&[NotifyState::Watchdog]),
        State::Stopping => sd_notify::notify(&[NotifyState::Stopping]),
    };
    if let Err(error) = sent {
        tracing::debug!("cannot notify systemd: {error}");
    }
}

/// Whether systemd waits for [`State::Alive`].
pub(super) fn is_watched() -> bool {
    sd_notify::watchdog_enabled().is_some()
}
