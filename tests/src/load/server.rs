//! The server of the load tool: one thread, edge-triggered, with a port for each way to be used.

use super::{Mode, REQUEST};
use anyhow::{Context, Result};
use mio::event::Source;
use mio::net::{TcpListener, TcpStream, UdpSocket};
use mio::{Events, Interest, Poll, Token};
use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// The ports of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// TCP and UDP: what is read is sent back.
    pub echo: u16,
    /// The UDP one of it; the same number, unless the kernel chose.
    pub datagrams: u16,
    /// TCP: one request is sent back, then the connection is closed.
    pub close: u16,
    /// TCP: what is read is forgotten.
    pub discard: u16,
    /// TCP: each request is answered by [`ANSWER`], whatever it says.
    pub answer: u16,
    /// TCP: the same, after [`WORK`].
    pub work: u16,
}

/// How long the server's CPU works for a request, where it does.
pub const WORK: Duration = Duration::from_micros(50);

/// An answer as long as a request, and one that an HTTP client understands.
pub const ANSWER: &[u8; REQUEST] =
    b"HTTP/1.1 200 OK\r\nContent-Length: 25\r\n\r\n.....................\r\n\r\n";
/// The same from a server that closes the connection then.
pub const CLOSING_ANSWER: &[u8; REQUEST] =
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 7\r\n\r\n.......";

impl Ports {
    /// Five ports from `first` on.
    pub fn from(first: u16) -> Self {
        let [close, discard, answer, work] = [1, 2, 3, 4].map(|next| first + next);
        Self { echo: first, datagrams: first, close, discard, answer, work }
    }

    /// Whichever are free.
    const ANY: Self = Self { echo: 0, datagrams: 0, close: 0, discard: 0, answer: 0, work: 0 };

    /// The port for a mode.
    pub fn of(&self, mode: Mode) -> u16 {
        match mode {
            Mode::ConnectRequestClose => self.close,
            Mode::TcpRequestResponse => self.echo,
            Mode::UdpRequestResponse | Mode::Packets => self.datagrams,
            Mode::Bulk => self.discard,
        }
    }
}

/// What is done with a connection.
#[derive(Clone, Copy)]
enum Kind {
    Echo,
    Close,
    Discard,
    Answer,
    Work,
}

struct Connection {
    stream: TcpStream,
    kind: Kind,
    /// Bytes of the request so far.
    read: usize,
}

/// A server that listens.
pub struct Server {
    poll: Poll,
    listeners: [(TcpListener, Kind); 5],
    datagrams: UdpSocket,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    buffer: Vec<u8>,
}

/// The token of the UDP socket; below it are the listeners.
const DATAGRAMS: usize = 5;
/// The token of the first connection.
const CONNECTIONS: usize = 6;
/// Bytes that are read at once.
const BUFFER: usize = 256 * 1024;

impl Server {
    /// Listens on [`Ports::from`] the first port, or where the kernel likes.
    ///
    /// # Errors
    /// If a port is taken.
    pub fn bind(address: IpAddr, first: Option<u16>) -> Result<Self> {
        let ports = first.map_or(Ports::ANY, Ports::from);
        let poll = Poll::new()?;
        let listen = |port: u16, kind| {
            let listener = TcpListener::bind((address, port).into());
            anyhow::Ok((listener.with_context(|| format!("TCP port {port}"))?, kind))
        };
        let mut listeners = [
            listen(ports.echo, Kind::Echo)?,
            listen(ports.close, Kind::Close)?,
            listen(ports.discard, Kind::Discard)?,
            listen(ports.answer, Kind::Answer)?,
            listen(ports.work, Kind::Work)?,
        ];
        let mut datagrams = UdpSocket::bind((address, ports.datagrams).into())
            .with_context(|| format!("UDP port {}", ports.datagrams))?;
        let register = |source: &mut dyn Source, token| {
            source.register(poll.registry(), Token(token), Interest::READABLE)
        };
        for (token, (listener, _)) in listeners.iter_mut().enumerate() {
            register(listener, token)?;
        }
        register(&mut datagrams, DATAGRAMS)?;
        let (connections, free) = (Vec::new(), Vec::new());
        Ok(Self { poll, listeners, datagrams, connections, free, buffer: vec![0; BUFFER] })
    }

    /// Where it listens.
    pub fn ports(&self) -> Ports {
        let tcp = |index: usize| self.listeners[index].0.local_addr().map_or(0, |address| address.port());
        let datagrams = self.datagrams.local_addr().map_or(0, |address| address.port());
        Ports { echo: tcp(0), close: tcp(1), discard: tcp(2), answer: tcp(3), work: tcp(4), datagrams }
    }

    /// Serves until told to stop, which is asked several times a second.
    ///
    /// # Errors
    /// If the kernel refuses to wait.
    pub fn serve(&mut self, stop: impl Fn() -> bool) -> Result<()> {
        let mut events = Events::with_capacity(1024);
        while !stop() {
            match self.poll.poll(&mut events, Some(Duration::from_millis(100))) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
            for event in &events {
                match event.token().0 {
                    DATAGRAMS => self.answer_datagrams(),
                    token if token < DATAGRAMS => self.accept(token),
                    token => self.serve_connection(token - CONNECTIONS),
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: usize) {
        let (listener, kind) = &self.listeners[listener];
        while let Ok((mut stream, _)) = listener.accept() {
            let index = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let _ = stream.set_nodelay(true);
            let token = Token(index + CONNECTIONS);
            if self.poll.registry().register(&mut stream, token, Interest::READABLE).is_ok() {
                self.connections[index] = Some(Connection { stream, kind: *kind, read: 0 });
            } else {
                self.free.push(index);
            }
        }
    }

    fn answer_datagrams(&mut self) {
        loop {
            match self.datagrams.recv_from(&mut self.buffer) {
                Ok((length, from)) => {
                    let _ = self.datagrams.send_to(&self.buffer[..length], from);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // An ICMP error about an earlier answer.
                Err(_) => {}
            }
        }
    }

    fn serve_connection(&mut self, index: usize) {
        // An event may be about a connection that an earlier one of the same round ended.
        let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else { return };
        if !connection.serve(&mut self.buffer) {
            self.connections[index] = None;
            self.free.push(index);
        }
    }
}

impl Connection {
    /// Reads what is there; whether the connection goes on.
    fn serve(&mut self, buffer: &mut [u8]) -> bool {
        loop {
            let length = match self.stream.read(buffer) {
                Ok(0) => return false,
                Ok(length) => length,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            };
            match self.kind {
                Kind::Discard => continue,
                // Requests are far smaller than what a socket takes at once, so an answer is never cut.
                Kind::Echo if self.stream.write_all(&buffer[..length]).is_err() => return false,
                Kind::Echo => {}
                Kind::Answer | Kind::Work => {
                    self.read += length;
                    while self.read >= REQUEST {
                        self.read -= REQUEST;
                        if matches!(self.kind, Kind::Work) {
                            work();
                        }
                        if self.stream.write_all(ANSWER).is_err() {
                            return false;
                        }
                    }
                }
                Kind::Close => {
                    self.read += length;
                    if self.read >= REQUEST {
                        let _ = self.stream.write_all(&buffer[..REQUEST]);
                        return false;
                    }
                }
            }
            // A short read has emptied the socket: more is another event.
            if length < buffer.len() {
                return true;
            }
        }
    }
}

/// Keeps the CPU busy for [`WORK`].
fn work() {
    let begun = Instant::now();
    while begun.elapsed() < WORK {
        std::hint::spin_loop();
    }
}
