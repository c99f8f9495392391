//! The watches against a small API server that answers what each test tells it to.

mod credentials;

use super::*;
use crate::model::{Change, Kind};
use crate::watch::KINDS;
use kube::Config;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
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
    /// Too much to do: come again after so many seconds.
    Busy(u64),
}

/// What comes next, by `list services`, `watch services` or `stream services`, which is a list that is streamed. Where
/// nothing is left, a list is empty, a watch silent, and there are no streamed lists.
#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<BTreeMap<String, VecDeque<Answer>>>>,
    requests: Arc<Mutex<Vec<String>>>,
    /// The headers of the last request.
    headers: Arc<Mutex<String>>,
}

impl Script {
    fn then(&self, request: &str, answer: Answer) -> &Self {
        self.answers.lock().unwrap().entry(request.to_owned()).or_default().push_back(answer);
        self
    }

    fn next(&self, request: &str) -> Answer {
        let answer = self.answers.lock().unwrap().get_mut(request).and_then(VecDeque::pop_front);
        answer.unwrap_or_else(|| match request.split(' ').next().unwrap() {
            "list" => list(&[], "1"),
            "stream" => refused(422, "sendInitialEvents is forbidden for watch"),
            _ => Answer::Lines(Vec::new()),
        })
    }

    /// What was asked about a resource, but for what servers without streamed lists refuse.
    fn requests(&self, resource: &str) -> Vec<String> {
        let is_wanted = |request: &&String| request.contains(resource) && !request.starts_with("stream");
        self.requests.lock().unwrap().iter().filter(is_wanted).cloned().collect()
    }

    async fn serve(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(self.clone().connection(stream, |_: &str| true));
        }
    }

    /// `knows` tells by the head of a request whether its credentials are known.
    async fn connection(self, stream: impl AsyncRead + AsyncWrite + Unpin, knows: impl Fn(&str) -> bool) {
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
            let verb = match (path.contains("sendInitialEvents=true"), path.contains("watch=true")) {
                (true, _) => "stream",
                (false, true) => "watch",
                (false, false) => "list",
            };
            self.requests.lock().unwrap().push(format!("{verb} {path}"));
            self.headers.lock().unwrap().clone_from(&request);
            let next = match knows(&request) {
                true => self.next(&format!("{verb} {resource}")),
                false => refused(401, "Unauthorized"),
            };
            let mut more = String::new();
            let (status, body, end) = match next {
                Answer::Json(status, body) => (status, Some(body.to_string()), None),
                Answer::Lines(lines) => (200, None, Some((lines, false))),
                Answer::LinesThenEnd(lines) => (200, None, Some((lines, true))),
                Answer::Cut => return,
                Answer::Busy(seconds) => {
                    more = format!("Retry-After: {seconds}\r\n");
                    (429, Some("too many requests".to_owned()), None)
                }
            };
            let head = format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}");
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
        let access = Access::fixed(Config::new(server.parse().unwrap()));
        let (sender, changes) = mpsc::channel(100);
        let options =
            Options { node_name: "n1".into(), service_proxy_name: service_proxy_name.map(Into::into) };
        Self { watch: start(access, options, sender), changes }
    }

    async fn of_kubeconfig(file: &Path) -> Self {
        let (sender, changes) = mpsc::channel(100);
        let options = Options { node_name: "n1".into(), service_proxy_name: None };
        Self { watch: watch(Some(file), Servers::default(), options, sender).await.unwrap(), changes }
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

fn bookmark(version: &str, annotations: Value) -> String {
    let metadata = json!({"resourceVersion": version, "annotations": annotations});
    event("BOOKMARK", &json!({"kind": "Service", "apiVersion": "v1", "metadata": metadata}))
}

#[tokio::test]
async fn a_streamed_list_is_told_as_one_and_goes_on_as_a_watch() {
    let script = Script::default();
    script.then(
        "stream services",
        Answer::Lines(vec![
            event("ADDED", &service("b", "5")),
            event("ADDED", &service("a", "6")),
            event("ADDED", &service("a", "7")),
            event("DELETED", &service("b", "8")),
            bookmark("8", json!({"k8s.io/initial-events-end": "true"})),
            event("MODIFIED", &service("a", "9")),
        ]),
    );
    let mut source = Source::start(&script).await;
    assert_eq!([source.next(Kind::Service).await, source.next(Kind::Service).await], ["=d/a", "+d/a"]);
    assert_eq!(script.requests("/services"), Vec::<String>::new(), "neither a list nor a second watch");
    let status = source.watch.status().of(Kind::Service);
    assert!(status.synced && status.connected && status.heard.is_some() && status.since.is_some());
}

#[tokio::test]
async fn a_server_that_streams_no_lists_is_asked_for_plain_ones_from_its_memory() {
    // One that is too old to know of it, as if it were a plain watch; and one that stops in the middle.
    for stream in [
        Answer::Lines(vec![event("ADDED", &service("x", "5")), bookmark("6", json!({}))]),
        Answer::LinesThenEnd(vec![event("ADDED", &service("x", "5"))]),
    ] {
        let script = Script::default();
        script.then("stream services", stream).then("list services", list(&[service("a", "5")], "7"));
        let mut source = Source::start(&script).await;
        assert_eq!(source.next(Kind::Service).await, "=d/a");
        let first = &script.requests("/services")[0];
        assert!(first.contains("resourceVersion=0&resourceVersionMatch=NotOlderThan"), "{first}");
        assert!(!first.contains("limit="), "{first}");
    }
}

#[tokio::test]
async fn a_watch_that_fails_again_and_again_is_listed_anew_and_not_older() {
    let script = Script::default();
    script.then("list services", list(&[service("a", "5")], "7"));
    for _ in 0..3 {
        script.then("watch services", Answer::Lines(vec![event("ERROR", &status(500, "cannot decode"))]));
    }
    script.then("list services", list(&[service("b", "9")], "10"));
    let mut source = Source::start(&script).await;
    assert_eq!([source.next(Kind::Service).await, source.next(Kind::Service).await], ["=d/a", "=d/b"]);
    let requests = script.requests("/services");
    assert_eq!(requests.iter().filter(|request| request.starts_with("watch")).count(), 3, "{requests:?}");
    assert!(requests[4].contains("resourceVersion=7&resourceVersionMatch=NotOlderThan"), "{requests:?}");
}

#[tokio::test]
async fn after_a_version_that_is_too_old_the_list_is_of_now() {
    let script = Script::default();
    script
        .then("list services", list(&[service("a", "5")], "7"))
        .then("watch services", refused(410, "too old"))
        .then("list services", list(&[service("b", "9")], "10"));
    let mut source = Source::start(&script).await;
    assert_eq!([source.next(Kind::Service).await, source.next(Kind::Service).await], ["=d/a", "=d/b"]);
    let requests = script.requests("/services");
    assert!(!requests[2].contains("resourceVersion") && requests[2].contains("limit=500"), "{requests:?}");
}

#[tokio::test]
async fn a_server_with_too_much_to_do_is_left_alone_for_as_long_as_it_asks() {
    let script = Script::default();
    script.then("stream services", Answer::Busy(3)).then("list services", list(&[service("a", "5")], "7"));
    let begun = std::time::Instant::now();
    let mut source = Source::start(&script).await;
    assert_eq!(source.next(Kind::Service).await, "=d/a");
    let waited = begun.elapsed();
    // At most half as long again, and what the machine takes.
    assert!((Duration::from_secs(3)..Duration::from_secs(8)).contains(&waited), "{waited:?}");
    assert!(source.watch.status().of(Kind::Service).errors == 1);
}

#[tokio::test]
async fn watches_end_at_different_times_and_lists_may_be_compressed() {
    let script = Script::default();
    let mut source = Source::start(&script).await;
    source.next(Kind::Service).await;
    while script.requests("watch").len() < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let timeouts: std::collections::BTreeSet<u32> = script
        .requests("watch")
        .iter()
        .filter_map(|request| request.split("timeoutSeconds=").nth(1)?.split('&').next()?.parse().ok())
        .collect();
    assert!(
        timeouts.len() > 1 && timeouts.iter().all(|seconds| (300..600).contains(seconds)),
        "{timeouts:?}"
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
    assert_eq!(source.watch.status().trouble(), None, "nothing is wrong that anybody must wait for");
}

#[tokio::test]
async fn an_api_server_that_is_away_tells_nothing() {
    let server = "http://127.0.0.1:1".to_owned();
    let (sender, changes) = mpsc::channel(100);
    let options = Options { node_name: "n1".into(), service_proxy_name: None };
    let watch = start(Access::fixed(Config::new(server.parse().unwrap())), options, sender);
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
