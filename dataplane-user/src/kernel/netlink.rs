//! One question to the kernel over netlink, and its answer, without a runtime.

use netlink_packet_core::{NetlinkDeserializable, NetlinkSerializable};
use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_sys::{Socket, SocketAddr};
use std::io;
use std::time::{Duration, Instant};

/// Room for one answer of the kernel, which packs a dump into pages.
const ANSWER: usize = 64 * 1024;
/// The kernel answers such requests at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// A socket to one of the kernel's netlink protocols.
pub(super) fn connect(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends one request.
pub(super) fn send<M>(netlink: &Socket, flags: u16, message: M) -> io::Result<()>
where
    M: NetlinkSerializable + Into<NetlinkPayload<M>>,
{
    send_all(netlink, vec![(flags, message)])
}

/// Sends several at once, each with its flags.
pub(super) fn send_all<M>(netlink: &Socket, messages: Vec<(u16, M)>) -> io::Result<()>
where
    M: NetlinkSerializable + Into<NetlinkPayload<M>>,
{
    let mut bytes = Vec::new();
    for (flags, message) in messages {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, message.into());
        message.finalize();
        let start = bytes.len();
        // Each message is padded to four bytes.
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..start + message.buffer_len()]);
    }
    netlink.send(&bytes, 0).map(drop)
}

/// The messages of one answer.
pub(super) fn receive<M: NetlinkDeserializable>(netlink: &Socket) -> io::Result<Vec<NetlinkPayload<M>>> {
    wait_readable(netlink)?;
    let mut buffer = Vec::with_capacity(ANSWER);
    let length = netlink.recv(&mut buffer, 0)?;
    let mut rest = &buffer[..length];
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
        // As above.
        let length = (message.header.length as usize).next_multiple_of(4);
        rest = rest.get(length..).unwrap_or_default();
        messages.push(message.payload);
    }
    Ok(messages)
}

fn wait_readable(netlink: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let mut poll = libc::pollfd { fd: netlink.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let end = Instant::now() + PATIENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis() as i32;
        // SAFETY: one valid `pollfd` for the whole call.
        match unsafe { libc::poll(&mut poll, 1, left) } {
            0 => return Err(io::ErrorKind::TimedOut.into()),
            ready if ready > 0 => return Ok(()),
            _ => {
                let error = io::Error::last_os_error();
                // A signal, which is somebody else's.
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
