//! The health check ports of Services (S4): load balancers ask there whether this node has an endpoint.
//!
//! What is told is looked up when somebody asks, so a change of endpoints needs no server. A port that cannot be had costs
//! that port only, and is tried again; nothing here holds up the dataplane.

use crate::compile::HealthCheck;
use crate::health::Health;
use crate::http::{self, Gate, Page};
use crate::model::ObjectName;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// A Service and where its health check is served.
type Place = (ObjectName, SocketAddr);

#[derive(Debug, Default)]
struct State {
    checks: BTreeMap<ObjectName, HealthCheck>,
    /// Where node ports answer (P17); `None` for every address.
    addresses: Option<BTreeSet<IpAddr>>,
}

/// The health checks that there should be now.
#[derive(Debug, Default)]
pub struct HealthChecks {
    state: Mutex<State>,
    changed: Notify,
    unbound: AtomicUsize,
}

/// A health check port that cannot be had.
#[derive(Debug)]
pub struct Unbound<'a> {
    /// The Service.
    pub service: &'a ObjectName,
    /// Its `metadata.uid`.
    pub uid: Arc<str>,
    /// Address and port.
    pub address: SocketAddr,
    /// The kernel's answer.
    pub error: io::Error,
}

/// The body of an answer, in kube-proxy's order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

impl HealthChecks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the health checks of Services tell from now on; `None` where there is none (any more). All at once: a port may
    /// go from one Service to another.
    pub fn set(&self, checks: impl IntoIterator<Item = (ObjectName, Option<HealthCheck>)>) {
        let shape = |check: &HealthCheck| (check.port, check.endpoints.map(|count| count.is_some()));
        let mut changed = false;
        let mut state = self.state();
        for (service, check) in checks {
            let wanted = check.as_ref().map(shape);
            let before = match check {
                Some(check) => state.checks.insert(service, check),
                None => state.checks.remove(&service),
            };
            changed |= before.as_ref().map(shape) != wanted;
        }
        if changed {
            self.changed.notify_one();
        }
    }

    /// The addresses on which node ports answer; `None` for every address (P17).
    pub fn set_addresses(&self, addresses: Option<BTreeSet<IpAddr>>) {
        let mut state = self.state();
        if state.addresses != addresses {
            state.addresses = addresses;
            self.changed.notify_one();
        }
    }

    /// How many health check ports cannot be had now, counted per address.
    pub fn unbound(&self) -> usize {
        self.unbound.load(Relaxed)
    }

    /// Every place where there should be a server, and the uid of its Service.
    fn places(&self) -> BTreeMap<Place, Arc<str>> {
        let state = self.state();
        let everywhere = BTreeSet::from([Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]);
        let addresses = state.addresses.as_ref().unwrap_or(&everywhere);
        let mut places = BTreeMap::new();
        for (name, check) in &state.checks {
            for ip in addresses.iter().filter(|ip| check.endpoints[usize::from(ip.is_ipv6())].is_some()) {
                places.insert((name.clone(), SocketAddr::new(*ip, check.port)), check.uid.clone());
            }
        }
        places
    }

    /// S4: any path; 200 if there is an endpoint and the agent is healthy.
    fn page(&self, service: &ObjectName, ipv6: bool, healthy: bool) -> Page {
        let state = self.state();
        let endpoints = state.checks.get(service).and_then(|check| check.endpoints[usize::from(ipv6)]);
        let count = endpoints.unwrap_or_default();
        let body = Body {
            service: Name { namespace: &service.namespace, name: &service.name },
            local_endpoints: count,
            service_proxy_healthy: healthy,
        };
        Page {
            status: if count > 0 && healthy { 200 } else { 503 },
            content_type: "application/json",
            headers: vec![("x-load-balancing-endpoint-weight", count.to_string())],
            body: serde_json::to_string(&body).unwrap_or_default(),
        }
    }
}

/// Keeps a server at each place until the task is aborted, and tells once of each that cannot be had.
pub async fn serve(checks: Arc<HealthChecks>, health: Arc<Health>, gate: Gate, tell: impl Fn(&Unbound<'_>)) {
    let mut servers: BTreeMap<Place, JoinHandle<()>> = BTreeMap::new();
    let mut unbound: BTreeMap<Place, Refused> = BTreeMap::new();
    loop {
        let places = checks.places();
        unbound.retain(|place, _| places.contains_key(place));
        let gone: Vec<_> = servers.extract_if(.., |place, _| !places.contains_key(place)).collect();
        for (_, server) in gone {
            server.abort();
            // Its port is free only when it is gone, and another Service may want it now.
            let _ = server.await;
        }
        for (place, uid) in places {
            if servers.contains_key(&place) {
                continue;
            }
            let (service, address) = &place;
            match http::bind(*address) {
                Ok(listener) => {
                    unbound.remove(&place);
                    tracing::debug!("health check of Service {service} at http://{address}");
                    let pages = pages(&checks, &health, &place);
                    let server = tokio::spawn(http::answer_all(listener, gate.clone(), pages));
                    servers.insert(place, server);
                }
                Err(error) if address.ip().is_unspecified() && http::is_without_family(&error) => {}
                Err(error) => {
                    let refused = unbound.entry(place.clone()).or_default();
                    if refused.is_to_be_told(&error, Instant::now()) {
                        tell(&Unbound { service, uid, address: *address, error });
                    }
                }
            }
        }
        checks.unbound.store(unbound.len(), Relaxed);
        tokio::select! {
            () = checks.changed.notified() => {}
            () = tokio::time::sleep(http::RETRY), if !unbound.is_empty() => {}
        }
    }
}

/// Since when a place cannot be had.
#[derive(Debug, Default)]
struct Refused {
    since: Option<Instant>,
    told: bool,
}

impl Refused {
    /// Whether people should hear of it, and have not. An address that is new is not there for a moment: the kernel asks
    /// first whether somebody else has it (IPv6's duplicate address detection).
    fn is_to_be_told(&mut self, error: &io::Error, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let may_pass = error.kind() == io::ErrorKind::AddrNotAvailable;
        if may_pass && now.duration_since(since) < http::RETRY {
            return false;
        }
        !std::mem::replace(&mut self.told, true)
    }
}

fn pages(checks: &Arc<HealthChecks>, health: &Arc<Health>, (service, address): &Place) -> http::Pages {
    let (checks, health, service, ipv6) =
        (checks.clone(), health.clone(), service.clone(), address.is_ipv6());
    http::at_once(move |_| checks.page(&service, ipv6, health.trouble().is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Unattached;
    use crate::http::client::{free_port, get, try_get};
    use crate::model::samples::name;
    use std::time::Duration;

    fn check(port: u16, v4: Option<usize>, v6: Option<usize>) -> Option<HealthCheck> {
        Some(HealthCheck { uid: "".into(), port, endpoints: [v4, v6] })
    }

    fn at(host: &str, port: u16) -> SocketAddr {
        SocketAddr::new(host.parse().unwrap(), port)
    }

    fn started() -> (Arc<HealthChecks>, Arc<Health>, Arc<Mutex<Vec<String>>>) {
        let (checks, health) =
            (Arc::new(HealthChecks::default()), Arc::new(Health::new(Duration::MAX, Duration::MAX)));
        health.serving();
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = {
            let told = told.clone();
            move |unbound: &Unbound<'_>| {
                told.lock().unwrap().push(format!("{} {}", unbound.service, unbound.address))
            }
        };
        tokio::spawn(serve(checks.clone(), health.clone(), Gate::default(), tell));
        (checks, health, told)
    }

    async fn until(condition: impl Fn() -> bool) {
        for _ in 0..4_000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never came true");
    }

    /// S4
    #[tokio::test]
    async fn any_path_tells_the_local_endpoints_of_the_family_asked_over() {
        let (checks, _, _) = started();
        let port = free_port();
        checks.set([(name("web"), check(port, Some(2), Some(1)))]);
        let answer = get(at("127.0.0.1", port), "/any/path?at=all").await;
        assert_eq!(answer.status, 200);
        assert_eq!(
            answer.body,
            r#"{"service":{"namespace":"default","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}"#
        );
        assert_eq!(answer.header("Content-Type"), Some("application/json"));
        assert_eq!(answer.header("X-Content-Type-Options"), Some("nosniff"));
        assert_eq!(answer.header("X-Load-Balancing-Endpoint-Weight"), Some("2"));
        let answer = get(at("::1", port), "/").await;
        assert_eq!((answer.status, answer.json()["localEndpoints"].as_u64()), (200, Some(1)));
    }

    /// S4
    #[tokio::test]
    async fn without_an_endpoint_or_without_health_it_is_503() {
        let (checks, health, _) = started();
        let port = free_port();
        checks.set([(name("web"), check(port, Some(0), None))]);
        let answer = get(at("127.0.0.1", port), "/").await;
        assert_eq!((answer.status, answer.json()["serviceProxyHealthy"].as_bool()), (503, Some(true)));
        assert_eq!(answer.header("X-Load-Balancing-Endpoint-Weight"), Some("0"));
        assert!(try_get(at("::1", port), "/").await.is_none(), "the Service has no IPv6");
        checks.set([(name("web"), check(port, Some(3), None))]);
        assert_eq!(get(at("127.0.0.1", port), "/").await.status, 200);
        let deaf = BTreeSet::from(["tc_uplink_in".to_owned()]);
        health.unattached(Unattached { all: deaf.clone(), deafening: deaf });
        let answer = get(at("127.0.0.1", port), "/").await;
        assert_eq!((answer.status, answer.json()["serviceProxyHealthy"].as_bool()), (503, Some(false)));
        assert_eq!(answer.json()["localEndpoints"].as_u64(), Some(3));
        // S4 asks for the agent's health, not for the Node's stay (H1).
        health.unattached(Unattached::default());
        health.eligible(false);
        assert_eq!(get(at("127.0.0.1", port), "/").await.status, 200);
    }

    /// S4
    #[tokio::test]
    async fn a_port_moves_and_goes_with_its_service() {
        let (checks, _, told) = started();
        let (first, second) = (free_port(), free_port());
        checks.set([(name("web"), check(first, Some(1), None))]);
        assert_eq!(get(at("127.0.0.1", first), "/").await.status, 200);
        checks.set([(name("web"), check(second, Some(1), None))]);
        checks.set([(name("other"), check(first, Some(0), None))]);
        assert_eq!(get(at("127.0.0.1", second), "/").await.json()["service"]["name"], "web");
        assert_eq!(get(at("127.0.0.1", first), "/").await.json()["service"]["name"], "other");
        checks.set([(name("web"), None)]);
        checks.set([(name("other"), None)]);
        for port in [first, second] {
            while try_get(at("127.0.0.1", port), "/").await.is_some() {}
        }
        assert!(told.lock().unwrap().is_empty());
    }

    /// S4
    #[tokio::test]
    async fn a_port_that_is_taken_is_told_once_tried_again_and_harms_no_other() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (checks, _, told) = started();
        checks.set_addresses(Some(BTreeSet::from([Ipv4Addr::LOCALHOST.into()])));
        let port = taken.local_addr().unwrap().port();
        checks.set([(name("web"), check(port, Some(1), None))]);
        let other = free_port();
        checks.set([(name("other"), check(other, Some(1), None))]);
        assert_eq!(get(at("127.0.0.1", other), "/").await.status, 200);
        until(|| checks.unbound() == 1).await;
        assert_eq!(*told.lock().unwrap(), [format!("default/web 127.0.0.1:{port}")]);
        drop(taken);
        until(|| checks.unbound() == 0).await;
        assert_eq!(get(at("127.0.0.1", port), "/").await.status, 200);
        assert_eq!(told.lock().unwrap().len(), 1);
    }

    /// S4
    #[test]
    fn an_address_that_is_not_there_for_a_moment_is_not_told() {
        let (begin, mut refused) = (Instant::now(), Refused::default());
        let tentative = || io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
        assert!(!refused.is_to_be_told(&tentative(), begin));
        assert!(!refused.is_to_be_told(&tentative(), begin + Duration::from_secs(1)));
        assert!(refused.is_to_be_told(&tentative(), begin + http::RETRY));
        assert!(!refused.is_to_be_told(&tentative(), begin + http::RETRY * 2), "once");
        let taken = io::Error::from_raw_os_error(libc::EADDRINUSE);
        assert!(Refused::default().is_to_be_told(&taken, begin), "that does not pass by itself");
    }

    /// S4, P17
    #[tokio::test]
    async fn it_answers_where_node_ports_do() {
        let (checks, _, _) = started();
        let port = free_port();
        checks.set_addresses(Some(BTreeSet::from([Ipv4Addr::new(127, 0, 0, 2).into()])));
        checks.set([(name("web"), check(port, Some(1), Some(1)))]);
        assert_eq!(get(at("127.0.0.2", port), "/").await.status, 200);
        assert!(try_get(at("127.0.0.1", port), "/").await.is_none());
        checks.set_addresses(None);
        assert_eq!(get(at("::1", port), "/").await.status, 200);
        assert_eq!(get(at("127.0.0.1", port), "/").await.status, 200);
    }
}
