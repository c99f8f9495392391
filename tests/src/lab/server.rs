//! The pod server: answers over HTTP and UDP with its name and the client's address as it saw it.
//!
//! On SIGTERM it goes on serving for the time it was given, established and new connections alike, as a well-behaved pod
//! that drains; then it ends.

use anyhow::{Context, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// What a pod server is and where it listens.
#[derive(Clone, Debug, clap::Args)]
pub struct Server {
    /// The pod's name.
    #[arg(long)]
    pub pod: String,
    /// The node's name.
    #[arg(long)]
    pub node: String,
    /// Ports for HTTP.
    #[arg(long)]
    pub tcp: Vec<u16>,
    /// Ports for datagrams.
    #[arg(long)]
    pub udp: Vec<u16>,
    /// Where to listen; everywhere unless told.
    #[arg(long)]
    pub address: Vec<IpAddr>,
    /// Seconds to go on serving after SIGTERM.
    #[arg(long, default_value_t = 0.0)]
    pub drain: f64,
}

/// The line that the server prints once it listens on all its ports.
pub const READY: &str = "serving";

/// Connections that may wait to be accepted on one port.
const BACKLOG: i32 = 4096;
/// A request's head may have this many bytes.
const HEAD_LIMIT: usize = 16 * 1024;

/// Serves until SIGTERM and the time to drain.
pub fn serve(server: Server) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(run(Arc::new(server)))
}

async fn run(server: Arc<Server>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminated = signal(SignalKind::terminate())?;
    for &port in &server.tcp {
        for address in server.at(port) {
            let listener = listen(address).with_context(|| format!("TCP {address}"))?;
            tokio::spawn(accept(server.clone(), listener));
        }
    }
    for &port in &server.udp {
        for address in server.at(port) {
            let socket = datagram_socket(address).with_context(|| format!("UDP {address}"))?;
            tokio::spawn(datagrams(server.clone(), socket));
        }
    }
    println!("{READY}");
    terminated.recv().await;
    tokio::time::sleep(Duration::from_secs_f64(server.drain)).await;
    Ok(())
}

impl Server {
    /// Every address of each family unless told, on sockets of their own: so a client of IPv4 is seen by its IPv4 address.
    fn at(&self, port: u16) -> Vec<SocketAddr> {
        let any = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let addresses = if self.address.is_empty() { &any[..] } else { &self.address };
        addresses.iter().map(|address| SocketAddr::new(*address, port)).collect()
    }
}

fn socket(address: SocketAddr, kind: socket2::Type) -> std::io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket(address, socket2::Type::STREAM)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn datagram_socket(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = socket(address, socket2::Type::DGRAM)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

impl Server {
    fn greeting(&self, client: SocketAddr) -> String {
        format!("hello from {} on {}, you are {client}", self.pod, self.node)
    }
}

async fn accept(server: Arc<Server>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                tokio::spawn(connection(server.clone(), stream, client));
            }
            // Out of descriptors, or a client that is gone already.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn datagrams(server: Arc<Server>, socket: UdpSocket) {
    let mut buffer = vec![0; 65_536];
    loop {
        // An error here is an ICMP error about an earlier answer.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let said = String::from_utf8_lossy(&buffer[..length.min(64)]).into_owned();
        let answer = format!("{}, you said: {}\n", server.greeting(client), said.trim_end());
        let _ = socket.send_to(answer.as_bytes(), client).await;
    }
}

/// One connection: requests until the client closes it or asks to.
async fn connection(server: Arc<Server>, stream: TcpStream, client: SocketAddr) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    while let Some((path, close)) = request(&mut stream).await? {
        let path = path.split('?').next().unwrap_or_default();
        if path == "/stream" {
            return ticks(&server, stream.into_inner(), client).await;
        }
        let (status, body) = match path {
            "/" => ("200 OK", format!("{}\n", server.greeting(client))),
            "/name" => ("200 OK", format!("{}\n", server.pod)),
            "/node" => ("200 OK", format!("{}\n", server.node)),
            _ => ("404 Not Found", "there are /, /name, /node and /stream\n".into()),
        };
        let connection = if close { "close" } else { "keep-alive" };
        let response = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n{body}",
            body.len()
        );
        stream.get_mut().write_all(response.as_bytes()).await?;
        if close {
            break;
        }
    }
    stream.get_mut().shutdown().await
}

/// The next request's path, and whether the client wants the connection closed; `None` at its end.
async fn request(stream: &mut BufReader<TcpStream>) -> std::io::Result<Option<(String, bool)>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
    let mut close = line.contains("HTTP/1.0");
    let mut read = line.len();
    loop {
        line.clear();
        read += stream.read_line(&mut line).await?;
        if line.trim().is_empty() || read > HEAD_LIMIT {
            return Ok(Some((path, close)));
        }
        close |= line.to_ascii_lowercase().starts_with("connection: close");
    }
}

/// A line every 100 ms for as long as both ends live.
async fn ticks(server: &Server, mut stream: TcpStream, client: SocketAddr) -> std::io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n").await?;
    for tick in 1_u64.. {
        stream.write_all(format!("{}, tick {tick}\n", server.greeting(client)).as_bytes()).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
