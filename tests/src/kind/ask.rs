//! `portolan-lab ask`: a client in a container, which tells what it was answered in lines that the tour reads back.

use crate::lab::{Answer, Asked, Failure, ask_datagram};
use anyhow::{Context as _, Result};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::time::{Duration, Instant};

/// What is asked, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct Question {
    /// HOST:PORT.
    target: String,
    /// Datagrams in place of connections.
    #[arg(long)]
    udp: bool,
    /// So many times.
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Milliseconds between two.
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// Milliseconds to wait for a connection, and for an answer.
    #[arg(long, default_value_t = 3000)]
    timeout: u64,
    /// Seconds after which the answers that were not yet asked for are left out; 0: none.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
}

/// What an answer that failed begins with.
const FAILED: &str = "failed: ";

/// Asks, and prints a line for each answer.
pub fn ask(question: &Question) -> Result<()> {
    let mut addresses = question.target.to_socket_addrs().with_context(|| question.target.clone())?;
    let to = addresses.next().with_context(|| format!("{} has no address", question.target))?;
    let timeout = Duration::from_millis(question.timeout);
    let end = Instant::now() + Duration::from_secs(question.seconds);
    for _ in 0..question.count {
        if question.seconds > 0 && Instant::now() > end {
            break;
        }
        let asked = if question.udp { datagram(to, timeout) } else { connection(to, timeout) };
        match asked {
            Ok(answer) => println!("{answer}"),
            Err(failure) => println!("{FAILED}{failure}"),
        }
        std::thread::sleep(Duration::from_millis(question.pause));
    }
    Ok(())
}

fn connection(to: SocketAddr, timeout: Duration) -> Asked {
    let mut stream = TcpStream::connect_timeout(&to, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Answer::parse(&text).ok_or_else(|| Failure::Other(format!("answered {text:?}")))
}

fn datagram(to: SocketAddr, timeout: Duration) -> Asked {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    ask_datagram(&socket, None, timeout)
}

/// Reads what [`ask`] printed.
pub(super) fn parse(text: &str) -> Vec<Asked> {
    text.lines()
        .map(|line| match line.strip_prefix(FAILED) {
            Some(failure) => Err(Failure::parse(failure)),
            None => Answer::parse(line).ok_or_else(|| Failure::Other(line.to_owned())),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_back() {
        let line = "hello from web-0 on node-1, you are 10.0.0.1:5, you said: hello";
        let printed = format!("{line}\n{FAILED}{}\n{FAILED}{}\n", Failure::Refused, Failure::TimedOut);
        let expected = [Ok(Answer::parse(line).unwrap()), Err(Failure::Refused), Err(Failure::TimedOut)];
        assert_eq!(parse(&printed), expected);
    }
}
