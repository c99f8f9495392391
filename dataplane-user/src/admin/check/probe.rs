//! The two ends of a call by which a cluster is tried: in pods of the agent's own image, which `portolan check --pods` makes. A server
//! tells whoever calls which pod it is and whom it sees; a client calls and says in JSON what came of it.

use crate::config::{AskArgs, ProbeArgs};
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::time::Duration;

/// How long a client of the server may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest answer.
const LONGEST: usize = 1_024;

/// What the server says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Its node.
    pub node: String,
    /// Its pod.
    pub pod: String,
    /// The address that it sees call.
    pub client: String,
}

/// What came of calls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Those that were answered.
    pub answers: Vec<Answer>,
    /// How many were refused.
    pub refused: u32,
    /// How many nobody answered in time.
    pub timed_out: u32,
    /// What else went wrong: a name that nobody knows, no route.
    pub failed: Vec<String>,
}

/// Serves until it is ended.
///
/// # Errors
/// If the port cannot be had.
pub fn serve(args: &ProbeArgs) -> io::Result<()> {
    // An IPv6 socket takes IPv4 in as well; a node may have no IPv6.
    let ends =
        [SocketAddr::from((Ipv6Addr::UNSPECIFIED, args.port)), (Ipv4Addr::UNSPECIFIED, args.port).into()];
    let datagrams = UdpSocket::bind(&ends[..])?;
    let connections = TcpListener::bind(&ends[..])?;
    let answer = Answer { node: args.node.clone(), pod: args.pod.clone(), client: String::new() };
    let of_datagrams = answer.clone();
    std::thread::spawn(move || {
        let mut question = [0; LONGEST];
        loop {
            // An ICMP error about an earlier answer is no reason to end.
            let Ok((_, client)) = datagrams.recv_from(&mut question) else { continue };
            let _ = datagrams.send_to(&seen_by(&of_datagrams, client), client);
        }
    });
    for connection in connections.incoming() {
        let Ok(mut stream) = connection else { continue };
        let _ = stream.set_write_timeout(Some(PATIENCE));
        if let Ok(client) = stream.peer_addr() {
            let _ = stream.write_all(&seen_by(&answer, client));
        }
    }
    Ok(())
}

fn seen_by(answer: &Answer, client: SocketAddr) -> Vec<u8> {
    let answer = Answer { client: client.ip().to_canonical().to_string(), ..answer.clone() };
    serde_json::to_vec(&answer).unwrap_or_default()
}

/// Calls, one after the other.
pub fn ask(args: &AskArgs) -> Asked {
    let mut asked = Asked::default();
    let to = match args.target.to_socket_addrs().map(|mut ends| ends.next()) {
        Ok(Some(to)) => to,
        Ok(None) => {
            asked.failed.push(format!("{} has no address", args.target));
            return asked;
        }
        Err(error) => {
            asked.failed.push(format!("{}: {error}", args.target));
            return asked;
        }
    };
    let timeout = Duration::from_millis(args.timeout);
    for _ in 0..args.count {
        let answer = if args.udp { datagram(to, timeout) } else { connection(to, timeout) };
        match answer.and_then(|text| Ok(serde_json::from_slice(&text)?)) {
            Ok(answer) => asked.answers.push(answer),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => asked.refused += 1,
            Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
                asked.timed_out += 1;
            }
            Err(error) => asked.failed.push(error.to_string()),
        }
    }
    asked
}

fn connection(to: SocketAddr, timeout: Duration) -> io::Result<Vec<u8>> {
    let stream = TcpStream::connect_timeout(&to, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    let mut text = Vec::new();
    stream.take(LONGEST as u64).read_to_end(&mut text)?;
    Ok(text)
}

fn datagram(to: SocketAddr, timeout: Duration) -> io::Result<Vec<u8>> {
    let own = if to.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    };
    let socket = UdpSocket::bind(own)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect(to)?;
    socket.send(b"who are you")?;
    let mut text = vec![0; LONGEST];
    let length = socket.recv(&mut text)?;
    text.truncate(length);
    Ok(text)
}
