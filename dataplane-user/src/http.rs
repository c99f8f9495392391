//! A small HTTP server for health and metrics: GET a path, get a page. It never keeps the agent from its work: an address
//! that is taken is tried again, and a client that does not behave is dropped.

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Wait before an address that could not be had is tried again.
pub(crate) const RETRY: Duration = Duration::from_secs(5);
/// How long a client may take for its request's headers.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many clients of one listener are served at once; more wait.
const CLIENTS: usize = 64;
/// How many of those that wait the kernel keeps.
const BACKLOG: i32 = 128;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// HTTP status.
    pub status: u16,
    /// Its media type.
    pub content_type: &'static str,
    /// Further headers.
    pub headers: Vec<(&'static str, String)>,
    /// The text.
    pub body: String,
}

impl Page {
    /// Plain text.
    pub fn text(status: u16, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", headers: Vec::new(), body: body.into() }
    }

    /// JSON.
    pub fn json(status: u16, value: &serde_json::Value) -> Self {
        Self { status, content_type: "application/json", headers: Vec::new(), body: value.to_string() }
    }

    /// 404.
    pub fn not_found() -> Self {
        Self::text(404, "404 page not found\n")
    }
}

/// What is answered to each path.
pub type Pages = Arc<dyn Fn(&str) -> Page + Send + Sync>;

/// Serves pages at an address until the task is aborted; `what` is for the log. A wildcard address means both families,
/// as it does to kube-proxy.
pub async fn serve(
    what: &'static str,
    address: SocketAddr,
    pages: impl Fn(&str) -> Page + Send + Sync + 'static,
) {
    let pages: Pages = Arc::new(pages);
    let mut servers = JoinSet::new();
    for address in both_families(address) {
        let pages = pages.clone();
        servers.spawn(async move {
            if let Some(listener) = listen(what, address).await {
                answer_all(listener, pages).await;
            }
        });
    }
    servers.join_all().await;
}

/// The address, and if it is a wildcard that of the other family.
fn both_families(address: SocketAddr) -> Vec<SocketAddr> {
    let other: IpAddr = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv6Addr::UNSPECIFIED.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V4(_) | IpAddr::V6(_) => return vec![address],
    };
    vec![address, SocketAddr::new(other, address.port())]
}

/// Listens at one address of one family: `::` does not take the place of `0.0.0.0`.
///
/// # Errors
/// The kernel's. [`is_without_family`] tells whether this node lacks the family.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Connections of an earlier server at this address that are not quite over do not keep it.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Whether the kernel knows nothing of this family.
pub fn is_without_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Answers whoever connects, until the task is aborted; then open connections are closed.
pub async fn answer_all(listener: TcpListener, pages: Pages) {
    let mut clients = JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        if clients.len() >= CLIENTS {
            clients.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                let pages = pages.clone();
                clients.spawn(async move { answer(stream, &*pages).await });
            }
            // Out of descriptors, or a client that left before it was accepted.
            Err(error) => {
                tracing::debug!("{error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Tries until the address can be had; `None` if this node lacks its family.
async fn listen(what: &str, address: SocketAddr) -> Option<TcpListener> {
    let mut told = false;
    loop {
        match bind(address) {
            Ok(listener) => {
                tracing::info!("{what} at http://{address}");
                return Some(listener);
            }
            Err(error) if is_without_family(&error) => {
                tracing::info!("{what} not at {address}: {error}");
                return None;
            }
            Err(error) if !told => {
                tracing::warn!(
                    "cannot tell {what} at {address}, trying again: {error}. Does kube-proxy still run?"
                );
                told = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn answer(stream: TcpStream, pages: &(dyn Fn(&str) -> Page + Send + Sync)) {
    let service = service_fn(|request: Request<Incoming>| {
        let page = pages(request.uri().path());
        async move { Ok::<_, Infallible>(response(page)) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong here is the client's.
    let _ = served.await;
}

fn response(page: Page) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = StatusCode::from_u16(page.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    for (name, value) in page.headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// What tests ask servers with.
#[cfg(test)]
pub(crate) mod client {
    use std::net::SocketAddr;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    /// An answer, as it came.
    #[derive(Debug)]
    pub(crate) struct Answer {
        pub(crate) status: u16,
        head: String,
        pub(crate) body: String,
    }

    impl Answer {
        pub(crate) fn header(&self, name: &str) -> Option<&str> {
            self.head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find_map(|(known, value)| known.eq_ignore_ascii_case(name).then_some(value.trim()))
        }

        pub(crate) fn json(&self) -> serde_json::Value {
            serde_json::from_str(&self.body).unwrap()
        }
    }

    /// GET; waits until somebody listens.
    pub(crate) async fn get(address: SocketAddr, path: &str) -> Answer {
        for _ in 0..400 {
            if let Some(answer) = try_get(address, path).await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody listens at {address}");
    }

    /// GET; `None` if nobody listens.
    pub(crate) async fn try_get(address: SocketAddr, path: &str) -> Option<Answer> {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { status, head: head.to_owned(), body: body.to_owned() })
    }

    /// A port that was free a moment ago.
    pub(crate) fn free_port() -> u16 {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }
}

#[cfg(test)]
mod tests {
    use super::client::{free_port, get};
    use super::*;

    #[tokio::test]
    async fn a_page_is_served_by_its_path_on_both_families() {
        let port = free_port();
        let server = tokio::spawn(serve("tests", ([0, 0, 0, 0], port).into(), |path| match path {
            "/here" => Page::text(200, "yes\n"),
            _ => Page::not_found(),
        }));
        for host in ["127.0.0.1", "::1"] {
            let address = SocketAddr::new(host.parse().unwrap(), port);
            let answer = get(address, "/here").await;
            assert_eq!((answer.status, answer.body.as_str()), (200, "yes\n"));
            assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
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
}
