//! Servers in pods: they accept connections and say nothing, and send datagrams back. One thread for all of them.

use crate::lab::{Family, Pod, at};
use anyhow::{Context as _, Result};
use mio::net::{TcpListener, TcpStream, UdpSocket};
use mio::{Events, Interest, Poll, Token};
use socket2::SockRef;
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const BACKLOG: i32 = 4_096;
/// Connections that are held; the oldest is closed when there is one more. Its client has gone by then.
const HELD: usize = 512;
/// Time between two looks whether they are to end.
const LOOK: Duration = Duration::from_millis(50);

/// Servers, until they are dropped.
#[derive(Debug)]
pub(crate) struct Servers {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Servers {
    /// Listens in pods, by TCP and by UDP, each at its ports.
    pub(crate) fn start(pods: &[(&Pod, &[u16])]) -> Result<Self> {
        let poll = Poll::new()?;
        let (mut listeners, mut sockets) = (Vec::new(), Vec::new());
        for (pod, ports) in pods {
            for port in *ports {
                let address = at(pod.address(), *port);
                let token = |number: usize| Token(number * 2);
                let mut listener = listen(pod, address).with_context(|| format!("binding {address}"))?;
                poll.registry().register(&mut listener, token(listeners.len()), Interest::READABLE)?;
                listeners.push(listener);
                let socket = pod.place().udp_socket(Some(address))?;
                socket.set_nonblocking(true)?;
                let mut socket = UdpSocket::from_std(socket);
                let number = Token(token(sockets.len()).0 + 1);
                poll.registry().register(&mut socket, number, Interest::READABLE)?;
                sockets.push(socket);
            }
        }
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        let thread = std::thread::spawn(move || serve(poll, &listeners, &sockets, &told));
        Ok(Self { ends, thread: Some(thread) })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(pod: &Pod, address: SocketAddr) -> Result<TcpListener> {
    let socket = pod.place().tcp_socket(Family::of(address.ip()))?;
    let options = SockRef::from(&socket);
    options.set_reuse_address(true)?;
    options.bind(&address.into())?;
    options.listen(BACKLOG)?;
    let listener = StdListener::from(socket);
    listener.set_nonblocking(true)?;
    Ok(TcpListener::from_std(listener))
}

fn serve(mut poll: Poll, listeners: &[TcpListener], sockets: &[UdpSocket], ends: &AtomicBool) {
    let (mut events, mut held) = (Events::with_capacity(256), VecDeque::<TcpStream>::new());
    let mut buffer = [0; 2_048];
    while !ends.load(Ordering::Relaxed) {
        match poll.poll(&mut events, Some(LOOK)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return,
            Ok(()) | Err(_) => {}
        }
        for event in &events {
            let (number, by_udp) = (event.token().0 / 2, event.token().0 % 2 == 1);
            // A client that has gone meanwhile misses nothing.
            if by_udp {
                while let Ok((length, from)) = sockets[number].recv_from(&mut buffer) {
                    let _ = sockets[number].send_to(&buffer[..length], from);
                }
                continue;
            }
            loop {
                match listeners[number].accept() {
                    Ok((stream, _)) => held.push_back(stream),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // One that was reset in the queue; the next may be there.
                    Err(_) => {}
                }
            }
            held.drain(..held.len().saturating_sub(HELD));
        }
    }
}
