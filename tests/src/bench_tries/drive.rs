//! Clients at a fixed rate, many of them at once, whatever becomes of each: one thread, which connects or asks and notes how long that took.

use crate::lab::{Failure, Place};
use crate::serial;
use anyhow::{Context as _, Result};
use mio::net::{TcpStream, UdpSocket};
use mio::{Events, Interest, Poll, Registry, Token};
use socket2::SockRef;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// Clients that wait at the same time at most; who comes when so many do, comes later.
const MOST: usize = 8_192;
/// Clients that begin between two looks at those who wait: a machine that was late does not make up for it at their cost.
const AT_ONCE: usize = 32;
/// The longest time without a look at those who wait.
const LOOK: Duration = Duration::from_millis(5);
/// Each question comes from a port of its own, so long as there are any.
const FIRST_PORT: u32 = 10_000;
const PORTS: u32 = 50_000;
const QUESTION: &[u8] = b"hello";

/// Who comes, by one protocol.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clients {
    pub(crate) by_udp: bool,
    /// How many come to each target.
    pub(crate) count: u32,
    /// How many come in a second, to all targets together.
    pub(crate) rate: f64,
    /// How long each waits.
    pub(crate) patience: Duration,
    /// How its connection ends.
    pub(crate) end: End,
    /// How many questions there were before, whose ports are not to be used again.
    pub(crate) asked: u32,
}

/// How a client ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By a reset, which leaves its port to others.
    Reset,
    /// By turns by a reset and by a FIN.
    ByTurns,
}

/// What the clients of one target met.
#[derive(Clone, Debug, Default)]
pub(crate) struct Met {
    /// How long each took that was served, the shortest first.
    pub(crate) times: Vec<Duration>,
    pub(crate) refused: u32,
    /// Those that heard nothing in their time.
    pub(crate) silent: u32,
    /// Those that failed otherwise.
    pub(crate) other: u32,
}

/// What all of them met, in the order of the targets, in how many seconds, and at what cost of CPU.
#[derive(Clone, Debug)]
pub(crate) struct Driven {
    pub(crate) met: Vec<Met>,
    pub(crate) seconds: f64,
    /// Seconds of CPU time of the thread that drives. What the kernel does about a packet between namespaces it mostly does there.
    pub(crate) cpu: f64,
}

impl Met {
    /// The time that so many in a thousand of those who were served were not longer than, in milliseconds.
    pub(crate) fn quantile(&self, thousandths: usize) -> f64 {
        serial::quantile(&self.times, thousandths).as_secs_f64() * 1e3
    }

    fn count(&mut self, outcome: Result<Duration, Failure>) {
        match outcome {
            Ok(time) => self.times.push(time),
            Err(Failure::Refused) => self.refused += 1,
            Err(Failure::TimedOut) => self.silent += 1,
            Err(Failure::Reset | Failure::Unreachable | Failure::Other(_)) => self.other += 1,
        }
    }
}

/// Has clients come from a place, to the targets by turns: so all have the same machine.
///
/// # Errors
/// If there is no thread or poll to be had. What becomes of a client is no error.
pub(crate) fn drive(place: &Place, targets: &[SocketAddr], clients: Clients) -> Result<Driven> {
    place.enter(|| Driver::new(targets, clients)?.run()).context("driving clients")?
}

enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

/// One that waits.
struct Client {
    socket: Socket,
    number: u32,
    begun: Instant,
}

struct Driver<'a> {
    targets: &'a [SocketAddr],
    clients: Clients,
    poll: Poll,
    waiting: Vec<Option<Client>>,
    free: Vec<usize>,
    /// In the order in which they began: where each is, and its number.
    order: VecDeque<(usize, u32)>,
    next: u32,
    met: Vec<Met>,
}

impl<'a> Driver<'a> {
    fn new(targets: &'a [SocketAddr], clients: Clients) -> Result<Self> {
        Ok(Self {
            targets,
            clients,
            poll: Poll::new()?,
            waiting: (0..MOST).map(|_| None).collect(),
            free: (0..MOST).rev().collect(),
            order: VecDeque::new(),
            next: 0,
            met: vec![Met::default(); targets.len()],
        })
    }

    fn run(mut self) -> Result<Driven> {
        let all = self.clients.count * self.targets.len() as u32;
        let mut events = Events::with_capacity(1_024);
        let (begun, cpu) = (Instant::now(), thread_time());
        while self.next < all || self.free.len() < MOST {
            let mut room = AT_ONCE;
            while room > 0
                && self.next < all
                && begun.elapsed().as_secs_f64() * self.clients.rate >= f64::from(self.next)
                && let Some(at) = self.free.pop()
            {
                self.begin(at);
                room -= 1;
            }
            let due = begun + Duration::from_secs_f64(f64::from(self.next) / self.clients.rate);
            let wait = due.saturating_duration_since(Instant::now()).min(LOOK);
            match self.poll.poll(&mut events, Some(wait)) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
            for event in &events {
                self.hear(event.token().0);
            }
            self.give_up();
        }
        for met in &mut self.met {
            met.times.sort_unstable();
        }
        Ok(Driven { met: self.met, seconds: begun.elapsed().as_secs_f64(), cpu: thread_time() - cpu })
    }

    fn begin(&mut self, at: usize) {
        let (number, begun) = (self.next, Instant::now());
        self.next += 1;
        let to = self.targets[number as usize % self.targets.len()];
        match open(self.poll.registry(), at, to, self.clients, number / self.targets.len() as u32, number) {
            Ok(socket) => {
                self.waiting[at] = Some(Client { socket, number, begun });
                self.order.push_back((at, number));
            }
            Err(error) => {
                self.free.push(at);
                self.end(number, Err(error.into()));
            }
        }
    }

    fn hear(&mut self, at: usize) {
        let Some(client) = &self.waiting[at] else { return };
        let outcome = match &client.socket {
            Socket::Tcp(stream) => connected(stream),
            Socket::Udp(socket) => answered(socket),
        };
        if let Some(outcome) = outcome {
            let (number, time) = (client.number, client.begun.elapsed());
            self.waiting[at] = None;
            self.free.push(at);
            self.end(number, outcome.map(|()| time).map_err(Failure::from));
        }
    }

    /// Whose time is over. Before that each is heard once more: this thread may have been late, and not the answer.
    fn give_up(&mut self) {
        while let Some(&(at, number)) = self.order.front() {
            if let Some(client) = self.waiting[at].as_ref().filter(|client| client.number == number) {
                if client.begun.elapsed() < self.clients.patience {
                    return;
                }
                self.hear(at);
                // None if it was heard: nobody has come to its place meanwhile.
                if self.waiting[at].take().is_some() {
                    self.free.push(at);
                    self.end(number, Err(Failure::TimedOut));
                }
            }
            self.order.pop_front();
        }
    }

    fn end(&mut self, number: u32, outcome: Result<Duration, Failure>) {
        self.met[number as usize % self.targets.len()].count(outcome);
    }
}

fn open(
    registry: &Registry,
    at: usize,
    to: SocketAddr,
    clients: Clients,
    turn: u32,
    number: u32,
) -> io::Result<Socket> {
    if clients.by_udp {
        let port = (FIRST_PORT + (clients.asked + number) % PORTS) as u16;
        let mut socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port).into())?;
        socket.connect(to)?;
        registry.register(&mut socket, Token(at), Interest::READABLE)?;
        socket.send(QUESTION)?;
        return Ok(Socket::Udp(socket));
    }
    let mut stream = TcpStream::connect(to)?;
    let is_reset = match clients.end {
        End::Reset => true,
        End::ByTurns => turn.is_multiple_of(2),
    };
    if is_reset {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    registry.register(&mut stream, Token(at), Interest::WRITABLE)?;
    Ok(Socket::Tcp(stream))
}

/// What became of a connection, if anything.
fn connected(stream: &TcpStream) -> Option<io::Result<()>> {
    match stream.take_error() {
        Err(error) | Ok(Some(error)) => return Some(Err(error)),
        Ok(None) => {}
    }
    match stream.peer_addr() {
        Ok(_) => Some(Ok(())),
        Err(error) if error.kind() == ErrorKind::NotConnected => None,
        Err(error) => Some(Err(error)),
    }
}

/// What became of a question, if anything.
fn answered(socket: &UdpSocket) -> Option<io::Result<()>> {
    let mut buffer = [0; 64];
    match socket.recv(&mut buffer) {
        Ok(_) => Some(Ok(())),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => Some(Err(error)),
    }
}

/// Seconds of CPU time that this thread has had.
fn thread_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`, which lives for the whole call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
