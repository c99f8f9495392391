//! Whether this node can serve what it was told: what load balancers and autoscalers ask (H1, H2); and whether the agent is
//! alive: what a kubelet asks, to start it anew where it is not (H5).
//!
//! It says what the others told it and never looks anything up itself. Load balancers take a node away for it, and mostly all nodes
//! for the same reason at the same time: so what packets do not suffer from is a warning, and no ill health.

use crate::heartbeat::{self, Heartbeat};
use crate::http::Page;
use crate::pending::Pending;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The taint by which the cluster autoscaler announces that it is about to remove the node.
pub const AUTOSCALER_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// What should be attached and is not, each with the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unattached {
    /// All of it.
    pub all: BTreeSet<String>,
    /// That without which nothing from the network is served on an uplink.
    pub deafening: BTreeSet<String>,
}

#[derive(Debug)]
struct State {
    /// Whether the kernel serves a complete snapshot, of this agent or of the one before it.
    serving: bool,
    /// Whether what arrives is written at once: this agent has written a complete snapshot.
    following: bool,
    /// When tables last reached the kernel, or were found to need no change.
    updated: SystemTime,
    /// Since when the kernel has refused all that was to be written, and its answer.
    refused: Option<(Instant, String)>,
    unattached: Unattached,
    /// Services that wait for room.
    waiting: usize,
    /// Audits in a row that found the tables changed by somebody else.
    altered: u32,
    /// Whether the Node is there to stay.
    eligible: bool,
}

/// The health of the agent and its dataplane; shared by all its parts.
#[derive(Debug)]
pub struct Health {
    state: Mutex<State>,
    pending: Pending,
    heartbeat: Heartbeat,
    patience: Duration,
    alive_within: Duration,
}

impl Health {
    /// Not serving yet; an update may wait for `patience`, and the event loop may show nothing for `alive_within`.
    pub fn new(patience: Duration, alive_within: Duration) -> Self {
        let state = State {
            serving: false,
            following: false,
            updated: SystemTime::now(),
            refused: None,
            unattached: Unattached::default(),
            waiting: 0,
            altered: 0,
            eligible: true,
        };
        let (pending, heartbeat) = (Pending::default(), Heartbeat::default());
        Self { state: Mutex::new(state), pending, heartbeat, patience, alive_within }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where sources note what they send.
    pub fn pending(&self) -> &Pending {
        &self.pending
    }

    /// Where the agent's parts show that they are at work.
    pub fn heartbeat(&self) -> &Heartbeat {
        &self.heartbeat
    }

    /// The kernel serves a complete snapshot that an earlier agent wrote.
    pub fn serving(&self) {
        self.state().serving = true;
    }

    /// This agent has written a complete snapshot.
    pub fn following(&self) {
        let mut state = self.state();
        (state.serving, state.following) = (true, true);
    }

    /// What was to be written is in the kernel: of all changes the first `taken`, which were taken up at the moment `at`.
    pub fn updated(&self, taken: u64, at: Instant) {
        self.pending.written(taken, at);
        let mut state = self.state();
        state.refused = None;
        state.updated = SystemTime::now();
    }

    /// The kernel refuses what is to be written, and its answer.
    pub fn refused(&self, answer: String) {
        let mut state = self.state();
        let since = state.refused.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        state.refused = Some((since, answer));
    }

    /// So many Services wait for room.
    pub fn waiting(&self, services: usize) {
        self.state().waiting = services;
    }

    /// An audit found so many entries that differed, and repaired them. Once may be an accident.
    pub fn audited(&self, repaired: usize) {
        let mut state = self.state();
        state.altered = if repaired > 0 { state.altered.saturating_add(1) } else { 0 };
    }

    /// What should be attached and is not, all of it.
    pub fn unattached(&self, unattached: Unattached) {
        self.state().unattached = unattached;
    }

    /// Whether all programs are attached.
    pub fn is_attached(&self) -> bool {
        self.state().unattached.all.is_empty()
    }

    /// How many programs should be attached and are not.
    pub fn count_unattached(&self) -> usize {
        self.state().unattached.all.len()
    }

    /// Whether the Node is there to stay (H1).
    pub fn eligible(&self, eligible: bool) {
        self.state().eligible = eligible;
    }

    /// Whether the Node is there to stay (H1).
    pub fn is_eligible(&self) -> bool {
        self.state().eligible
    }

    /// Why the node cannot serve what it was told (H2); `None` if it can.
    pub fn trouble(&self) -> Option<String> {
        let state = self.state();
        if !state.serving {
            return Some("there has been no complete list of objects yet".to_owned());
        }
        if !state.unattached.deafening.is_empty() {
            return Some(format!(
                "nothing from the network is served: {}",
                list(&state.unattached.deafening)
            ));
        }
        let late = |since: &Instant| since.elapsed() > self.patience;
        if let Some((since, answer)) = state.refused.as_ref().filter(|(since, _)| late(since)) {
            let seconds = since.elapsed().as_secs();
            return Some(format!("the kernel has refused every update for {seconds} s: {answer}"));
        }
        // Before the first snapshot is written, changes wait for the source to tell the rest.
        let waiting = self.pending.since().filter(|since| state.following && late(since))?;
        Some(format!("an update has been waiting for {} s: see the log", waiting.elapsed().as_secs()))
    }

    /// What somebody should look at although the node serves.
    pub fn warnings(&self) -> Vec<String> {
        let state = self.state();
        let mut warnings: Vec<_> = state.unattached.all.iter().cloned().collect();
        if state.waiting > 0 {
            warnings.push(format!("{} Services wait for room in a table: see the log", state.waiting));
        }
        if state.altered > 1 {
            warnings.push(
                "something else keeps changing the maps: the last audits had to repair them".to_owned(),
            );
        }
        warnings
    }

    /// `/healthz` (H1) and `/livez` (H5).
    pub fn page(&self, path: &str) -> Page {
        match path {
            "/healthz" => self.healthz(),
            "/livez" => self.livez(),
            _ => Page::not_found(),
        }
    }

    fn healthz(&self) -> Page {
        let trouble = self.trouble();
        let warnings = self.warnings();
        let (updated, eligible) = {
            let state = self.state();
            (state.updated, state.eligible)
        };
        let healthy = trouble.is_none() && eligible;
        // As kube-proxy: of a healthy proxy the last update is now, however long nothing has changed.
        let mut body = times(if trouble.is_none() { SystemTime::now() } else { updated });
        body["nodeEligible"] = json!(eligible);
        if let Some(trouble) = trouble {
            body["reason"] = json!(trouble);
        }
        if !warnings.is_empty() {
            body["warnings"] = json!(warnings);
        }
        Page::json(if healthy { 200 } else { 503 }, &body)
    }

    /// The agent's parts that hang (H5), and for how long.
    pub fn silent(&self) -> Vec<(&'static str, Duration)> {
        let now = Instant::now();
        let mut silent = self.heartbeat.silent(now, self.alive_within);
        silent.extend(heartbeat::log().silent(now, self.alive_within));
        silent
    }

    fn livez(&self) -> Page {
        let silent = self.silent();
        let updated = self.state().updated;
        let mut body = times(if silent.is_empty() { SystemTime::now() } else { updated });
        if silent.is_empty() {
            return Page::json(200, &body);
        }
        let silent: Vec<_> = silent
            .iter()
            .map(|(part, time)| format!("{part} has shown nothing for {} s", time.as_secs()))
            .collect();
        body["reason"] = json!(silent.join(", "));
        Page::json(503, &body)
    }
}

fn list(texts: &BTreeSet<String>) -> String {
    texts.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn times(updated: SystemTime) -> Value {
    json!({ "lastUpdated": timestamp(updated), "currentTime": timestamp(SystemTime::now()) })
}

/// A moment as Kubernetes writes it.
fn timestamp(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| format!("{time:.3}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIVE: Duration = Duration::from_secs(60);

    fn serving(patience: Duration) -> Health {
        let health = Health::new(patience, ALIVE);
        health.following();
        health
    }

    fn status(health: &Health, path: &str) -> u16 {
        health.page(path).status
    }

    fn body(health: &Health, path: &str) -> Value {
        serde_json::from_str(&health.page(path).body).unwrap()
    }

    fn set(texts: &[&str]) -> BTreeSet<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    /// H1
    #[test]
    fn a_node_that_serves_is_healthy() {
        let health = serving(Duration::from_secs(60));
        let page = health.page("/healthz");
        assert_eq!((page.status, page.content_type), (200, "application/json"));
        let body = body(&health, "/healthz");
        assert_eq!(body["nodeEligible"], true);
        assert!(body["lastUpdated"].as_str().unwrap().ends_with('Z'));
        assert!(body["currentTime"].is_string() && body.get("warnings").is_none());
        assert_eq!(status(&health, "/elsewhere"), 404);
    }

    /// H1, H5
    #[test]
    fn a_node_that_goes_is_not_healthy_but_alive() {
        let health = serving(Duration::from_secs(60));
        health.eligible(false);
        assert_eq!((status(&health, "/healthz"), status(&health, "/livez")), (503, 200));
    }

    /// H2: also where nobody takes it up.
    #[test]
    fn an_update_that_waits_too_long_is_unhealthy_until_it_is_in() {
        let health = serving(Duration::ZERO);
        health.pending().sent(Instant::now());
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!((status(&health, "/healthz"), status(&health, "/livez")), (503, 200));
        health.updated(1, Instant::now());
        assert_eq!(status(&health, "/healthz"), 200);
    }

    /// H2: what an earlier agent wrote is served, however long the API server takes to tell the rest.
    #[test]
    fn before_the_first_complete_list_no_update_waits() {
        let health = Health::new(Duration::ZERO, ALIVE);
        assert_eq!((status(&health, "/healthz"), status(&health, "/livez")), (503, 200));
        health.serving();
        health.pending().sent(Instant::now());
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(status(&health, "/healthz"), 200);
        health.following();
        assert_eq!(status(&health, "/healthz"), 503);
    }

    /// H2
    #[test]
    fn a_program_that_another_one_blocks_is_a_warning_and_an_uplink_without_one_is_unhealthy() {
        let health = serving(Duration::from_secs(60));
        health.unattached(Unattached { all: set(&["connect4: blocked"]), ..Unattached::default() });
        assert_eq!((status(&health, "/healthz"), health.is_attached()), (200, false));
        assert_eq!(body(&health, "/healthz")["warnings"], json!(["connect4: blocked"]));
        let both = set(&["connect4: blocked", "tc_uplink_in: refused"]);
        health.unattached(Unattached { all: both, deafening: set(&["tc_uplink_in: refused"]) });
        assert_eq!((status(&health, "/healthz"), status(&health, "/livez")), (503, 200));
        assert!(body(&health, "/healthz")["reason"].as_str().unwrap().contains("tc_uplink_in"));
        health.unattached(Unattached::default());
        assert_eq!((status(&health, "/healthz"), health.is_attached()), (200, true));
    }

    /// H2, Z5
    #[test]
    fn tables_that_somebody_keeps_changing_and_services_without_room_are_warnings() {
        let health = serving(Duration::ZERO);
        health.audited(3);
        assert!(health.warnings().is_empty(), "they were repaired");
        health.audited(1);
        health.waiting(2);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!((status(&health, "/healthz"), health.warnings().len()), (200, 2));
        health.audited(0);
        health.waiting(0);
        assert!(health.warnings().is_empty());
    }

    /// H2
    #[test]
    fn a_kernel_that_refuses_every_update_is_unhealthy_after_a_while_and_its_answer_is_told() {
        let health = serving(Duration::from_millis(20));
        health.refused("cannot write map `frontends`".to_owned());
        assert_eq!(status(&health, "/healthz"), 200);
        std::thread::sleep(Duration::from_millis(40));
        health.refused("cannot write map `slots`".to_owned());
        let page = health.page("/healthz");
        assert!(page.status == 503 && page.body.contains("`slots`"), "{page:?}");
        health.updated(0, Instant::now());
        assert_eq!(status(&health, "/healthz"), 200);
    }

    /// H5
    #[test]
    fn a_part_that_hangs_is_not_alive() {
        let health = Health::new(Duration::from_secs(60), Duration::from_millis(20));
        let _other = health.heartbeat().part("other", 1_000);
        let part = health.heartbeat().part("the event loop", 1);
        assert_eq!(status(&health, "/livez"), 200, "whatever it serves");
        std::thread::sleep(Duration::from_millis(30));
        let page = health.page("/livez");
        assert!(page.status == 503 && page.body.contains("the event loop has shown nothing"), "{page:?}");
        drop(part);
        assert_eq!(status(&health, "/livez"), 200);
    }

    /// H1
    #[tokio::test]
    async fn load_balancers_ask_over_http() {
        use crate::http::client::{free_port, get};
        let health = std::sync::Arc::new(serving(Duration::from_secs(60)));
        health.eligible(false);
        let (asked, port) = (health.clone(), free_port());
        let pages = crate::http::at_once(move |path| asked.page(path));
        let gate = crate::http::Gate::default();
        tokio::spawn(crate::http::serve("health", ([0, 0, 0, 0], port).into(), gate, pages));
        for host in ["127.0.0.1", "::1"] {
            let address = std::net::SocketAddr::new(host.parse().unwrap(), port);
            let answer = get(address, "/healthz").await;
            assert_eq!((answer.status, answer.json()["nodeEligible"].as_bool()), (503, Some(false)));
            assert_eq!(answer.header("content-type"), Some("application/json"));
            assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
            let answer = get(address, "/livez").await;
            assert_eq!((answer.status, answer.json().get("nodeEligible")), (200, None));
            assert_eq!(get(address, "/").await.status, 404);
        }
    }
}
