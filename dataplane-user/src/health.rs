//! Whether this node serves its Services: what load balancers and autoscalers ask (H1, H2).
//!
//! It says what the others told it and never looks anything up itself.

use crate::http::Page;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The taint by which the cluster autoscaler announces that it is about to remove the node.
pub const AUTOSCALER_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

#[derive(Debug)]
struct State {
    /// Whether the kernel holds a complete snapshot, of this agent or of the one before it.
    serving: bool,
    /// When tables last reached the kernel, or were found to need no change.
    updated: SystemTime,
    /// Since when an update has been waiting.
    waiting: Option<Instant>,
    /// What should be attached and is not.
    detached: BTreeSet<String>,
    /// Why the tables are not what they should be.
    faults: Option<String>,
    /// Audits in a row that found the tables changed by somebody else.
    altered: u32,
    /// Whether the Node is there to stay.
    eligible: bool,
}

/// The health of the agent and its dataplane; shared by all its parts.
#[derive(Debug)]
pub struct Health {
    state: Mutex<State>,
    patience: Duration,
}

impl Health {
    /// Not serving yet; an update may wait for `patience`.
    pub fn new(patience: Duration) -> Self {
        let state = State {
            serving: false,
            updated: SystemTime::now(),
            waiting: None,
            detached: BTreeSet::new(),
            faults: None,
            altered: 0,
            eligible: true,
        };
        Self { state: Mutex::new(state), patience }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel holds a complete snapshot.
    pub fn serving(&self) {
        self.state().serving = true;
    }

    /// An update has arrived and is not in the kernel yet.
    pub fn queued(&self) {
        self.state().waiting.get_or_insert_with(Instant::now);
    }

    /// All that arrived is in the kernel.
    pub fn updated(&self) {
        let mut state = self.state();
        state.waiting = None;
        state.faults = None;
        state.updated = SystemTime::now();
    }

    /// The tables are not what they should be, and what is wrong.
    pub fn fault(&self, fault: String) {
        let mut state = self.state();
        state.waiting.get_or_insert_with(Instant::now);
        state.faults = Some(fault);
    }

    /// An audit found so many entries that differed, and repaired them. Once may be an accident.
    pub fn audited(&self, repaired: usize) {
        let mut state = self.state();
        state.altered = if repaired > 0 { state.altered.saturating_add(1) } else { 0 };
    }

    /// What should be attached and is not, all of it.
    pub fn detached(&self, hooks: BTreeSet<String>) {
        self.state().detached = hooks;
    }

    /// Whether all programs are attached.
    pub fn is_attached(&self) -> bool {
        self.state().detached.is_empty()
    }

    /// Whether the Node is there to stay (H1).
    pub fn eligible(&self, eligible: bool) {
        self.state().eligible = eligible;
    }

    /// Why the dataplane is not healthy (H2); `None` if it is.
    pub fn trouble(&self) -> Option<String> {
        let state = self.state();
        if !state.serving {
            return Some("there has been no complete list of objects yet".to_owned());
        }
        if !state.detached.is_empty() {
            let hooks: Vec<_> = state.detached.iter().map(String::as_str).collect();
            return Some(format!("not attached: {}", hooks.join(", ")));
        }
        if state.altered > 1 {
            return Some(
                "something else keeps changing the maps: the last audits had to repair them".to_owned(),
            );
        }
        let waited = state.waiting.map(|since| since.elapsed())?;
        (waited > self.patience).then(|| {
            let fault = state.faults.as_deref().unwrap_or("see the log");
            format!("an update has been waiting for {} s: {fault}", waited.as_secs())
        })
    }

    /// `/healthz` and `/livez` (H1).
    pub fn page(&self, path: &str) -> Page {
        match path {
            "/healthz" => self.report(true),
            "/livez" => self.report(false),
            _ => Page::not_found(),
        }
    }

    fn report(&self, with_eligibility: bool) -> Page {
        let trouble = self.trouble();
        let (updated, eligible) = {
            let state = self.state();
            (state.updated, state.eligible)
        };
        let now = SystemTime::now();
        // As kube-proxy: of a healthy proxy the last update is now, however long nothing has changed.
        let updated = if trouble.is_none() { now } else { updated };
        let mut body = json!({ "lastUpdated": timestamp(updated), "currentTime": timestamp(now) });
        if with_eligibility {
            body["nodeEligible"] = json!(eligible);
        }
        let healthy = trouble.is_none() && (eligible || !with_eligibility);
        if let Some(trouble) = trouble {
            body["reason"] = json!(trouble);
        }
        Page::json(if healthy { 200 } else { 503 }, &body)
    }
}

/// A moment as Kubernetes writes it.
fn timestamp(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| format!("{time:.3}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serving(patience: Duration) -> Health {
        let health = Health::new(patience);
        health.serving();
        health
    }

    fn status(health: &Health, path: &str) -> u16 {
        health.page(path).status
    }

    /// H1
    #[test]
    fn a_node_that_serves_is_healthy() {
        let health = serving(Duration::from_secs(60));
        let page = health.page("/healthz");
        assert_eq!((page.status, page.content_type), (200, "application/json"));
        let body: serde_json::Value = serde_json::from_str(&page.body).unwrap();
        assert_eq!(body["nodeEligible"], true);
        assert!(body["lastUpdated"].as_str().unwrap().ends_with('Z'));
        assert!(body["currentTime"].is_string());
        assert_eq!(status(&health, "/elsewhere"), 404);
    }

    /// H1
    #[test]
    fn a_node_that_goes_is_not_healthy_but_alive() {
        let health = serving(Duration::from_secs(60));
        health.eligible(false);
        assert_eq!((status(&health, "/healthz"), status(&health, "/livez")), (503, 200));
    }

    /// H2
    #[test]
    fn an_update_that_waits_too_long_is_unhealthy_until_it_is_in() {
        let health = serving(Duration::ZERO);
        health.queued();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!((status(&health, "/healthz"), status(&health, "/livez")), (503, 503));
        health.updated();
        assert_eq!(status(&health, "/healthz"), 200);
    }

    /// H2
    #[test]
    fn a_program_that_is_not_attached_is_unhealthy_and_named() {
        let health = serving(Duration::from_secs(60));
        health.detached(BTreeSet::from(["tc_uplink_in-2".to_owned()]));
        let page = health.page("/livez");
        assert_eq!(page.status, 503);
        assert!(page.body.contains("tc_uplink_in-2"), "{}", page.body);
    }

    /// H2
    #[test]
    fn tables_that_somebody_keeps_changing_are_unhealthy() {
        let health = serving(Duration::from_secs(60));
        health.audited(3);
        assert_eq!(status(&health, "/livez"), 200, "they were repaired");
        health.audited(1);
        assert_eq!(status(&health, "/livez"), 503);
        health.audited(0);
        assert_eq!(status(&health, "/livez"), 200);
    }

    /// H2
    #[test]
    fn what_the_kernel_refuses_is_unhealthy_after_a_while_and_named() {
        let health = serving(Duration::from_millis(1));
        health.fault("map `frontends` is full".to_owned());
        std::thread::sleep(Duration::from_millis(5));
        let page = health.page("/healthz");
        assert!(page.status == 503 && page.body.contains("`frontends` is full"), "{page:?}");
        health.updated();
        assert_eq!(status(&health, "/healthz"), 200);
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

    #[test]
    fn before_the_first_snapshot_there_is_no_health() {
        assert_eq!(status(&Health::new(Duration::from_secs(60)), "/healthz"), 503);
    }
}
