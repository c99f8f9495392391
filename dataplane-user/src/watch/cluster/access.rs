//! The client of the API server. Certificates, keys and addresses rotate while the agent runs: it is made anew when a file
//! of the kubeconfig is another than before, and where the server refuses its credentials again and again.
//!
//! A watch that runs goes on as it began; whoever asks next is given the new client. Files are looked at then, not by a
//! clock: nothing else needs them. What cannot be read is told, and what was there before is used on.

use super::pause::Pause;
use super::servers::{self, Servers};
use super::{ClusterError, SILENCE, kubeconfig, proxy};
use crate::causes::causes;
use k8s_openapi::jiff::Timestamp;
use kube::client::ClientBuilder;
use kube::{Client, Config};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// Files are not looked at more often.
const LOOK: Duration = Duration::from_secs(1);
/// After so many refusals in a row the client is made anew although no file changed: a plugin or a proxy may know better.
const REFUSALS: u32 = 3;
/// That is not done more often: a plugin may be asked for it.
const AGAIN: Duration = Duration::from_secs(30);

/// A client, and its server in words.
#[derive(Clone)]
pub(in crate::watch) struct Session {
    pub(in crate::watch) client: Client,
    /// The address, and the proxy if there is one.
    pub(in crate::watch) server: Arc<str>,
}

struct State {
    session: Session,
    fingerprint: u64,
    looked: Instant,
    made: Instant,
    refusals: u32,
    /// Why no new client could be made, as far as that was told.
    complaint: Option<String>,
}

/// Where the client is; clones share it.
#[derive(Clone)]
pub(in crate::watch) struct Access {
    /// Without one, the credentials are those of the pod.
    kubeconfig: Option<Arc<Path>>,
    /// Which servers may be asked, where the kubeconfig does not say it alone.
    servers: Option<Servers>,
    state: Arc<Mutex<State>>,
    pub(super) pause: Pause,
}

impl Access {
    pub(super) async fn open(file: Option<&Path>, servers: Servers) -> Result<Self, ClusterError> {
        let (kubeconfig, pause) = (file.map(Arc::from), Pause::default());
        let servers = (kubeconfig.is_none() || !servers.named.is_empty()).then_some(servers);
        let (session, fingerprint) = make(kubeconfig.clone(), servers.clone(), pause.clone()).await?;
        let now = Instant::now();
        let state = State { session, fingerprint, looked: now, made: now, refusals: 0, complaint: None };
        Ok(Self { kubeconfig, servers, state: Arc::new(Mutex::new(state)), pause })
    }

    #[cfg(test)]
    pub(super) fn fixed(config: Config) -> Self {
        let (now, pause) = (Instant::now(), Pause::default());
        let session = client(config, None, None, &pause).unwrap();
        // Never looked at again.
        let looked = now + Duration::from_secs(1 << 20);
        let state = State { session, fingerprint: 0, looked, made: looked, refusals: 0, complaint: None };
        Self { kubeconfig: None, servers: None, state: Arc::new(Mutex::new(state)), pause }
    }

    /// The client to ask with now.
    pub(in crate::watch) async fn session(&self) -> Session {
        let mut state = self.state.lock().await;
        let now = Instant::now();
        if now.saturating_duration_since(state.looked) < LOOK {
            return state.session.clone();
        }
        state.looked = now;
        let may_again = now.saturating_duration_since(state.made) >= AGAIN;
        let is_over = state.session.client.valid_until().is_some_and(|until| until <= Timestamp::now());
        let changed = match self.kubeconfig.clone() {
            Some(file) => {
                let found = tokio::task::spawn_blocking(move || kubeconfig::fingerprint(&file)).await;
                found.is_ok_and(|found| found != state.fingerprint)
            }
            None => false,
        };
        if changed || may_again && (is_over || state.refusals >= REFUSALS) {
            self.make_anew(&mut state, changed).await;
        }
        state.session.clone()
    }

    async fn make_anew(&self, state: &mut State, changed: bool) {
        (state.made, state.refusals) = (Instant::now(), 0);
        match make(self.kubeconfig.clone(), self.servers.clone(), self.pause.clone()).await {
            Ok((session, fingerprint)) => {
                if changed {
                    tracing::info!(
                        "the kubeconfig or a file that it names has changed: going on with {}",
                        session.server
                    );
                }
                (state.session, state.fingerprint, state.complaint) = (session, fingerprint, None);
            }
            Err(error) => {
                let complaint = Some(error.to_string());
                if state.complaint != complaint {
                    tracing::warn!("{error}; going on with what it was before");
                    state.complaint = complaint;
                }
            }
        }
    }

    /// The server refused the credentials, or they do not fit it.
    pub(super) async fn refused(&self) {
        self.state.lock().await.refusals += 1;
    }

    /// The server took them.
    pub(super) async fn accepted(&self) {
        self.state.lock().await.refusals = 0;
    }
}

/// Makes a client; plugins may run meanwhile.
async fn make(
    file: Option<Arc<Path>>,
    servers: Option<Servers>,
    pause: Pause,
) -> Result<(Session, u64), ClusterError> {
    let made = tokio::task::spawn_blocking(move || {
        // Before they are read: what changes in between is met again.
        let fingerprint = file.as_deref().map_or(0, kubeconfig::fingerprint);
        let (config, proxy) = match file.as_deref() {
            Some(file) => kubeconfig::load(file)?,
            None => of_the_pod()?,
        };
        Ok((client(config, servers, proxy, &pause)?, fingerprint))
    });
    made.await.unwrap_or_else(|error| {
        Err(ClusterError::Client {
            server: String::new(),
            reason: format!("this is a fault of portolan: {error}"),
        })
    })
}

fn of_the_pod() -> Result<(Config, Option<String>), ClusterError> {
    let mut config =
        Config::incluster().map_err(|error| ClusterError::NotInCluster { reason: causes(&error) })?;
    let (proxy, words) = proxy::choose(None, &config.cluster_url)?.unzip();
    config.proxy_url = proxy;
    Ok((config, words))
}

fn client(
    mut config: Config,
    servers: Option<Servers>,
    proxy: Option<String>,
    pause: &Pause,
) -> Result<Session, ClusterError> {
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    // The watches try again themselves, and say why.
    config.default_retry = false;
    let mut server = config.cluster_url.to_string();
    if let Some(proxy) = proxy {
        server = format!("{server} by {proxy}");
    }
    // Whether the certificates and the token can be used does not hang on the server.
    let builder = ClientBuilder::try_from(config.clone())
        .map_err(|error| ClusterError::Client { server: server.clone(), reason: causes(&error) })?;
    if let Some(servers) = servers {
        let client = servers::client(config, servers, pause.clone());
        return Ok(Session { client, server: "the API server".into() });
    }
    Ok(Session { client: builder.with_layer(pause).build(), server: server.into() })
}
