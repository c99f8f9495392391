//! `portolan explain FROM TO`: what becomes of a new connection, and why. The answer is the programs' own ([`Rehearsal`]): they run on
//! the live tables and change nothing of what serves. What only the agent knows, why an endpoint is left out, it is asked for.

mod ends;
mod packet;
mod text;

use super::AdminError;
use super::names::Names;
use super::services::kind_name;
use super::status::Verdict;
use crate::config::{ExplainArgs, Output};
use crate::kernel::pins::Pins;
use crate::kernel::rehearsal::{Arrival, Fate, Rehearsal};
use crate::kernel::roles::Role;
use crate::kernel::whereabouts::{Meeting, Whereabouts};

use crate::status::endpoints::{self, EndpointFacts, ServiceEndpoints};
use crate::status::local;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::drop::Reason;
use dataplane_common::flow::{Flow, FlowKey};
use dataplane_common::frontend::{Frontend, FrontendKind};
use dataplane_common::service::{EndpointSet, Policy, Service};
use dataplane_common::tables::{Backends, Frontends, Services, Slots};
use dataplane_common::{Addr, Protocol};
use ends::Ends;
use packet::Opening;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// How often a packet is sent at least, and at most, to see all endpoints that it may have.
const RUNS: [usize; 2] = [64, 1_024];
/// How many times as often as there are endpoints.
const TIMES: usize = 12;
/// The first of the ports that a client without one calls from.
const FIRST_PORT: u16 = 32_768;
/// Link-layer address of whoever sends to this node: locally administered.
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Who calls, as far as policies ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Client {
    /// A pod of this node.
    Pod,
    /// This node itself.
    Node,
    /// Anybody else.
    Outside,
}

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// `well` if the connection is served, `failing` if it is dropped or refused, `warning` if it is none of Portolan's.
    pub verdict: Verdict,
    /// In a sentence, with what helps.
    pub conclusion: String,
    /// The reason by which it is dropped or refused, as `portolan drops` counts it.
    pub reason: Option<&'static str>,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The client's address; its port, if one was named.
    pub from: String,
    /// What is called.
    pub to: String,
    /// Who calls.
    pub client: Client,
    /// The interface at which the packet meets the dataplane.
    pub interface: String,
    /// The program that answered.
    pub program: &'static str,
    /// The service port that is called; none if it is no Service's.
    pub service: Option<ServiceFacts>,
    /// The endpoints.
    pub endpoints: Vec<EndpointLine>,
    /// Why nothing is known of endpoints that take no part.
    pub endpoints_unknown: Option<String>,
    /// The connection is in the table of flows.
    pub known_flow: bool,
    /// The source that endpoints see, where it is not the client.
    pub translated_source: Option<String>,
    /// The packets go past the host's stack.
    pub past_stack: bool,
    /// The interface by which those to one of the endpoints leave, and the next hop.
    pub way: Option<String>,
}

/// The service port that is called.
#[derive(Clone, Debug, Serialize)]
pub struct ServiceFacts {
    /// `namespace/name:port`, or `#id` if the name is not known.
    pub name: String,
    /// `ClusterIP`, `LoadBalancer`, `ExternalIP` or `NodePort`.
    pub kind: &'static str,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Timeout of `sessionAffinity: ClientIP` in seconds; 0 without.
    pub affinity_seconds: u32,
    /// Only some sources may call its load balancer addresses.
    pub source_ranges: bool,
    /// Endpoints in the set of the whole cluster.
    pub cluster_endpoints: u32,
    /// Endpoints in that of this node.
    pub local_endpoints: u32,
}

/// An endpoint, and its part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EndpointLine {
    /// Its address and port.
    pub endpoint: String,
    /// Its node, if that is known.
    pub node: Option<String>,
    /// It was chosen so often.
    pub chosen: usize,
    /// Why it takes no part; none if it does.
    pub left_out: Option<String>,
}

/// What came of all runs.
struct Outcome {
    chosen: BTreeMap<SocketAddr, usize>,
    /// The last one.
    fate: Fate,
}

/// Explains a connection.
///
/// # Errors
/// If an end cannot be found, or the kernel does not run the programs.
pub async fn explain(args: &ExplainArgs) -> Result<Explanation, AdminError> {
    let pins = Pins::new(&args.show.bpffs);
    let names = Names::read(&args.show.bpffs);
    let mut rehearsal = Rehearsal::open(&pins)?;
    let whereabouts = Whereabouts::open(&pins).await?;
    let ends = Ends::find(args, rehearsal.live(), &names, &whereabouts).await?;
    let meeting = match ends.client {
        Client::Node => whereabouts.leaving(ends.to.ip()).await?,
        Client::Pod | Client::Outside => whereabouts.meeting(ends.from.ip()).await?,
    };
    let called = called(&rehearsal, &ends)?;
    let outcome = rehearse(&mut rehearsal, &ends, &meeting, called.as_ref().map(|(_, service)| service))?;
    let mut explanation = Explanation::new(&ends, &meeting, &outcome);
    if let Some((frontend, service)) = &called {
        explanation.tell_service(&names, *frontend, service);
        explanation.tell_endpoints(&rehearsal, &outcome, service)?;
        explanation.ask_agent(args, &names, frontend.service(), &ends);
    }
    if let Fate::Served { flow, .. } = &outcome.fate {
        let way = whereabouts.way(flow.dst.to_ip()).await.ok();
        let way = way.map(|way| match way.gateway {
            _ if way.local => "this node itself".to_owned(),
            Some(gateway) => format!("{}, next hop {gateway}", way.interface),
            None => way.interface,
        });
        explanation.way = way.map(|way| format!("to {} by {way}", flow.dst.to_ip()));
    }
    Ok(explanation)
}

/// The service port that an address, port and protocol belong to, if they are one's.
fn called(rehearsal: &Rehearsal, ends: &Ends) -> Result<Option<(Frontend, Service)>, AdminError> {
    let Some(frontend) = ends::frontend(rehearsal.live(), ends.to, ends.protocol)? else { return Ok(None) };
    let service = rehearsal.live().map::<Services>()?.get(&frontend.service())?;
    Ok(service.map(|service| (frontend, service)))
}

/// Sends the packet as often as it takes to see who may get it.
fn rehearse(
    rehearsal: &mut Rehearsal,
    ends: &Ends,
    meeting: &Meeting,
    service: Option<&Service>,
) -> Result<Outcome, AdminError> {
    let endpoints = service.map_or(0, |service| service.cluster.count().max(service.local.count()) as usize);
    let [least, most] = RUNS;
    let runs = if endpoints == 0 { 1 } else { (endpoints * TIMES).clamp(least, most) };
    let link = meeting.link.map(|own| match ends.client {
        Client::Node => [NEIGHBOUR, own],
        Client::Pod | Client::Outside => [own, NEIGHBOUR],
    });
    let mut outcome = Outcome { chosen: BTreeMap::new(), fate: Fate::Untouched };
    let replies = replies(rehearsal, ends, service)?;
    for run in 0..runs {
        let port = if ends.from.port() == 0 { FIRST_PORT + run as u16 } else { ends.from.port() };
        let from = SocketAddr::new(ends.from.ip(), port);
        let opening = Opening { protocol: ends.protocol, from, to: ends.to };
        let (data, key) = (opening.bytes(link), opening.key());
        let arrival = Arrival {
            program: meeting.program,
            interface: meeting.index,
            data: &data,
            key,
            replies: &replies,
        };
        outcome.fate = rehearsal.run(&arrival)?;
        let Fate::Served { flow, .. } = &outcome.fate else { break };
        *outcome.chosen.entry(SocketAddr::new(flow.dst.to_ip(), flow.dst_port.number())).or_default() += 1;
    }
    Ok(outcome)
}

/// The replies of a client whose port is named, one of each endpoint: another flow may have one of them (P12).
fn replies(
    rehearsal: &Rehearsal,
    ends: &Ends,
    service: Option<&Service>,
) -> Result<Vec<FlowKey>, AdminError> {
    let (Some(service), true) = (service, ends.from.port() != 0) else { return Ok(Vec::new()) };
    let mut all = members(rehearsal, service.cluster)?;
    all.extend(members(rehearsal, service.local)?);
    let reply = |endpoint| Opening { protocol: ends.protocol, from: endpoint, to: ends.from }.key();
    Ok(all.into_keys().map(reply).collect())
}

impl Explanation {
    fn new(ends: &Ends, meeting: &Meeting, outcome: &Outcome) -> Self {
        let mut explanation = Self {
            verdict: Verdict::Well,
            conclusion: String::new(),
            reason: None,
            protocol: ends.protocol.to_string(),
            from: if ends.from.port() == 0 { ends.from.ip().to_string() } else { ends.from.to_string() },
            to: ends.to.to_string(),
            client: ends.client,
            interface: meeting.interface.clone(),
            program: meeting.program,
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

    fn tell_service(&mut self, names: &Names, frontend: Frontend, service: &Service) {
        let kind = frontend.kind().unwrap_or(FrontendKind::ClosedPort);
        self.service = kind_name(kind).map(|kind| ServiceFacts {
            name: names.name(frontend.service()),
            kind,
            internal_local: service.policy.has(Policy::INTERNAL_LOCAL),
            external_local: service.policy.has(Policy::EXTERNAL_LOCAL),
            affinity_seconds: service.policy.affinity_seconds(),
            source_ranges: service.policy.has(Policy::SOURCE_RANGES),
            cluster_endpoints: service.cluster.count(),
            local_endpoints: service.local.count(),
        });
    }

    /// The endpoints of the set that the connection has. Which it has shows in those that were chosen.
    fn tell_endpoints(
        &mut self,
        rehearsal: &Rehearsal,
        outcome: &Outcome,
        service: &Service,
    ) -> Result<(), AdminError> {
        let [cluster, local] = [service.cluster, service.local].map(|set| members(rehearsal, set));
        let [cluster, local] = [cluster?, local?];
        let is_local =
            outcome.chosen.keys().all(|endpoint| local.contains_key(endpoint)) && !local.is_empty();
        let set = if is_local && local.len() < cluster.len() || cluster.is_empty() { local } else { cluster };
        for (endpoint, backend) in &set {
            self.endpoints.push(EndpointLine {
                endpoint: endpoint.to_string(),
                node: backend.status().has(BackendStatus::LOCAL).then(|| "this node".to_owned()),
                chosen: outcome.chosen.get(endpoint).copied().unwrap_or_default(),
                left_out: None,
            });
        }
        Ok(())
    }

    /// Adds what the agent knows.
    fn ask_agent(&mut self, args: &ExplainArgs, names: &Names, service: u32, ends: &Ends) {
        let name = names.name(service);
        let (object, port) = name.split_once(':').unwrap_or((&name, ""));
        let asked = local::ask(&args.show.bpffs, &format!("{}{object}", endpoints::PATH))
            .map_err(|error| error.to_string())
            .and_then(|text| {
                serde_json::from_str::<ServiceEndpoints>(&text).map_err(|error| error.to_string())
            });
        let told = match asked {
            Ok(told) => told,
            Err(error) => {
                self.endpoints_unknown = Some(error);
                return;
            }
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
        let endpoint = super::flows::host_and_port(&fact.address, fact.port);
        let left_out = if local_set { &fact.not_in_local_set } else { &fact.not_in_cluster_set };
        match self.endpoints.iter_mut().find(|line| line.endpoint == endpoint) {
            Some(line) => line.node = fact.node.clone().or(line.node.take()),
            None => self.endpoints.push(EndpointLine {
                endpoint,
                node: fact.node.clone(),
                chosen: 0,
                left_out: Some(left_out.clone().unwrap_or_else(|| "not in the kernel yet".to_owned())),
            }),
        }
    }

    /// As somebody asked for it.
    ///
    /// # Errors
    /// If it cannot be written as JSON or YAML.
    pub fn print(&self, output: Output) -> Result<String, AdminError> {
        match output {
            Output::Table | Output::Wide => Ok(self.text()),
            Output::Json | Output::Yaml => super::structured(self, output),
        }
    }
}

/// The endpoints of a set.
fn members(rehearsal: &Rehearsal, set: EndpointSet) -> Result<BTreeMap<SocketAddr, Backend>, AdminError> {
    let (slots, backends) = (rehearsal.live().map::<Slots>()?, rehearsal.live().map::<Backends>()?);
    let mut members = BTreeMap::new();
    for slot in set.base()..set.base().saturating_add(set.count()) {
        if let Some(id) = slots.get(&slot)?
            && let Some(backend) = backends.get(&id)?
        {
            members.insert(SocketAddr::new(backend.addr().to_ip(), backend.port().number()), backend);
        }
    }
    Ok(members)
}
