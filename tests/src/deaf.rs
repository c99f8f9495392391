//! An endpoint that is silent, as a program that hangs is: it listens, and its queue is full of connections that nobody accepts, so that the
//! kernel drops each further SYN.

use crate::lab::{Family, Place, Stream};
use anyhow::{Context as _, Result, ensure};
use socket2::SockRef;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long a connection takes at least that nobody hears.
const SILENCE: Duration = Duration::from_millis(300);
/// With a backlog of 0 there is room for one.
const MOST: usize = 4;

/// It is silent until it is dropped, and refuses then.
#[derive(Debug)]
pub struct Deaf {
    _listener: OwnedFd,
    _queue: Vec<Stream>,
}

impl Deaf {
    /// Listens in a place, and fills its own queue from there.
    ///
    /// # Errors
    /// If the address cannot be had, or the kernel goes on answering.
    pub fn listen(place: &Place, address: SocketAddr) -> Result<Self> {
        let family = Family::of(address.ip());
        let listener = place.tcp_socket(family)?;
        let socket = SockRef::from(&listener);
        socket.set_reuse_address(true)?;
        socket.bind(&address.into()).with_context(|| format!("binding {address}"))?;
        socket.listen(0)?;
        let mut queue = Vec::new();
        while let Ok(stream) = Stream::connect(place.tcp_socket(family)?, address, SILENCE) {
            ensure!(queue.len() < MOST, "{address} still answers");
            queue.push(stream);
        }
        Ok(Self { _listener: listener, _queue: queue })
    }
}
