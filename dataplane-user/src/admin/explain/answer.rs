//! The answer, put together from what the programs did, what the tables hold and what the agent knows.

use super::ends::Ends;
use super::{Client, EndpointLine, Explanation, Outcome, ServiceFacts, members};
use crate::admin::AdminError;
use crate::admin::columns::short_time;
use crate::admin::flows::host_and_port;
use crate::admin::names::Names;
use crate::admin::services::{algorithm_name, kind_name};
use crate::admin::status::Verdict;
use crate::agent::node_name;
use crate::compile::{self, Context, OwnAddresses};
use crate::config::ExplainArgs;
use crate::kernel::rehearsal::{Fate, Rehearsal};
use crate::kernel::whereabouts::Meeting;
use crate::model::{Change, ObjectName, Store};
use crate::snapshot::{self, Owner};
use crate::status::endpoints::{self, EndpointFacts, ServiceEndpoints};
use crate::status::local;
use dataplane_common::backend::BackendStatus;
use dataplane_common::drop::Reason;
use dataplane_common::flow::Flow;
use dataplane_common::frontend::{Frontend, FrontendKind};
use dataplane_common::service::{Policy, Service};
use dataplane_common::tables::OpenCounts;
use std::sync::Arc;
use std::time::SystemTime;

impl Explanation {
    pub(super) fn new(ends: &Ends, meeting: &Meeting, outcome: &Outcome) -> Self {
        let mut explanation = Self {
            verdict: Verdict::Well,
            conclusion: String::new(),
            reason: None,
            protocol: ends.protocol.to_string(),
            from: if ends.from.port() == 0 { ends.from.ip().to_string() } else { ends.from.to_string() },
            to: ends.to.to_string(),
            client: ends.client,
            interface: meeting.interface.clone(),
            program: outcome.program,
            passed_by_xdp: meeting.xdp && outcome.program == meeting.program,
            socket_hook: None,
            service: None,
            endpoints: Vec::new(),
            endpoints_unknown: None,
            known_flow: false,
            translated_source: None,
            past_stack: false,
            way: None,
        };
        match &outcome.fate {
            Fate::Served { flow, past_stack, known } => {
                explanation.served(ends, outcome, flow, *past_stack, *known)
            }
            Fate::Dropped(reason) => explanation.ended("dropped without an answer", *reason),
            Fate::Refused(reason) => explanation.ended("refused", *reason),
            Fate::Untouched => {
                explanation.verdict = Verdict::Warning;
                explanation.conclusion =
                    "none of Portolan's: no Service has this address, port and protocol here, and it goes on as it came (Z4)"
                        .to_owned();
            }
        }
        explanation
    }

    fn served(&mut self, ends: &Ends, outcome: &Outcome, flow: &Flow, past_stack: bool, known: bool) {
        (self.past_stack, self.known_flow) = (past_stack, known);
        let source = flow.src.to_ip();
        if source != ends.from.ip() {
            self.translated_source = Some(source.to_string());
        } else if flow.has(Flow::MASQUERADED) {
            self.translated_source = Some("an address of this node, by netfilter".to_owned());
        }
        let list = |all: Vec<String>| match all.len() {
            0..=4 => all.join(", "),
            more => format!("{} or {} others", all[..3].join(", "), more - 3),
        };
        let endpoints = list(outcome.chosen.keys().map(ToString::to_string).collect());
        self.conclusion =
            if known { format!("goes on to {endpoints}") } else { format!("would connect to {endpoints}") };
    }

    fn ended(&mut self, how: &str, reason: Reason) {
        self.verdict = Verdict::Failing;
        self.reason = Some(reason.label());
        self.conclusion = format!("{how}: {} ({})", reason.help().trim(), reason.label());
    }

    pub(super) fn tell_service(&mut self, names: &Names, frontend: Frontend, service: &Service) {
        let kind = frontend.kind().unwrap_or(FrontendKind::ClosedPort);
        self.service = kind_name(kind).map(|kind| ServiceFacts {
            name: names.name(frontend.service()),
            kind,
            internal_local: service.policy.has(Policy::INTERNAL_LOCAL),
            external_local: service.policy.has(Policy::EXTERNAL_LOCAL),
            affinity_seconds: service.policy.affinity_seconds(),
            algorithm: algorithm_name(service),
            source_ranges: service.policy.has(Policy::SOURCE_RANGES),
            cluster_endpoints: 0,
            local_endpoints: 0,
        });
    }

    /// The endpoints of the set that the connection has. Which it has shows in those that were chosen.
    pub(super) fn tell_endpoints(
        &mut self,
        rehearsal: &Rehearsal,
        outcome: &Outcome,
        service: &Service,
    ) -> Result<(), AdminError> {
        let [cluster, local] = [service.cluster, service.local].map(|set| members(rehearsal, set));
        let [cluster, local] = [cluster?, local?];
        if let Some(service) = &mut self.service {
            (service.cluster_endpoints, service.local_endpoints) = (cluster.len(), local.len());
        }
        let is_local =
            outcome.chosen.keys().all(|endpoint| local.contains_key(endpoint)) && !local.is_empty();
        let set = if is_local && local.len() < cluster.len() || cluster.is_empty() { local } else { cluster };
        let open = rehearsal.live().map::<OpenCounts>()?;
        for (endpoint, (id, backend)) in &set {
            self.endpoints.push(EndpointLine {
                endpoint: endpoint.to_string(),
                node: backend.status().has(BackendStatus::LOCAL).then(|| "this node".to_owned()),
                open: open.get(id)?.unwrap_or_default().count(),
                chosen: outcome.chosen.get(endpoint).copied().unwrap_or_default(),
                left_out: None,
            });
        }
        Ok(())
    }

    /// Adds what the agent knows.
    pub(super) fn ask_agent(&mut self, args: &ExplainArgs, names: &Names, service: u32, ends: &Ends) {
        let name = names.name(service);
        let (object, port) = name.split_once(':').unwrap_or((&name, ""));
        let asked = local::ask(&args.show.bpffs, &format!("{}{object}", endpoints::PATH))
            .map_err(|error| error.to_string())
            .and_then(|text| {
                serde_json::from_str::<ServiceEndpoints>(&text).map_err(|error| error.to_string())
            });
        let told = match asked {
            Ok(told) => told,
            Err(error) => match of_snapshot(args, object) {
                Some((told, age)) => {
                    self.endpoints_unknown =
                        Some(format!("{error}; so this is of the snapshot, {} old", short_time(age)));
                    told
                }
                None => {
                    self.endpoints_unknown = Some(error);
                    return;
                }
            },
        };
        let protocol = ends.protocol.to_string();
        let same = told
            .ports
            .into_iter()
            .filter(|it| it.port == port && it.protocol == protocol && it.ipv6 == ends.to.is_ipv6());
        let local_set = self.has_local_set();
        for fact in same.flat_map(|port| port.endpoints) {
            self.add_fact(&fact, local_set);
        }
    }

    /// Whether policies give the set of this node (P2, P3, P7, P9).
    fn has_local_set(&self) -> bool {
        self.service.as_ref().is_some_and(|service| match (service.kind, self.client) {
            ("ClusterIP", _) => service.internal_local,
            (_, Client::Outside) => service.external_local,
            (_, Client::Pod | Client::Node) => false,
        })
    }

    fn add_fact(&mut self, fact: &EndpointFacts, local_set: bool) {
        let endpoint = host_and_port(&fact.address, fact.port);
        let left_out = if local_set { &fact.not_in_local_set } else { &fact.not_in_cluster_set };
        match self.endpoints.iter_mut().find(|line| line.endpoint == endpoint) {
            Some(line) => line.node = fact.node.clone().or(line.node.take()),
            None => self.endpoints.push(EndpointLine {
                endpoint,
                node: fact.node.clone(),
                open: 0,
                chosen: 0,
                left_out: Some(left_out.clone().unwrap_or_else(|| "not in the kernel yet".to_owned())),
            }),
        }
    }
}

/// The endpoints of a Service as the agent last kept them on disk, and how many seconds ago that was.
fn of_snapshot(args: &ExplainArgs, service: &str) -> Option<(ServiceEndpoints, u64)> {
    let (namespace, name) = service.split_once('/')?;
    let (service, node) = (ObjectName::new(namespace, name), node_name(args.node_name.as_deref()));
    let proxy_name = args.service_proxy_name.as_deref().map(Arc::from);
    let owner = Owner { node: node.clone(), proxy_name: proxy_name.clone() };
    let loaded = snapshot::File::new(&args.state_dir, owner).look()?;
    let mut store = Store::new(node);
    loaded.objects.into_iter().for_each(|object| drop(store.apply(Change::Applied(object))));
    let context = Context::new(&store, proxy_name, &[], &OwnAddresses::default());
    let ports = compile::explain(store.service(&service)?, store.slices(&service), &context);
    let age = SystemTime::now().duration_since(loaded.taken).unwrap_or_default();
    Some((ServiceEndpoints { zone: context.zone.as_deref().map(str::to_owned), ports }, age.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cli, Command};
    use crate::model::Object;
    use crate::model::samples::{endpoint, service, slice};
    use clap::Parser as _;
    use std::time::Duration;

    /// H6: where no agent answers, its snapshot is read, and stays as it is.
    #[test]
    fn the_snapshot_tells_of_endpoints_and_how_old_it_is() {
        let folder = std::env::temp_dir().join(format!("portolan-explain-{}", std::process::id()));
        let mut store = Store::new("n1");
        let mut unready = endpoint("10.1.0.2", "n1");
        unready.ready = false;
        store.apply(Change::Applied(Object::Service(service("web"))));
        let slice = slice("web-1", "web", vec![endpoint("10.1.0.1", "n1"), unready]);
        store.apply(Change::Applied(Object::EndpointSlice(slice)));
        let owner = Owner { node: "n1".into(), proxy_name: None };
        let taken = SystemTime::now() - Duration::from_secs(90);
        snapshot::File::new(&folder, owner).save(&store.share(), taken).unwrap();
        let args = |node: &str| {
            let state = folder.to_str().unwrap();
            let words =
                ["portolan", "explain", "node", "default/web", "--node-name", node, "--state-dir", state];
            let Command::Explain(args) = Cli::try_parse_from(words).unwrap().command else {
                panic!("another verb")
            };
            args
        };
        let (told, age) = of_snapshot(&args("N1"), "default/web").unwrap();
        assert!((90..95).contains(&age), "{age}");
        let reasons: Vec<_> =
            told.ports[0].endpoints.iter().map(|endpoint| endpoint.not_in_cluster_set.as_deref()).collect();
        assert_eq!(reasons, [None, Some("not ready (T)")]);
        assert!(of_snapshot(&args("n2"), "default/web").is_none(), "another node's");
        assert!(of_snapshot(&args("n1"), "default/other").is_none());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
