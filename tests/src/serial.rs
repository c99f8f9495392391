//! Servers that answer one connection after the other and take their time for each, and clients that come at a fixed rate whatever the
//! servers do: what tells algorithms of choice apart. A server that is sent more than it can do has a queue that grows.

use crate::lab::{Family, Place, Stream};
use anyhow::{Context as _, Result};
use socket2::SockRef;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a client waits for its connection, and for its answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Connections that may wait for a server.
const BACKLOG: i32 = 4_096;
/// Time between two looks whether a server is to end.
const LOOK: Duration = Duration::from_millis(1);

/// A server, until it is dropped.
#[derive(Debug)]
pub struct Server {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens in a place, and answers each connection with a name after so much work.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub fn start(place: &Place, address: SocketAddr, name: &str, work: Duration) -> Result<Self> {
        let socket = place.tcp_socket(Family::of(address.ip()))?;
        let options = SockRef::from(&socket);
        options.set_reuse_address(true)?;
        options.bind(&address.into()).with_context(|| format!("binding {address}"))?;
        options.listen(BACKLOG)?;
        let listener = TcpListener::from(socket);
        listener.set_nonblocking(true)?;
        let ends = Arc::new(AtomicBool::new(false));
        let (told, name) = (ends.clone(), name.to_owned());
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, _)) => {
                        std::thread::sleep(work);
                        // A client that has gone meanwhile misses nothing.
                        let _ = stream.write_all(name.as_bytes());
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(LOOK),
                    Err(_) => return,
                }
            }
        });
        Ok(Self { ends, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What clients met.
#[derive(Clone, Debug, Default)]
pub struct Met {
    /// How long each took from the moment at which it was to come, the shortest first.
    pub times: Vec<Duration>,
    /// How many each server answered.
    pub answered: BTreeMap<String, usize>,
    /// How many were not answered.
    pub failed: usize,
}

impl Met {
    /// The time that so many in a thousand were not longer than.
    pub fn quantile(&self, thousandths: usize) -> Duration {
        quantile(&self.times, thousandths)
    }
}

/// Of times in their order, the shortest first, the one that so many in a thousand are not longer than.
pub(crate) fn quantile(times: &[Duration], thousandths: usize) -> Duration {
    let at = (times.len() * thousandths).div_ceil(1_000).saturating_sub(1);
    times.get(at).copied().unwrap_or_default()
}

/// Has `count` clients come from a place, `rate` in a second, each on a connection of its own.
///
/// # Errors
/// If there are no sockets to be had.
pub fn clients(place: &Place, to: SocketAddr, count: u32, rate: f64) -> Result<Met> {
    let family = Family::of(to.ip());
    let sockets = place.sockets(family.domain(), libc::SOCK_STREAM, 0, count as usize)?;
    let begun = Instant::now();
    let mut threads = Vec::new();
    for (number, socket) in sockets.into_iter().enumerate() {
        let due = begun + Duration::from_secs_f64(number as f64 / rate);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        threads.push(std::thread::spawn(move || -> Option<(Duration, String)> {
            let stream = Stream::connect(socket, to, PATIENCE).ok()?;
            let mut name = String::new();
            stream.get_ref().read_to_string(&mut name).ok()?;
            (!name.is_empty()).then(|| (due.elapsed(), name))
        }));
    }
    let mut met = Met::default();
    for thread in threads {
        match thread.join().ok().flatten() {
            Some((time, name)) => {
                met.times.push(time);
                *met.answered.entry(name).or_default() += 1;
            }
            None => met.failed += 1,
        }
    }
    met.times.sort_unstable();
    Ok(met)
}

/// Two servers of which one takes ten times as long, in these places.
///
/// # Errors
/// If a port cannot be had.
pub fn unequal(places: [(&Place, IpAddr, &str); 2], port: u16) -> Result<[Server; 2]> {
    let [quick, slow] = places;
    let start = |(place, address, name): (&Place, IpAddr, &str), work| {
        Server::start(place, SocketAddr::new(address, port), name, work)
    };
    Ok([start(quick, QUICK)?, start(slow, SLOW)?])
}

/// How long the two take for a connection.
pub const QUICK: Duration = Duration::from_millis(10);
/// The same of the other.
pub const SLOW: Duration = Duration::from_millis(100);
/// How many clients come in a second: half of them are twice as many as the slow one can serve.
pub const RATE: f64 = 40.0;
