//! A small HTTP server for health and metrics: GET a path, get a page. It never keeps the agent from its work: an address
//! that is taken is tried again, and a client that is slow, idle or greedy costs nobody else an answer.
//!
//! Load balancers and kubelets act on what they are told here, and everybody who can reach the node can connect. So each
//! connection is one question: little is read, it must come soon, and where too many are open at once, over all listeners,
//! one of the client that has most of them is closed ([`Gate`]).

#[cfg(test)]
pub(crate) mod client;
mod gate;
mod once;
#[cfg(test)]
mod tests;

pub use gate::Gate;
pub use once::Once;

use futures::future::{BoxFuture, ready};
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
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Wait before an address that could not be had is tried again.
pub(crate) const RETRY: Duration = Duration::from_secs(5);
/// How long a client may take for its request's headers: one packet that was lost and sent again, and no more.
const HEADERS_WITHIN: Duration = Duration::from_secs(2);
/// How long a connection may last: as long as Prometheus waits for a scrape by default.
pub(crate) const LONGEST: Duration = Duration::from_secs(10);
/// Bytes of a request's headers, and the least that `hyper` takes.
const HEADERS: usize = 8 * 1024;
/// How many connections the kernel keeps until they are accepted. Of each that comes beyond, the kernel drops a packet, and
/// the client repeats it a second later: too late for a kubelet. The kernel takes `net.core.somaxconn` if that is less.
const BACKLOG: i32 = 4_096;

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
pub type Pages = Arc<dyn Fn(&str) -> BoxFuture<'static, Arc<Page>> + Send + Sync>;

/// Pages that are made at once.
pub fn at_once(pages: impl Fn(&str) -> Page + Send + Sync + 'static) -> Pages {
    Arc::new(move |path| now(pages(path)))
}

/// A page that is there already.
pub fn now(page: Page) -> BoxFuture<'static, Arc<Page>> {
    Box::pin(ready(Arc::new(page)))
}

/// Serves pages at an address until the task is aborted; `what` is for the log. A wildcard address means both families,
/// as it does to kube-proxy.
pub async fn serve(what: &'static str, address: SocketAddr, gate: Gate, pages: Pages) {
    let mut servers = JoinSet::new();
    for address in both_families(address) {
        let (gate, pages) = (gate.clone(), pages.clone());
        servers.spawn(async move {
            if let Some(listener) = listen(what, address).await {
                answer_all(listener, gate, pages).await;
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
pub async fn answer_all(listener: TcpListener, gate: Gate, pages: Pages) {
    let mut clients = JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (mut admitted, pages) = (gate.admit(peer.ip()), pages.clone());
                clients.spawn(async move {
                    tokio::select! {
                        biased;
                        () = answer(stream, &*pages) => {}
                        () = admitted.closed() => {}
                        () = tokio::time::sleep(LONGEST) => {}
                    }
                });
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

/// Answers the one question of a connection.
pub(crate) async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    pages: &(dyn Fn(&str) -> BoxFuture<'static, Arc<Page>> + Send + Sync),
) {
    let service = service_fn(|request: Request<Incoming>| {
        let page = pages(request.uri().path());
        async move { Ok::<_, Infallible>(response(page.await)) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .max_buf_size(HEADERS)
        .keep_alive(false)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong here is the client's.
    let _ = served.await;
}

/// The text of a page that others may be sent as well.
struct SharedText(Arc<Page>);

impl AsRef<[u8]> for SharedText {
    fn as_ref(&self) -> &[u8] {
        self.0.body.as_bytes()
    }
}

fn response(page: Arc<Page>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_owner(SharedText(page.clone()))));
    *response.status_mut() = StatusCode::from_u16(page.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    for (name, value) in &page.headers {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(*name, value);
        }
    }
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}
