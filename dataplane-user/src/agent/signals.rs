//! Signals, heard from the first moment on: process 1 of a container hears none that it did not ask for, and another ends at a
//! SIGHUP that it did not ask for.

use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;

/// What the agent is told by signals.
pub(super) struct Signals {
    /// SIGTERM: end.
    pub(super) terminate: Signal,
    /// SIGINT: end.
    pub(super) interrupt: Signal,
    /// SIGHUP: audit the tables.
    pub(super) hangup: Signal,
}

impl Signals {
    /// Asks for them. What comes from here on is not lost, though it may be heard later.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

/// Ends the process at once at SIGTERM or SIGINT, until the task is aborted: while programs are loaded nobody else listens.
/// What is half done is as after a crash (C3).
///
/// # Errors
/// The kernel's.
pub(super) fn end_while_starting() -> io::Result<JoinHandle<()>> {
    let mut signals = Signals::new()?;
    Ok(tokio::spawn(async move {
        tokio::select! {
            _ = signals.terminate.recv() => {}
            _ = signals.interrupt.recv() => {}
        }
        tracing::info!("ending while starting; what was in the kernel stays");
        std::process::exit(0);
    }))
}
