//! Flows of requests and answers: one thread, edge-triggered.

use super::{Load, Mode, REQUEST, Tally, WINDOW};
use anyhow::Result;
use mio::net::{TcpStream, UdpSocket};
use mio::{Events, Interest, Poll, Registry, Token};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

/// An operation that takes longer has failed, and its flow begins anew.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often flows are looked over for that, and flows that could not begin are tried again.
const SWEEP: Duration = Duration::from_millis(50);

enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

struct Flow {
    socket: Option<Socket>,
    /// When the operation began.
    begun: Instant,
    /// Whether the request is on its way.
    sent: bool,
    /// Bytes of the answer so far.
    read: usize,
}

/// What an event made of a flow.
enum Step {
    Waits,
    Answered,
    Failed,
}

pub(super) fn run(load: &Load, tally: &mut Tally) -> Result<()> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(load.flows.max(16));
    let now = Instant::now();
    let mut flows: Vec<_> =
        (0..load.flows).map(|index| Flow::begin(load, poll.registry(), index, now, tally)).collect();
    let mut swept = now;
    loop {
        match poll.poll(&mut events, Some(SWEEP)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
        for event in &events {
            let index = event.token().0;
            let flow = &mut flows[index];
            // Of many answers under way an event tells once.
            while load.mode == Mode::Packets && flow.sent {
                let Step::Answered = flow.receive(load.mode) else { break };
                let now = Instant::now();
                tally.count(flow.begun, now);
                flow.again(now);
            }
            match flow.go_on(load.mode) {
                Step::Waits => {}
                Step::Answered => {
                    let now = Instant::now();
                    tally.count(flow.begun, now);
                    if load.mode == Mode::ConnectRequestClose {
                        flow.socket = None;
                        *flow = Flow::begin(load, poll.registry(), index, now, tally);
                    } else {
                        flow.again(now);
                    }
                }
                Step::Failed => {
                    tally.failed += 1;
                    flow.socket = None;
                }
            }
        }
        let now = Instant::now();
        if now >= tally.until {
            return Ok(());
        }
        if now - swept >= SWEEP {
            swept = now;
            sweep(&mut flows, load, poll.registry(), now, tally);
        }
    }
}

/// Begins anew what has waited too long or could not begin.
fn sweep(flows: &mut [Flow], load: &Load, registry: &Registry, now: Instant, tally: &mut Tally) {
    for (index, flow) in flows.iter_mut().enumerate() {
        if flow.socket.is_some() && now - flow.begun <= PATIENCE {
            continue;
        }
        tally.failed += u64::from(flow.socket.is_some());
        flow.socket = None;
        *flow = Flow::begin(load, registry, index, now, tally);
    }
}

fn open(load: &Load, registry: &Registry, index: usize) -> io::Result<Socket> {
    let both = Interest::READABLE | Interest::WRITABLE;
    match load.mode {
        Mode::UdpRequestResponse | Mode::Packets => {
            let any: SocketAddr = match load.to {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let mut socket = UdpSocket::bind(any)?;
            socket.connect(load.to)?;
            registry.register(&mut socket, Token(index), both)?;
            Ok(Socket::Udp(socket))
        }
        Mode::ConnectRequestClose | Mode::TcpRequestResponse | Mode::Bulk => {
            let mut stream = TcpStream::connect(load.to)?;
            if load.mode == Mode::TcpRequestResponse {
                stream.set_nodelay(true)?;
            }
            registry.register(&mut stream, Token(index), both)?;
            Ok(Socket::Tcp(stream))
        }
    }
}

impl Flow {
    fn begin(load: &Load, registry: &Registry, index: usize, begun: Instant, tally: &mut Tally) -> Self {
        let socket = open(load, registry, index).inspect_err(|_| tally.failed += 1).ok();
        Self { socket, begun, sent: false, read: 0 }
    }

    /// The next operation of a flow that stays.
    fn again(&mut self, now: Instant) {
        (self.begun, self.read) = (now, 0);
        self.sent = self.send().is_ok();
    }

    fn send(&mut self) -> io::Result<()> {
        let request = [b'r'; REQUEST];
        match &mut self.socket {
            Some(Socket::Tcp(stream)) => stream.write(&request).map(drop),
            Some(Socket::Udp(socket)) => socket.send(&request).map(drop),
            None => Err(ErrorKind::NotConnected.into()),
        }
    }

    fn go_on(&mut self, mode: Mode) -> Step {
        if self.socket.is_none() {
            return Step::Waits;
        }
        if !self.sent {
            let window = if mode == Mode::Packets { WINDOW } else { 1 };
            match (0..window).try_for_each(|_| self.send()) {
                Ok(()) => self.sent = true,
                // Not connected yet.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {}
                Err(_) => return Step::Failed,
            }
            return Step::Waits;
        }
        self.receive(mode)
    }

    fn receive(&mut self, mode: Mode) -> Step {
        let mut buffer = [0; 4 * REQUEST];
        loop {
            let read = match &mut self.socket {
                Some(Socket::Tcp(stream)) => stream.read(&mut buffer),
                Some(Socket::Udp(socket)) => socket.recv(&mut buffer),
                None => return Step::Waits,
            };
            match read {
                Ok(0) if self.read == REQUEST => return Step::Answered,
                Ok(0) => return Step::Failed,
                Ok(length) => self.read += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Step::Waits,
                Err(_) => return Step::Failed,
            }
            // The close that ends an operation of the other mode is read as an answer of no bytes.
            if mode != Mode::ConnectRequestClose && self.read >= REQUEST {
                return Step::Answered;
            }
        }
    }
}
