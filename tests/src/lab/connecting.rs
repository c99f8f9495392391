//! New connections, one after the other, while something is done to what they go through.

use super::client::{Client, Failure};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Each client asks its address on new connections, until `disturb` is done: how many there were. A panic of `disturb` is passed
/// on when the clients have ended.
///
/// # Errors
/// The first connection of a client that failed, and where to.
pub fn under_new_connections(
    calls: &[(Client, SocketAddr)],
    disturb: impl FnOnce(),
) -> Result<usize, (SocketAddr, Failure)> {
    let (end, made) = (AtomicBool::new(false), AtomicUsize::new(0));
    let connect = |(client, to): &(Client, SocketAddr)| {
        while !end.load(Ordering::Relaxed) {
            client.tcp(*to).map_err(|failure| (*to, failure))?;
            made.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let connecting: Vec<_> = calls.iter().map(|call| scope.spawn(|| connect(call))).collect();
        let disturbed = catch_unwind(AssertUnwindSafe(disturb));
        end.store(true, Ordering::Relaxed);
        let ends: Vec<_> = connecting.into_iter().map(|thread| thread.join()).collect();
        disturbed.unwrap_or_else(|panic| resume_unwind(panic));
        ends.into_iter().try_for_each(|end| end.unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    Ok(made.into_inner())
}
