//! Which API servers may be asked, and which one is: the first, in an order of trust, that answers under the cluster's CA. When
//! it answers no more, the next request looks again. So nobody must say by hand where the API server is.
//!
//! A credential goes to a server only after the server has proved who it is.

use super::pause::Pause;
use crate::causes::causes;
use crate::snapshot::servers::{Source, read};
use futures::stream::{FuturesOrdered, StreamExt as _};
use http::{Request, Response, Uri};
use kube::client::{Body, ClientBuilder};
use kube::{Client, Config};
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tower_service::Service;

/// The name that every API server proves, whatever its address.
const NAME: &str = "kubernetes.default.svc";
/// Where the proxies of distributions listen on each node: Talos' KubePrism, and those of k3s and RKE2.
const LOCAL: [&str; 2] = ["127.0.0.1:7445", "127.0.0.1:6444"];
/// The port of an address that names none.
const PORT: u16 = 6443;
/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// An API server by its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiServer(Uri);

impl FromStr for ApiServer {
    type Err = String;

    /// `https://HOST:PORT`, `HOST:PORT` or `HOST`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is no API server such as 192.0.2.10:6443 or https://example.org:6443");
        let address = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
        let address = match address.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => address.to_owned(),
        };
        let uri: Uri = format!("https://{address}/").parse().map_err(|_| wrong())?;
        match uri.authority() {
            Some(authority) if uri.path() == "/" && !authority.host().is_empty() => match authority.port() {
                Some(_) => Ok(Self(uri)),
                None => format!("https://{authority}:{PORT}/").parse().map(Self).map_err(|_| wrong()),
            },
            Some(_) | None => Err(wrong()),
        }
    }
}

/// Where to look.
#[derive(Clone, Debug, Default)]
pub struct Servers {
    /// Those that somebody named: then there are no others.
    pub named: Vec<ApiServer>,
    /// The folder in which earlier ones are kept.
    pub state: PathBuf,
    /// Those that the kubelet's kubeconfig names, where whoever looks may read it.
    pub kubelet: Vec<String>,
    /// Which one answered last.
    pub found: Answered,
}

/// The address of the API server that answered last, if one was looked for; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Answered(Arc<Mutex<Option<String>>>);

impl Answered {
    /// Its address.
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, server: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = server;
    }
}

/// A server that may be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    server: Uri,
    /// What its certificate must name, if not its address.
    name: Option<&'static str>,
}

impl Servers {
    /// All of them, the first choice first; `default` is the one that the credentials came with.
    fn candidates(&self, default: &Uri) -> Vec<Candidate> {
        if !self.named.is_empty() {
            return self
                .named
                .iter()
                .map(|ApiServer(server)| Candidate { server: server.clone(), name: None })
                .collect();
        }
        let found = [
            read(&self.state, Source::Endpoints),
            LOCAL.map(str::to_owned).to_vec(),
            read(&self.state, Source::Kubelet),
            self.kubelet.clone(),
        ];
        let found = found.iter().flatten().filter_map(|text| text.parse::<ApiServer>().ok());
        let found = found.map(|ApiServer(server)| Candidate { server, name: Some(NAME) });
        let mut all: Vec<Candidate> = Vec::new();
        for candidate in found.chain([Candidate { server: default.clone(), name: None }]) {
            if all.iter().all(|other| other.server.authority() != candidate.server.authority()) {
                all.push(candidate);
            }
        }
        all
    }
}

/// None of the servers answers.
#[derive(Debug, thiserror::Error)]
#[error("none of the API servers answers ({}); --api-server says where one is", .0.join("; "))]
pub(super) struct NoServer(Vec<String>);

/// A client of whichever server answers.
pub(super) fn client(config: Config, servers: Servers, pause: Pause) -> Client {
    let namespace = config.default_namespace.clone();
    let found = Arc::new(Found {
        config,
        servers,
        pause,
        client: Mutex::default(),
        looking: tokio::sync::Mutex::default(),
    });
    Client::new(AnyServer(found), namespace)
}

/// What is looked for, and what was found.
struct Found {
    config: Config,
    servers: Servers,
    pause: Pause,
    /// The client that answered last, and how many there were before it.
    client: Mutex<(Option<Client>, u64)>,
    /// One looks, and the others wait for it.
    looking: tokio::sync::Mutex<()>,
}

impl Found {
    fn client(&self) -> (Option<Client>, u64) {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn find(&self) -> Result<(Client, u64), NoServer> {
        let _looking = self.looking.lock().await;
        if let (Some(client), number) = self.client() {
            return Ok((client, number));
        }
        let candidates = self.servers.candidates(&self.config.cluster_url);
        let mut answers: FuturesOrdered<_> = candidates.iter().map(|candidate| self.ask(candidate)).collect();
        let mut failures = Vec::new();
        for candidate in &candidates {
            match answers.next().await {
                Some(Ok(client)) => {
                    tracing::info!(server = %candidate.server, "found the API server");
                    self.servers.found.set(Some(candidate.server.to_string()));
                    let mut found = self.client.lock().unwrap_or_else(PoisonError::into_inner);
                    *found = (Some(client.clone()), found.1 + 1);
                    return Ok((client, found.1));
                }
                Some(Err(why)) => failures.push(format!("{}: {why}", candidate.server)),
                None => {}
            }
        }
        Err(NoServer(failures))
    }

    /// A client of this server, if that answers. What it answers does not matter.
    async fn ask(&self, candidate: &Candidate) -> Result<Client, String> {
        let mut config = self.config.clone();
        config.cluster_url = candidate.server.clone();
        config.connect_timeout = Some(PATIENCE);
        if let Some(name) = candidate.name {
            config.tls_server_name = Some(name.to_owned());
        }
        if matches!(candidate.server.host(), Some("127.0.0.1")) {
            config.proxy_url = None;
        }
        let builder = ClientBuilder::try_from(config).map_err(|error| causes(&error))?;
        let client = builder.with_layer(&self.pause).build();
        match tokio::time::timeout(PATIENCE, client.apiserver_version()).await {
            Ok(Ok(_) | Err(kube::Error::Api(_))) => Ok(client),
            Ok(Err(error)) => Err(causes(&error)),
            Err(_) => Err(format!("no answer within {PATIENCE:?}")),
        }
    }

    /// This client's server does not answer any more.
    fn lost(&self, number: u64) {
        let mut found = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if found.1 == number {
            self.servers.found.set(None);
            found.0 = None;
        }
    }
}

/// Sends each request to the server that was found, and finds one before.
#[derive(Clone)]
struct AnyServer(Arc<Found>);

impl Service<Request<Body>> for AnyServer {
    type Response = Response<Body>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let found = self.0.clone();
        Box::pin(async move {
            let (client, number) = found.find().await?;
            client.send(request).await.map_err(|error| {
                found.lost(number);
                error.into()
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::servers::write;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    #[test]
    fn an_api_server_is_named_by_host_port_or_url() {
        let uri = |text: &str| ApiServer::from_str(text).unwrap().0.to_string();
        assert_eq!(uri("192.0.2.10"), "https://192.0.2.10:6443/");
        assert_eq!(uri("kind-control-plane:6443"), "https://kind-control-plane:6443/");
        assert_eq!(uri("https://example.org:443/"), "https://example.org:443/");
        assert_eq!(uri("fd00::1"), "https://[fd00::1]:6443/");
        assert_eq!(uri("[fd00::1]:443"), "https://[fd00::1]:443/");
        for wrong in ["", "https://", "http://a/b", "a b", "a/path"] {
            assert!(ApiServer::from_str(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn who_was_an_endpoint_comes_before_what_the_environment_says() {
        let state = std::env::temp_dir().join(format!("portolan-candidates-{}", std::process::id()));
        write(&state, Source::Endpoints, &["192.0.2.1:6443".into(), "192.0.2.2:6443".into()]).unwrap();
        write(&state, Source::Kubelet, &["https://node-1:6443".into(), "192.0.2.2:6443".into()]).unwrap();
        let mut servers = Servers { state, ..Servers::default() };
        let default = Uri::from_static("https://10.96.0.1/");
        let all = |servers: &Servers| {
            let all = servers.candidates(&default).into_iter();
            all.map(|it| (it.server.authority().unwrap().to_string(), it.name.is_some())).collect::<Vec<_>>()
        };
        let expected = [
            ("192.0.2.1:6443", true),
            ("192.0.2.2:6443", true),
            ("127.0.0.1:7445", true),
            ("127.0.0.1:6444", true),
            ("node-1:6443", true),
            ("10.96.0.1", false),
        ];
        assert_eq!(all(&servers), expected.map(|(server, named)| (server.to_owned(), named)));
        servers.kubelet = vec!["https://node-2:6443".into(), "https://node-1:6443".into()];
        assert_eq!(all(&servers)[4..6], [("node-1:6443".to_owned(), true), ("node-2:6443".to_owned(), true)]);
        servers.named = vec!["192.0.2.9".parse().unwrap()];
        assert_eq!(all(&servers), [("192.0.2.9:6443".to_owned(), false)]);
        std::fs::remove_dir_all(&servers.state).unwrap();
    }

    /// A server that answers each request with its number, until it is dropped.
    async fn server(number: u16) -> (Uri, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let body = format!(
                    "{{\"major\":\"{number}\",\"minor\":\"0\",\"gitVersion\":\"\",\"gitCommit\":\"\",\"gitTreeState\":\"\",\"buildDate\":\"\",\"goVersion\":\"\",\"compiler\":\"\",\"platform\":\"\"}}"
                );
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        (format!("http://{address}/").parse().unwrap(), task)
    }

    #[tokio::test]
    async fn the_first_that_answers_is_asked_and_the_next_one_when_it_is_gone() {
        let (nobody, task) = server(0).await;
        task.abort();
        let _ = task.await;
        let ((first, first_task), (second, second_task)) = (server(1).await, server(2).await);
        let servers = Servers {
            named: [&nobody, &first, &second].map(|uri| ApiServer(uri.clone())).into(),
            ..Servers::default()
        };
        let client = client(Config::new(nobody), servers, Pause::default());
        let major = async || client.apiserver_version().await.map(|version| version.major);
        assert_eq!(major().await.unwrap(), "1");
        first_task.abort();
        let _ = first_task.await;
        assert!(
            major().await.is_err(),
            "the request that finds nobody fails, and is tried again by its watch"
        );
        assert_eq!(major().await.unwrap(), "2");
        second_task.abort();
        let _ = second_task.await;
        assert!(major().await.is_err());
        let error = causes(&major().await.unwrap_err());
        assert!(error.contains("none of the API servers answers (http://127.0.0.1:"), "{error}");
    }
}
