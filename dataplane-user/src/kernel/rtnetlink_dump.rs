//! Lists of the kernel over rtnetlink, asked for again where they changed while the kernel wrote them.
//!
//! A dump is written in parts. If something comes or goes between two of them, what stands behind it may be missing, and
//! the kernel says so by `NLM_F_DUMP_INTR`. On a node whose pods come and go that is often.
#![expect(clippy::wildcard_enum_match_arm, reason = "netlink's enums are not ours and grow with the kernel")]

use super::links::LinksError;
use futures::StreamExt as _;
use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::pin;

/// How often an interrupted dump is begun anew. What is there all the time is in at least one of so many.
const ATTEMPTS: usize = 10;

/// Asks for all there is of a kind, and gives each to `take`; some of them twice or more, if the dump was interrupted.
///
/// What went meanwhile may be among them. Who has subscribed before is told so afterwards.
///
/// # Errors
/// If the kernel does not answer.
pub(super) async fn each(
    handle: &Handle,
    what: &'static str,
    question: RouteNetlinkMessage,
    mut take: impl FnMut(RouteNetlinkMessage),
) -> Result<(), LinksError> {
    for _ in 0..ATTEMPTS {
        if once(handle, what, question.clone(), &mut take).await? {
            return Ok(());
        }
    }
    tracing::debug!("the kernel's list of {what} changed {ATTEMPTS} times while it was read");
    Ok(())
}

/// Gives back whether nothing came or went meanwhile.
async fn once(
    handle: &Handle,
    what: &'static str,
    question: RouteNetlinkMessage,
    take: &mut impl FnMut(RouteNetlinkMessage),
) -> Result<bool, LinksError> {
    let failed = |source| LinksError::Dump { what, source };
    let mut message = NetlinkMessage::from(question);
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut answers = pin!(handle.clone().request(message).map_err(failed)?);
    let mut is_whole = true;
    while let Some(answer) = answers.next().await {
        is_whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => take(message),
            NetlinkPayload::Error(error) => return Err(failed(rtnetlink::Error::NetlinkError(error))),
            _ => {}
        }
    }
    Ok(is_whole)
}

/// Room for the messages of a subscription, in bytes, beyond what `net.core.rmem_max` allows: the agent has `CAP_NET_ADMIN`.
///
/// # Errors
/// The kernel's.
pub(super) fn make_room(socket: &impl AsRawFd, bytes: libc::c_int) -> io::Result<()> {
    match set_buffer(socket.as_raw_fd(), libc::SO_RCVBUFFORCE, bytes) {
        // In a user namespace: as much as everybody may have.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            set_buffer(socket.as_raw_fd(), libc::SO_RCVBUF, bytes)
        }
        done => done,
    }
}

fn set_buffer(socket: RawFd, option: libc::c_int, bytes: libc::c_int) -> io::Result<()> {
    let length = size_of_val(&bytes) as libc::socklen_t;
    // SAFETY: the option is an `int`, and `bytes` outlives the call.
    let result =
        unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, option, (&raw const bytes).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
