//! A small HTTP server for health and metrics: GET a path, get a page. It never keeps the agent from its work: an address
//! that is taken is tried again, and a client that does not behave is dropped.

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Wait before an address that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long a client may take for its request's headers.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many clients are served at once; more wait.
const CLIENTS: usize = 64;

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

/// Serves pages at an address until the task is aborted; `what` is for the log.
pub async fn serve(
    what: &'static str,
    address: SocketAddr,
    pages: impl Fn(&str) -> Page + Send + Sync + 'static,
) {
    let listener = listen(what, address).await;
    let pages = Arc::new(pages);
    let clients = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(client) = clients.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let pages = pages.clone();
                tokio::spawn(async move {
                    answer(stream, &*pages).await;
                    drop(client);
                });
            }
            // Out of descriptors, or a client that left before it was accepted.
            Err(error) => {
                tracing::debug!("{what}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn listen(what: &str, address: SocketAddr) -> TcpListener {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                tracing::info!("{what} at http://{address}");
                return listener;
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

async fn answer(stream: TcpStream, pages: &(impl Fn(&str) -> Page + Sync)) {
    let service = service_fn(|request: Request<Incoming>| {
        let page = pages(request.uri().path());
        async move { Ok::<_, Infallible>(response(page)) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn a_page_is_served_by_its_path() {
        // A port that was free a moment ago.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let server = tokio::spawn(serve("tests", address, |path| match path {
            "/here" => Page::text(200, "yes\n"),
            _ => Page::not_found(),
        }));
        let mut stream = loop {
            match TcpStream::connect(address).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        stream.write_all(b"GET /here HTTP/1.1\r\nHost: x\r\n\r\nGET /there HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.contains("yes\nHTTP/1.1 404 Not Found\r\n"), "{text}");
        server.abort();
    }
}
