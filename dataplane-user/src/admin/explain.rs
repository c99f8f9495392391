//! `portolan explain FROM TO`: what becomes of a new connection, and why. The answer is the programs' own ([`Rehearsal`]): they run on
//! the live tables and change nothing of what serves. What only the agent knows, why an endpoint is left out, it is asked for.

mod answer;
mod ends;
mod packet;
mod text;

use super::AdminError;
use super::names::Names;
use super::status::Verdict;
use crate::config::{ExplainArgs, Output};
use crate::kernel::hook::Hook;
use crate::kernel::pins::Pins;
use crate::kernel::rehearsal::{Arrival, Fate, Rehearsal};
use crate::kernel::roles::Role;
use crate::kernel::whereabouts::{Meeting, Whereabouts};

use dataplane_common::backend::Backend;
use dataplane_common::flow::FlowKey;
use dataplane_common::frontend::Frontend;
use dataplane_common::node::Node;
use dataplane_common::service::{EndpointSet, Service};
use dataplane_common::tables::{Backends, Frontends, Nodes, Services, Slots};
use dataplane_common::{Addr, Protocol};
use ends::Ends;
pub(super) use ends::frontend as ends_of_frontend;
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
    /// XDP sees the packet before that, and leaves it to tc.
    pub passed_by_xdp: bool,
    /// The hook that chooses among the same endpoints when a socket connects, before there is a packet.
    pub socket_hook: Option<&'static str>,
    /// The service port that is called; none if it is no Service's.
    pub service: Option<ServiceFacts>,
    /// The endpoints.
    pub endpoints: Vec<EndpointLine>,
    /// Why nothing is known of endpoints that take no part, or only something old.
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
    /// How an endpoint of the set is chosen.
    pub algorithm: &'static str,
    /// Only some sources may call its load balancer addresses.
    pub source_ranges: bool,
    /// Endpoints in the set of the whole cluster.
    pub cluster_endpoints: usize,
    /// Endpoints in that of this node.
    pub local_endpoints: usize,
}

/// An endpoint, and its part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EndpointLine {
    /// Its address and port.
    pub endpoint: String,
    /// Its node, if that is known.
    pub node: Option<String>,
    /// Connections and UDP flows of it that did not end.
    pub open: u32,
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
    /// Who answered it.
    program: &'static str,
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
    if called.is_some() && ends.protocol == Protocol::Tcp && has_sockets_here(&rehearsal, ends.client)? {
        explanation.socket_hook = whereabouts.connect_hook(ends.to.is_ipv6());
    }
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

/// Whether the socket hooks choose for whoever calls.
fn has_sockets_here(rehearsal: &Rehearsal, client: Client) -> Result<bool, AdminError> {
    Ok(match client {
        Client::Node => true,
        Client::Pod => {
            rehearsal.live().map::<Nodes>()?.get(&0)?.is_some_and(|node| node.has(Node::SOCKET_LB_PODS))
        }
        Client::Outside => false,
    })
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
    let mut outcome = Outcome { chosen: BTreeMap::new(), fate: Fate::Untouched, program: meeting.program };
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
        (outcome.fate, outcome.program) = arrive(rehearsal, &arrival, meeting)?;
        let Fate::Served { flow, .. } = &outcome.fate else { break };
        *outcome.chosen.entry(SocketAddr::new(flow.dst.to_ip(), flow.dst_port.number())).or_default() += 1;
    }
    Ok(outcome)
}

/// Has the packet meet XDP first, where that is, and tc if XDP leaves it alone. Who answered is told.
fn arrive(
    rehearsal: &mut Rehearsal,
    arrival: &Arrival<'_>,
    meeting: &Meeting,
) -> Result<(Fate, &'static str), AdminError> {
    if meeting.xdp {
        let program = Hook::XdpUplink.program();
        let fate = rehearsal.run(&Arrival { program, ..*arrival })?;
        if fate != Fate::Untouched {
            return Ok((fate, program));
        }
    }
    Ok((rehearsal.run(arrival)?, meeting.program))
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
fn members(
    rehearsal: &Rehearsal,
    set: EndpointSet,
) -> Result<BTreeMap<SocketAddr, (u32, Backend)>, AdminError> {
    let (slots, backends) = (rehearsal.live().map::<Slots>()?, rehearsal.live().map::<Backends>()?);
    let mut members = BTreeMap::new();
    for slot in set.base()..set.base().saturating_add(set.count()) {
        if let Some(id) = slots.get(&slot)?
            && let Some(backend) = backends.get(&id)?
        {
            members.insert(SocketAddr::new(backend.addr().to_ip(), backend.port().number()), (id, backend));
        }
    }
    Ok(members)
}
