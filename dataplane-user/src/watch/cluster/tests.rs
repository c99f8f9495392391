//! The watches against a small API server that answers what each test tells it to.

use super::*;
use crate::model::{Change, Kind};
use crate::watch::KINDS;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// What the server does with a request.
enum Answer {
    /// HTTP status and body.
    Json(u16, Value),
    /// The lines of a watch, then silence.
    Lines(Vec<String>),
    /// The lines of a watch, then its end.
    LinesThenEnd(Vec<String>),
    /// The connection is cut.
    Cut,
}

/// What comes next, by `list services` or `watch services`. Where nothing is left, a list is empty and a watch silent.
#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<BTreeMap<String, VecDeque<Answer>>>>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Script {
    fn then(&self, request: &str, answer: Answer) -> &Self {
        self.answers.lock().unwrap().entry(request.to_owned()).or_default().push_back(answer);
        self
    }

    fn next(&self, request: &str) -> Answer {
        let answer = self.answers.lock().unwrap().get_mut(request).and_then(VecDeque::pop_front);
        answer.unwrap_or_else(|| match request.starts_with("list") {
            true => list(&[], "1"),
            false => Answer::Lines(Vec::new()),
        })
    }

    fn requests(&self, resource: &str) -> Vec<String> {
        self.requests.lock().unwrap().iter().filter(|request| request.contains(resource)).cloned().collect()
    }

    async fn serve(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(self.clone().connection(stream));
        }
    }

    async fn connection(self, stream: TcpStream) {
        let mut stream = BufReader::new(stream);
        loop {
            let mut request = String::new();
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                    return;
                }
                if line == "\r\n" {
                    break;
                }
                request.push_str(&line);
            }
            let path = request.split_whitespace().nth(1).unwrap_or_default().to_owned();
            let resource =
                path.split(['?', '&']).next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
            let verb = if path.contains("watch=true") { "watch" } else { "list" };
            self.requests.lock().unwrap().push(format!("{verb} {path}"));
            let (status, body, end) = match self.next(&format!("{verb} {resource}")) {
                Answer::Json(status, body) => (status, Some(body.to_string()), None),
                Answer::Lines(lines) => (200, None, Some((lines, false))),
                Answer::LinesThenEnd(lines) => (200, None, Some((lines, true))),
                Answer::Cut => return,
            };
            let head = format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n");
            if let Some(body) = body {
                let answer = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            if let Some((lines, ends)) = end {
                let answer = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
                for line in lines {
                    let chunk = format!("{:x}\r\n{line}\n\r\n", line.len() + 1);
                    stream.write_all(chunk.as_bytes()).await.unwrap();
                }
                if ends {
                    stream.write_all(b"0\r\n\r\n").await.unwrap();
                }
            }
        }
    }
}

fn list(items: &[Value], version: &str) -> Answer {
    Answer::Json(
        200,
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items}),
    )
}

fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": "R", "message": message})
}

fn refused(code: u16, message: &str) -> Answer {
    Answer::Json(code, status(code, message))
}

fn service(name: &str, version: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "d", "resourceVersion": version}, "spec": {"ports": [{"port": 80}]}})
}

/// The API server writes the type first.
fn event(kind: &str, object: &Value) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}")
}

struct Source {
    watch: Watch,
    changes: mpsc::Receiver<Change>,
}

impl Source {
    async fn start(script: &Script) -> Self {
        Self::with(script, None).await
    }

    async fn with(script: &Script, service_proxy_name: Option<&str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(script.clone().serve(listener));
        let mut config = Config::new(server.parse().unwrap());
        config.default_retry = false;
        let (sender, changes) = mpsc::channel(100);
        let options =
            Options { node_name: "n1".into(), service_proxy_name: service_proxy_name.map(Into::into) };
        Self { watch: start(Client::try_from(config).unwrap(), server, options, sender), changes }
    }

    /// The next change of this kind, in words; others are left out.
    async fn next(&mut self, wanted: Kind) -> String {
        loop {
            let change = tokio::time::timeout(Duration::from_secs(20), self.changes.recv()).await;
            let (kind, words) = match change.expect("no change within 20 s").unwrap() {
                Change::Applied(object) => (object.reference().kind, format!("+{}", object.reference().name)),
                Change::Deleted(object) => (object.kind, format!("-{}", object.name)),
                Change::Replaced { kind, objects, .. } => {
                    let names: Vec<_> =
                        objects.iter().map(|object| object.reference().name.to_string()).collect();
                    (kind, format!("={}", names.join(",")))
                }
                Change::Unreadable { object, error } => (object.kind, format!("?{}: {error}", object.name)),
            };
            if kind == wanted {
                return words;
            }
        }
    }

    async fn nothing(&mut self, time: u64) {
        let change = tokio::time::timeout(Duration::from_millis(time), self.changes.recv()).await;
        assert!(change.is_err(), "{change:?}");
    }
}

#[tokio::test]
async fn every_kind_is_listed_and_then_watched_with_its_selector() {
    let script = Script::default();
    script
        .then("list services", list(&[service("a", "5"), service("b", "6")], "7"))
        .then("list nodes", list(&[json!({"metadata": {"name": "n1", "resourceVersion": "3"}})], "7"))
        .then(
            "watch services",
            Answer::Lines(vec![
                event("ADDED", &service("c", "8")),
                event("DELETED", &service("a", "9")),
                event(
                    "BOOKMARK",
                    &json!({"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "20"}}),
                ),
                event("MODIFIED", &service("b", "21")),
            ]),
        );
    let mut source = Source::start(&script).await;
    let told = [source.next(Kind::Service).await, source.next(Kind::Service).await];
    assert_eq!(told, ["=d/a,d/b", "+d/c"]);
    let told = [source.next(Kind::Service).await, source.next(Kind::Service).await];
    assert_eq!(told, ["-d/a", "+d/b"]);
    while !source.watch.status().is_synced() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(KINDS.iter().all(|kind| source.watch.status().of(*kind).error.is_none()));
    // F2, F3
    let requests = |resource: &str| script.requests(resource).join(" ");
    assert!(
        requests("/services").contains("labelSelector=%21service.kubernetes.io%2Fservice-proxy-name"),
        "{}",
        requests("/services")
    );
    assert!(requests("/endpointslices").contains("labelSelector=%21service.kubernetes.io%2Fheadless"));
    assert!(requests("/nodes").contains("fieldSelector=metadata.name%3Dn1"));
    assert!(
        script.requests("/services")[1].contains("resourceVersion=7"),
        "{:?}",
        script.requests("/services")
    );
}

/// F2
#[tokio::test]
async fn an_agent_with_a_name_asks_for_the_services_with_that_name() {
    let script = Script::default();
    let mut source = Source::with(&script, Some("mine")).await;
    source.next(Kind::Service).await;
    assert!(
        script.requests("/services")[0]
            .contains("labelSelector=service.kubernetes.io%2Fservice-proxy-name%3Dmine")
    );
}

#[tokio::test]
async fn a_list_is_read_page_by_page_and_told_as_one() {
    let script = Script::default();
    let page = |name: &str, next: &str| {
        let metadata = json!({"resourceVersion": "7", "continue": next});
        Answer::Json(200, json!({"metadata": metadata, "items": [service(name, "1")]}))
    };
    script.then("list services", page("a", "more")).then("list services", page("b", ""));
    let mut source = Source::start(&script).await;
    assert_eq!(source.next(Kind::Service).await, "=d/a,d/b");
    assert!(script.requests("/services")[1].contains("continue=more"));
}

/// Z5
#[tokio::test]
async fn an_object_that_cannot_be_read_is_named_and_costs_no_other() {
    let script = Script::default();
    let broken = |version: &str| json!({"metadata": {"name": "x", "namespace": "d", "resourceVersion": version}, "spec": {"ports": 5}});
    let mut out_of_range = service("y", "9");
    out_of_range["spec"]["ports"][0]["port"] = json!(70000);
    script.then("list services", list(&[broken("1"), service("a", "2")], "7")).then(
        "watch services",
        Answer::Lines(vec![
            event("MODIFIED", &broken("8")),
            event("ADDED", &out_of_range),
            event("ADDED", &service("b", "10")),
        ]),
    );
    let mut source = Source::start(&script).await;
    assert_eq!(source.next(Kind::Service).await, "=d/a");
    assert!(source.next(Kind::Service).await.starts_with("?d/x: invalid type"));
    assert!(source.next(Kind::Service).await.starts_with("?d/x: invalid type"));
    assert!(source.next(Kind::Service).await.starts_with("?d/y: spec.ports[0].port is 70000"));
    assert_eq!(source.next(Kind::Service).await, "+d/b");
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_where_it_was() {
    let script = Script::default();
    script
        .then("watch services", Answer::LinesThenEnd(vec![event("ADDED", &service("a", "30"))]))
        .then("watch services", Answer::Lines(vec![event("ADDED", &service("b", "31"))]));
    let mut source = Source::start(&script).await;
    let told = [
        source.next(Kind::Service).await,
        source.next(Kind::Service).await,
        source.next(Kind::Service).await,
    ];
    assert_eq!(told, ["=", "+d/a", "+d/b"]);
    let requests = script.requests("/services");
    assert_eq!(requests.len(), 3);
    assert!(requests[2].contains("resourceVersion=30"), "{requests:?}");
}

#[tokio::test]
async fn a_watch_that_is_too_old_means_to_list_again() {
    let script = Script::default();
    // As an event of the watch, and as the answer to it.
    script
        .then("list services", list(&[service("a", "5"), service("gone", "6")], "7"))
        .then("watch services", Answer::Lines(vec![event("ERROR", &status(410, "too old"))]))
        .then("list services", list(&[service("a", "5")], "8"))
        .then("watch services", refused(410, "too old"))
        .then("list services", list(&[service("b", "9")], "10"));
    let mut source = Source::start(&script).await;
    let told = [
        source.next(Kind::Service).await,
        source.next(Kind::Service).await,
        source.next(Kind::Service).await,
    ];
    assert_eq!(told, ["=d/a,d/gone", "=d/a", "=d/b"]);
}

#[tokio::test]
async fn what_is_not_json_means_to_list_again() {
    let script = Script::default();
    script
        .then("watch services", Answer::Lines(vec!["<html>".to_owned()]))
        .then("list services", list(&[], "7"))
        .then("list services", list(&[service("a", "5")], "8"));
    let mut source = Source::start(&script).await;
    assert_eq!([source.next(Kind::Service).await, source.next(Kind::Service).await], ["=", "=d/a"]);
}

#[tokio::test]
async fn a_refusal_deletes_nothing_says_what_to_check_and_is_tried_again() {
    let script = Script::default();
    script
        .then("list services", refused(401, "Unauthorized"))
        .then(
            "list services",
            refused(403, "services is forbidden: User \"x\" cannot list resource \"services\""),
        )
        .then("list services", list(&[service("a", "5")], "7"))
        .then("watch services", Answer::Cut)
        .then("watch services", Answer::Lines(vec![event("ADDED", &service("b", "8"))]));
    let mut source = Source::start(&script).await;
    let services = source.watch.status();
    let mut errors = Vec::new();
    let watcher = tokio::spawn(async move {
        loop {
            let error = services.of(Kind::Service).error;
            if let Some(error) = error.filter(|error| errors.last() != Some(error)) {
                errors.push(error);
            }
            if errors.len() == 3 {
                return errors;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    // Not a word until the list succeeds, and no second list after the cut.
    assert_eq!([source.next(Kind::Service).await, source.next(Kind::Service).await], ["=d/a", "+d/b"]);
    let errors = watcher.await.unwrap();
    assert!(errors[0].starts_with("list services: ") && errors[0].contains("(401)"), "{}", errors[0]);
    assert!(
        errors[1].starts_with("list services: forbidden (403)") && errors[1].contains("verbs list and watch"),
        "{}",
        errors[1]
    );
    assert!(errors[2].starts_with("watch services: no answer from http://127.0.0.1:"), "{}", errors[2]);
    let status = source.watch.status().of(Kind::Service);
    assert_eq!(
        (status.synced, status.connected, status.error, status.lists, status.errors),
        (true, true, None, 1, 3)
    );
}

#[tokio::test]
async fn service_cidrs_are_done_without_where_there_are_none() {
    let script = Script::default();
    script.then("list servicecidrs", refused(404, "not found"));
    let mut source = Source::start(&script).await;
    assert_eq!(source.next(Kind::ServiceCidr).await, "=");
    while !source.watch.status().is_synced() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(source.watch.status().of(Kind::ServiceCidr).unavailable);
}

#[tokio::test]
async fn an_api_server_that_is_away_tells_nothing() {
    let server = "http://127.0.0.1:1".to_owned();
    let (sender, changes) = mpsc::channel(100);
    let options = Options { node_name: "n1".into(), service_proxy_name: None };
    let mut config = Config::new(server.parse().unwrap());
    config.default_retry = false;
    let watch = start(Client::try_from(config).unwrap(), server, options, sender);
    let mut source = Source { watch, changes };
    source.nothing(1500).await;
    let status = source.watch.status().of(Kind::Service);
    assert!(!status.synced && !status.connected);
    assert!(status.error.unwrap().ends_with("is the API server running, and is this its address?"));
}

#[tokio::test]
async fn a_kubeconfig_that_is_none_is_named() {
    let (sender, _changes) = mpsc::channel(1);
    let options = Options { node_name: "n1".into(), service_proxy_name: None };
    let error = watch(Some(Path::new("/none/kubeconfig")), Servers::default(), options, sender)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("kubeconfig /none/kubeconfig: "), "{error}");
}
