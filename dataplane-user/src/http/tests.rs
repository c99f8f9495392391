use super::client::{free_port, get};
use super::*;
use std::time::Instant;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// How long a kubelet waits for its probe's answer unless it is told otherwise.
const PROBE: Duration = Duration::from_secs(1);

fn pages() -> Pages {
    at_once(|path| match path {
        "/here" => Page::text(200, "yes\n"),
        "/large" => Page::text(200, "x".repeat(64 << 20)),
        _ => Page::not_found(),
    })
}

/// A server on loopback addresses, ended with the test.
struct Server {
    address: SocketAddr,
    gate: Gate,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    fn start() -> Self {
        Self::behind(Gate::default())
    }

    fn behind(gate: Gate) -> Self {
        let listener = bind(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(answer_all(listener, gate.clone(), pages()));
        Self { address, gate, task }
    }

    /// A probe, as a kubelet sends it.
    async fn is_alive(&self) {
        let begun = Instant::now();
        let answer = tokio::time::timeout(PROBE, get(self.address, "/here")).await;
        assert_eq!(answer.expect("no answer within a second").status, 200);
        assert!(begun.elapsed() < PROBE, "a second attempt was needed");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection from another address of this machine.
async fn connect(from: [u8; 4], to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    socket.connect(to).await
}

/// Raises the limit of open files to what the machine allows; gives back how many that are.
fn allow_files() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a whole `rlimit` that outlives both calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max.min(65_536);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    limit.rlim_cur
}

/// H3
#[tokio::test]
async fn a_page_is_served_by_its_path_on_both_families() {
    let port = free_port();
    let server = tokio::spawn(serve("tests", ([0, 0, 0, 0], port).into(), Gate::default(), pages()));
    for host in ["127.0.0.1", "::1"] {
        let address = SocketAddr::new(host.parse().unwrap(), port);
        let answer = get(address, "/here").await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "yes\n"));
        assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(get(address, "/there").await.status, 404);
    }
    server.abort();
}

#[test]
fn an_address_that_is_no_wildcard_is_of_one_family() {
    let address: SocketAddr = "192.0.2.1:80".parse().unwrap();
    assert_eq!(both_families(address), [address]);
    let any: SocketAddr = "[::]:80".parse().unwrap();
    assert_eq!(both_families(any), [any, "0.0.0.0:80".parse().unwrap()]);
}

/// H4
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_connections_keep_no_probe_waiting() {
    let server = Server::start();
    // The client's end and the few that the server has open, beside what other tests have.
    let wanted = (allow_files() as usize).saturating_sub(2_000).min(10_000);
    assert!(wanted >= 1_000, "this machine allows too few open files for the test to say anything");
    let mut idle = Vec::with_capacity(wanted);
    while idle.len() < wanted {
        for _ in 0..500 {
            idle.push(connect([127, 0, 0, 2], server.address).await.unwrap());
        }
        server.is_alive().await;
        assert!(server.gate.open() <= 256);
    }
    // One that was connected all the time, among them, has been closed; a client with few has not.
    let mut first = idle.swap_remove(0);
    assert!(matches!(first.read(&mut [0]).await, Ok(0) | Err(_)));
}

/// H4
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_send_their_headers_byte_by_byte_keep_no_probe_waiting() {
    let server = Server::start();
    let mut slow = tokio::task::JoinSet::new();
    for number in 0..400 {
        let (from, to) = ([127, 0, 1, (number % 40) as u8], server.address);
        slow.spawn(async move {
            let Ok(mut stream) = connect(from, to).await else { return };
            for byte in b"GET /here HTTP/1.1\r\nHost: x\r\n".iter().cycle() {
                if stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
    }
    for _ in 0..20 {
        server.is_alive().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // None of them lasts, however steadily it sends.
    let all_gone = async { while slow.join_next().await.is_some() {} };
    tokio::time::timeout(HEADERS_WITHIN * 2, all_gone).await.expect("a slow client is never closed");
}

/// H4
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_without_end_are_cut_off() {
    let server = Server::start();
    let mut greedy = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let to = server.address;
        greedy.spawn(async move {
            let mut stream = connect([127, 0, 0, 2], to).await.unwrap();
            stream.write_all(b"GET /here HTTP/1.1\r\nX: ").await.unwrap();
            let mut sent = 0;
            while sent < 64 << 20 {
                match stream.write(&[b'x'; 4096]).await {
                    Ok(count) => sent += count,
                    Err(_) => break,
                }
            }
            sent
        });
    }
    server.is_alive().await;
    while let Some(sent) = greedy.join_next().await {
        // What lies in the buffers of both sockets counts as sent.
        assert!(sent.unwrap() < 16 << 20);
        server.is_alive().await;
    }
    let mut stream = connect([127, 0, 0, 2], server.address).await.unwrap();
    let header = "x".repeat(HEADERS + 1);
    stream.write_all(format!("GET /here HTTP/1.1\r\nX: {header}\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 431");
}

/// H4
#[tokio::test]
async fn a_client_that_does_not_read_its_answer_is_closed() {
    let server = Server::start();
    let mut stream = connect([127, 0, 0, 2], server.address).await.unwrap();
    stream.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let begun = Instant::now();
    while server.gate.open() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    while server.gate.open() > 0 && begun.elapsed() < LONGEST * 3 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let lasted = begun.elapsed();
    assert!((LONGEST - Duration::from_secs(1)..LONGEST * 2).contains(&lasted), "{lasted:?}");
    assert!(stream.read_to_end(&mut Vec::new()).await.map_or(true, |length| length < 64 << 20));
}

/// H4
#[tokio::test]
async fn all_listeners_have_one_limit() {
    let health = Server::start();
    let check = Server::behind(health.gate.clone());
    let mut idle = Vec::new();
    for number in 0..400 {
        let server = if number % 2 == 0 { &health } else { &check };
        idle.push(connect([127, 0, 0, 2], server.address).await.unwrap());
    }
    health.is_alive().await;
    check.is_alive().await;
    assert!(health.gate.open() <= 256);
}
