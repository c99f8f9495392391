//! An API server that answers as it is told, for what a real one does not do on request: refuse, forget, dawdle, fall silent.
//!
//! It lists and watches objects and takes Events, over plain HTTP with one request per connection. It is no model of the
//! Kubernetes API: of selectors it knows only a name, and it streams no lists, as servers before 1.34 do not.

use crate::lab::{Place, at};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a watch looks for something to tell.
const LOOK: Duration = Duration::from_millis(5);

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// It is refused with this HTTP status.
    Refused(u16),
    /// It is answered after this time.
    Slow(Duration),
    /// The connection stays open, and nothing ever comes.
    Silence,
    /// The connection is cut.
    Cut,
}

/// Something that happened to an object.
#[derive(Clone, Debug)]
struct Happening {
    version: u64,
    word: &'static str,
    resource: &'static str,
    object: Value,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    objects: BTreeMap<(&'static str, String), Value>,
    history: Vec<Happening>,
    /// What happened up to this version is forgotten.
    forgotten: u64,
    treatments: BTreeMap<String, Treatment>,
    /// Watches that began before the last change of treatments end.
    era: u64,
    asked: BTreeMap<String, usize>,
    events: Vec<Value>,
    ended: bool,
}

/// A running server. It ends when dropped.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl ApiServer {
    /// Listens on the loopback address of a place.
    pub fn start(place: &Place) -> Result<Self> {
        let listener = place.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
        listener.set_nonblocking(true)?;
        let state = Arc::new(Mutex::new(State::default()));
        let server = Self { address: at(Ipv4Addr::LOCALHOST, listener.local_addr()?.port()), state };
        let state = server.state.clone();
        std::thread::spawn(move || accept(&listener, &state));
        Ok(server)
    }

    /// A kubeconfig that leads here, written below `folder`.
    pub fn kubeconfig(&self, folder: &Path) -> Result<PathBuf> {
        kubeconfig(folder, self.address)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Makes or changes an object.
    pub fn put(&self, mut object: Value) {
        let key = key(&object);
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let word = if state.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        state.history.push(Happening { version, word, resource: key.0, object: object.clone() });
        state.objects.insert(key, object);
    }

    /// Removes an object.
    pub fn remove(&self, object: &Value) {
        let key = key(object);
        let mut state = self.state();
        let Some(mut object) = state.objects.remove(&key) else { return };
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.history.push(Happening { version, word: "DELETED", resource: key.0, object });
    }

    /// Treats requests so from now on, such as `list services`, `watch` for all watches, or the empty string for all;
    /// watches that are under way end.
    pub fn treat(&self, requests: &str, treatment: Treatment) {
        let mut state = self.state();
        state.treatments.insert(requests.to_owned(), treatment);
        state.era += 1;
    }

    /// Serves all requests again; what was held is cut.
    pub fn relent(&self) {
        let mut state = self.state();
        state.treatments.clear();
        state.era += 1;
    }

    /// Forgets what happened, as a compaction of etcd does: watches under way are told 410, and so are those that want to
    /// go on from before.
    pub fn forget(&self) {
        let mut state = self.state();
        state.version += 1;
        state.forgotten = state.version;
        state.history.clear();
    }

    /// How often this was asked, such as `list services`.
    pub fn asked(&self, request: &str) -> usize {
        self.state().asked.get(request).copied().unwrap_or_default()
    }

    /// How often anything was asked.
    pub fn asked_in_all(&self) -> usize {
        self.state().asked.values().sum()
    }

    /// The Events that were published.
    pub fn events(&self) -> Vec<Value> {
        self.state().events.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.state().ended = true;
    }
}

/// A kubeconfig for a server at this address, written below `folder`.
pub fn kubeconfig(folder: &Path, address: SocketAddr) -> Result<PathBuf> {
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{ "name": "it", "cluster": { "server": format!("http://{address}") } }],
        "users": [{ "name": "it", "user": { "token": "t" } }],
        "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
    });
    let file = folder.join(format!("kubeconfig-{}", address.port()));
    fs::write(&file, text.to_string()).with_context(|| file.display().to_string())?;
    Ok(file)
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The plural of its kind, and its name.
fn key(object: &Value) -> (&'static str, String) {
    let resource = match object["kind"].as_str() {
        Some("Node") => "nodes",
        Some("Service") => "services",
        Some("ServiceCIDR") => "servicecidrs",
        Some("EndpointSlice") => "endpointslices",
        other => panic!("this server has no {other:?}"),
    };
    let metadata = &object["metadata"];
    let part = |field: &str| metadata[field].as_str().unwrap_or_default().to_owned();
    (resource, format!("{}/{}", part("namespace"), part("name")))
}

fn accept(listener: &TcpListener, state: &Arc<Mutex<State>>) {
    while !lock(state).ended {
        match listener.accept() {
            Ok((stream, _)) => {
                let state = state.clone();
                // Who hangs up in the middle is no fault of the server.
                std::thread::spawn(move || drop(answer(&stream, &state)));
            }
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

/// What is asked for.
struct Request {
    /// Such as `list services`.
    asked: String,
    resource: String,
    watch_from: Option<u64>,
    name: Option<String>,
    body: Vec<u8>,
}

impl Request {
    fn read(stream: &TcpStream) -> io::Result<Self> {
        let mut reader = BufReader::new(stream);
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if line == "\r\n" {
                break;
            }
            head.push(line.to_ascii_lowercase());
        }
        let length = head.iter().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body)?;
        let target = head[0].split(' ').nth(1).unwrap_or_default().replace("%3d", "=");
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let resource = path.rsplit('/').next().unwrap_or_default().to_owned();
        let value = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        let version = value("resourceversion").and_then(|version| version.parse().ok());
        let watch_from = value("watch").map(|_| version.unwrap_or_default());
        let verb = if head[0].starts_with("post") {
            "create"
        } else if value("sendinitialevents").is_some() {
            "stream"
        } else if watch_from.is_some() {
            "watch"
        } else {
            "list"
        };
        Ok(Self {
            asked: format!("{verb} {resource}"),
            resource,
            watch_from,
            name: value("fieldselector").and_then(|it| it.strip_prefix("metadata.name=")).map(str::to_owned),
            body,
        })
    }

    fn wants(&self, resource: &str, object: &Value) -> bool {
        self.resource == resource
            && self.name.as_ref().is_none_or(|name| object["metadata"]["name"] == **name)
    }
}

fn answer(stream: &TcpStream, state: &Mutex<State>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let request = Request::read(stream)?;
    let (treatment, era) = {
        let mut state = lock(state);
        *state.asked.entry(request.asked.clone()).or_default() += 1;
        let verb = request.asked.split(' ').next().unwrap_or_default();
        let found = [&*request.asked, verb, ""].into_iter().find_map(|it| state.treatments.get(it).cloned());
        (found, state.era)
    };
    match treatment {
        None => {}
        Some(Treatment::Cut) => return Ok(()),
        Some(Treatment::Slow(time)) => std::thread::sleep(time),
        Some(Treatment::Silence) => return hold(stream, state),
        Some(Treatment::Refused(code)) => return send(stream, code, &refusal(code, &request.asked)),
    }
    if request.asked.starts_with("create") {
        let event: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        lock(state).events.push(event.clone());
        return send(stream, 201, &event);
    }
    if request.asked.starts_with("stream") {
        return send(stream, 422, &refusal(422, &request.asked));
    }
    match request.watch_from {
        Some(version) => watch(stream, state, &request, version, era),
        None => send(stream, 200, &list(&lock(state), &request)),
    }
}

/// Until the client hangs up.
fn hold(mut stream: &TcpStream, state: &Mutex<State>) -> io::Result<()> {
    stream.set_read_timeout(Some(LOOK * 10))?;
    let era = lock(state).era;
    loop {
        let (over, mut byte) = (lock(state).ended || lock(state).era != era, [0]);
        match stream.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(_) if over => return Ok(()),
            Ok(_) | Err(_) => {}
        }
    }
}

fn list(state: &State, request: &Request) -> Value {
    let objects = state.objects.iter().filter(|((resource, _), object)| request.wants(resource, object));
    let (group, kind) = match &*request.resource {
        "nodes" => ("v1", "NodeList"),
        "services" => ("v1", "ServiceList"),
        "endpointslices" => ("discovery.k8s.io/v1", "EndpointSliceList"),
        "servicecidrs" => ("networking.k8s.io/v1", "ServiceCIDRList"),
        _ => ("v1", "List"),
    };
    json!({
        "kind": kind, "apiVersion": group, "metadata": { "resourceVersion": state.version.to_string() },
        "items": objects.map(|(_, object)| object).collect::<Vec<_>>(),
    })
}

/// As RBAC words it, where it is about rights.
fn refusal(code: u16, asked: &str) -> Value {
    let (verb, resource) = asked.split_once(' ').unwrap_or_default();
    let (reason, message) = match code {
        401 => ("Unauthorized", "Unauthorized".to_owned()),
        403 => (
            "Forbidden",
            format!("{resource} is forbidden: User \"it\" cannot {verb} resource \"{resource}\""),
        ),
        410 => ("Expired", "too old resource version".to_owned()),
        _ => ("InternalError", "it is told to answer so".to_owned()),
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
        "message": message,
    })
}

fn send(mut stream: &TcpStream, code: u16, body: &Value) -> io::Result<()> {
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {code} It\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Tells what happens after `version`.
fn watch(
    mut stream: &TcpStream,
    state: &Mutex<State>,
    request: &Request,
    mut version: u64,
    era: u64,
) -> io::Result<()> {
    let head = "Content-Type: application/json\r\nConnection: close\r\nTransfer-Encoding: chunked";
    write!(stream, "HTTP/1.1 200 OK\r\n{head}\r\n\r\n")?;
    let mut chunk = |word: &str, object: &Value| {
        // The type comes first, as a real one writes it.
        let text = format!(r#"{{"type":"{word}","object":{object}}}"#);
        write!(stream, "{:x}\r\n{text}\n\r\n", text.len() + 1)
    };
    loop {
        let (news, forgotten) = {
            let state = lock(state);
            if state.ended || state.era != era {
                return Ok(());
            }
            let after = state.history.iter().filter(|happening| happening.version > version);
            (after.cloned().collect::<Vec<_>>(), state.forgotten > version)
        };
        if forgotten {
            return chunk("ERROR", &refusal(410, &request.asked));
        }
        for Happening { version: next, word, resource, object } in news {
            version = next;
            if request.wants(resource, &object) {
                chunk(word, &object)?;
            }
        }
        std::thread::sleep(LOOK);
    }
}
