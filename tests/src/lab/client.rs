//! Clients that ask pod servers from a place of the lab, and tell the ways in which that fails apart.

use super::network::Family;
use super::place::{Place, any_source};
use socket2::SockAddr;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a client waits unless it is told.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// What a pod server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The pod that answered.
    pub pod: String,
    /// The node it runs on.
    pub node: String,
    /// The client's address as the pod saw it.
    pub client: SocketAddr,
    /// The whole line.
    pub text: String,
}

impl Answer {
    /// Reads `hello from POD on NODE, you are ADDRESS:PORT`.
    pub fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find(|line| line.starts_with("hello from "))?;
        let (pod, rest) = line.strip_prefix("hello from ")?.split_once(" on ")?;
        let (node, rest) = rest.split_once(", you are ")?;
        let client = rest.split([' ', ',']).next()?.parse().ok()?;
        Some(Self { pod: pod.into(), node: node.into(), client, text: line.into() })
    }

    /// The client's address as the pod saw it.
    pub fn client_ip(&self) -> IpAddr {
        self.client.ip()
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// How a client failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// `ECONNREFUSED`: a reset in answer to the SYN, or a port unreachable.
    Refused,
    /// Silence.
    TimedOut,
    /// A connection that was there was reset or ended too early.
    Reset,
    /// `EHOSTUNREACH`, `ENETUNREACH`.
    Unreachable,
    /// Anything else.
    Other(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("connection refused"),
            Self::TimedOut => f.write_str("no answer (timed out)"),
            Self::Reset => f.write_str("connection reset"),
            Self::Unreachable => f.write_str("no route to host"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl Failure {
    /// Reads what [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Self {
        let all = [Self::Refused, Self::TimedOut, Self::Reset, Self::Unreachable];
        all.into_iter()
            .find(|failure| failure.to_string() == text)
            .unwrap_or_else(|| Self::Other(text.into()))
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Self::Refused,
            Some(libc::ETIMEDOUT | libc::EAGAIN | libc::EINPROGRESS) => Self::TimedOut,
            Some(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => Self::Reset,
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => Self::Unreachable,
            _ if error.kind() == io::ErrorKind::UnexpectedEof => Self::Reset,
            _ if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                Self::TimedOut
            }
            _ => Self::Other(error.to_string()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(format!("{error:#}"))
    }
}

/// The result of asking.
pub type Asked = Result<Answer, Failure>;

/// A client: where it is, how long it waits, which source address it takes.
#[derive(Clone, Debug)]
pub struct Client {
    place: Place,
    timeout: Duration,
    source: Option<SocketAddr>,
}

impl Client {
    /// A client in a place.
    pub fn at(place: &Place) -> Self {
        Self { place: place.clone(), timeout: TIMEOUT, source: None }
    }

    /// Waits this long for a connection, and for an answer.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Binds to this source first (port 0: any).
    #[must_use]
    pub fn source(mut self, source: impl Into<SocketAddr>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// A TCP connection.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> Result<Stream, Failure> {
        let to = to.into();
        let socket = self.place.tcp_socket(Family::of(to.ip()))?;
        if let Some(source) = self.source {
            bind(&socket, source)?;
        }
        Stream::connect(socket, to, self.timeout)
    }

    /// Many TCP connections; faster than one by one.
    pub fn connect_many(&self, to: impl Into<SocketAddr>, count: usize) -> Result<Vec<Stream>, Failure> {
        let to = to.into();
        let sockets = self.place.sockets(Family::of(to.ip()).domain(), libc::SOCK_STREAM, 0, count)?;
        sockets.into_iter().map(|socket| Stream::connect(socket, to, self.timeout)).collect()
    }

    /// One request on a new TCP connection.
    pub fn tcp(&self, to: impl Into<SocketAddr>) -> Asked {
        self.connect(to)?.ask()
    }

    /// One datagram on a new, connected UDP socket, and its answer.
    pub fn udp(&self, to: impl Into<SocketAddr>) -> Asked {
        let to = to.into();
        let socket = self.udp_socket(to)?;
        socket.connect(to)?;
        ask_datagram(&socket, None, self.timeout)
    }

    /// One datagram on a new UDP socket that is not connected. An answer from another address than the one that was asked is
    /// [`Failure::Other`]; a refusal cannot be seen.
    pub fn udp_unconnected(&self, to: impl Into<SocketAddr>) -> Asked {
        let to = to.into();
        ask_datagram(&self.udp_socket(to)?, Some(to), self.timeout)
    }

    /// A short datagram over IPv4 and one of so many bytes, which routers may cut up; the answer to the second.
    pub fn udp_to_cut_up(&self, to: SocketAddr, bytes: usize) -> Asked {
        let socket = self.udp_socket(to)?;
        set_pmtu_discovery(&socket, libc::IP_PMTUDISC_DONT)?;
        socket.connect(to)?;
        ask_datagram(&socket, None, self.timeout)?;
        socket.send(&vec![b'x'; bytes])?;
        let mut buffer = [0; 2048];
        let length = socket.recv(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        Answer::parse(&text).ok_or(Failure::Other(text))
    }

    /// A UDP socket that can reach an address, bound to the client's source.
    fn udp_socket(&self, to: SocketAddr) -> Result<UdpSocket, Failure> {
        let source = self.source.unwrap_or_else(|| next_source(&self.place, Family::of(to.ip())));
        Ok(self.place.udp_socket(Some(source))?)
    }
}

fn set_pmtu_discovery(socket: &UdpSocket, how: i32) -> std::io::Result<()> {
    let (value, length) = ((&raw const how).cast(), size_of::<i32>() as u32);
    // SAFETY: the value lives for the whole call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value, length)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Any address and the port after that of the place's last socket, none that the kernel gives out by itself. A flow of datagrams
/// has no end that anybody sees: a socket that got the port of an earlier one could not have the same endpoint through another
/// Service without being translated, and would hear from it in the first one's name where the socket hooks serve it. So each
/// network namespace has ports of its own, more than it uses while such a flow lives.
pub fn next_source(place: &Place, family: Family) -> SocketAddr {
    const FIRST: u16 = 9_500;
    const PORTS: u16 = 10_500;
    static USED: Mutex<BTreeMap<String, u16>> = Mutex::new(BTreeMap::new());
    let mut used = USED.lock().unwrap_or_else(PoisonError::into_inner);
    let number = used.entry(place.namespace().to_owned()).or_default();
    let mut source = any_source(family);
    source.set_port(FIRST + *number);
    *number = (*number + 1) % PORTS;
    source
}

/// Sends a datagram (to `to`, or to the peer of a connected socket) and waits for the pod server's answer to it.
pub fn ask_datagram(socket: &UdpSocket, to: Option<SocketAddr>, timeout: Duration) -> Asked {
    socket.set_read_timeout(Some(timeout))?;
    match to {
        Some(to) => socket.send_to(b"hello", to)?,
        None => socket.send(b"hello")?,
    };
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    match to {
        Some(to) if to != from => Err(Failure::Other(format!("asked {to}, answered by {from}: {text}"))),
        _ => Answer::parse(&text).ok_or(Failure::Other(text)),
    }
}

/// A TCP connection to a pod server, on which any number of requests can follow one another.
#[derive(Debug)]
pub struct Stream {
    stream: TcpStream,
}

impl Stream {
    /// Connects a socket that is not connected yet.
    pub fn connect(socket: OwnedFd, to: SocketAddr, timeout: Duration) -> Result<Self, Failure> {
        let stream = TcpStream::from(socket);
        stream.set_nonblocking(true)?;
        if let Err(error) = connect(&stream, to)
            && error.raw_os_error() != Some(libc::EINPROGRESS)
        {
            return Err(error.into());
        }
        wait_until_writable(&stream, timeout)?;
        if let Some(error) = stream.take_error()? {
            return Err(error.into());
        }
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream })
    }

    /// One request and its answer; the connection stays.
    pub fn ask(&mut self) -> Asked {
        let (_, body) = self.get("/")?;
        Answer::parse(&body).ok_or(Failure::Other(body))
    }

    /// One HTTP request: status and body.
    pub fn get(&mut self, path: &str) -> Result<(u16, String), Failure> {
        self.stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n").as_bytes())?;
        let mut read = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer)? {
                0 => return Err(Failure::Reset),
                length => read.extend_from_slice(&buffer[..length]),
            }
            if let Some(response) = response(&read) {
                return Ok(response);
            }
        }
    }

    /// One HTTP request of a server that ends the connection with its answer (HTTP/1.0), of whatever length: head and body.
    pub fn read_all(&mut self, path: &str) -> Result<String, Failure> {
        self.stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        self.stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// The connection itself.
    pub fn get_ref(&self) -> &TcpStream {
        &self.stream
    }
}

/// A whole response: its head ends with an empty line and has a `Content-Length`.
fn response(read: &[u8]) -> Option<(u16, String)> {
    let text = String::from_utf8_lossy(read);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())?;
    (body.len() >= length).then(|| (status, body[..length].to_owned()))
}

pub(crate) fn bind(socket: &impl AsFd, source: SocketAddr) -> io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(source))
}

fn connect(socket: &impl AsFd, to: SocketAddr) -> io::Result<()> {
    socket2::SockRef::from(socket).connect(&SockAddr::from(to))
}

fn wait_until_writable(socket: &impl AsFd, timeout: Duration) -> Result<(), Failure> {
    let end = Instant::now() + timeout;
    let mut poll = libc::pollfd { fd: socket.as_fd().as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis();
        // SAFETY: one `pollfd`, which outlives the call.
        match unsafe { libc::poll(&raw mut poll, 1, i32::try_from(left).unwrap_or(i32::MAX)) } {
            0 => return Err(Failure::TimedOut),
            1 => return Ok(()),
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return Err(io::Error::last_os_error().into()),
        }
    }
}

/// An address and a port, shorter to write in tests.
pub fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_tells_pod_node_and_client() {
        let answer =
            Answer::parse("hello from web-1 on node-2, you are 10.0.0.5:4242, you said: hello\n").unwrap();
        assert_eq!((answer.pod.as_str(), answer.node.as_str()), ("web-1", "node-2"));
        assert_eq!(answer.client, "10.0.0.5:4242".parse().unwrap());
    }

    #[test]
    fn a_response_is_whole_when_its_body_is() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(response(whole), Some((200, "abc".into())));
        assert_eq!(response(&whole[..whole.len() - 1]), None);
    }
}
