//! Random cluster states: Services of every kind, slices with every mix of conditions, duplicates and odd objects.

use crate::random::Random;
use crate::universe::{FAMILIES, HERE, NODE_PORTS, PORTS, Places, V4, V6};
use dataplane_tests::oracle::Cluster;
use k8s_openapi::api::core::v1::{
    ClientIPConfig, LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeStatus, ObjectReference,
    Service, ServicePort, ServiceSpec, ServiceStatus, SessionAffinityConfig,
};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeMap;

/// Most Services of a cluster.
const SERVICES: usize = 7;

/// The cluster as manifests, with documents that nobody can read between them.
pub(crate) fn manifests(cluster: &Cluster, broken: &[String]) -> String {
    let mut text = broken.iter().map(|broken| format!("---\n{broken}\n")).collect::<String>();
    let mut add = |object: serde_json::Result<String>| {
        text.push_str("---\n");
        text.push_str(&object.unwrap());
        text.push('\n');
    };
    cluster.nodes.iter().for_each(|node| add(serde_json::to_string(node)));
    cluster.services.iter().for_each(|service| add(serde_json::to_string(service)));
    cluster.slices.iter().for_each(|slice| add(serde_json::to_string(slice)));
    text
}

pub(crate) fn cluster(random: &mut Random) -> Cluster {
    let mut cluster = Cluster { nodes: vec![node(random)], ..Cluster::default() };
    for number in 0..1 + random.below(SERVICES) {
        let service = service(random, number);
        for slice in 0..random.below(4) {
            cluster.slices.push(self::slice(random, &service, slice));
        }
        cluster.services.push(service);
    }
    settle(&mut cluster);
    cluster
}

/// Of duplicates the contract says which wins by their conditions; all else must not differ.
fn settle(cluster: &mut Cluster) {
    let mut seen = BTreeMap::new();
    for slice in &mut cluster.slices {
        let owner = (slice.metadata.namespace.clone(), slice.metadata.labels.clone());
        for endpoint in slice.endpoints.iter_mut().flatten() {
            let key = (owner.clone(), endpoint.addresses[0].clone());
            let first = seen.entry(key).or_insert_with(|| endpoint.clone());
            (endpoint.node_name, endpoint.hints) = (first.node_name.clone(), first.hints.clone());
            (endpoint.zone, endpoint.target_ref) = (first.zone.clone(), first.target_ref.clone());
        }
    }
}

/// The same cluster some time later: some objects changed, came, or went.
pub(crate) fn later(random: &mut Random, before: &Cluster) -> Cluster {
    let mut after = before.clone();
    for service in &mut after.services {
        if random.chance(25) {
            let number =
                service.metadata.name.as_deref().and_then(|name| name[1..].parse().ok()).unwrap_or(0);
            *service = self::service(random, number);
        }
    }
    let services = after.services.clone();
    for slice in &mut after.slices {
        for endpoint in slice.endpoints.iter_mut().flatten() {
            if random.chance(35) {
                endpoint.conditions = conditions(random);
            }
        }
        if random.chance(25) {
            slice.endpoints = endpoints(random, &slice.address_type.clone());
        }
    }
    if random.chance(20) && !after.services.is_empty() {
        let gone = random.below(after.services.len());
        after.services.remove(gone);
    }
    if let Some(service) = services.first()
        && random.chance(30)
    {
        after.slices.retain(|slice| slice.metadata.name.as_deref() != Some("late"));
        let mut late = slice(random, service, 9);
        late.metadata.name = Some("late".to_owned());
        after.slices.push(late);
    }
    if random.chance(30) && !after.slices.is_empty() {
        let gone = random.below(after.slices.len());
        after.slices.remove(gone);
    }
    if random.chance(10) {
        after.nodes = vec![node(random)];
    }
    settle(&mut after);
    after
}

fn metadata(name: &str, namespace: &str, labels: &[(&str, &str)]) -> ObjectMeta {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(namespace.to_owned()),
        labels: Some(labels.collect()),
        ..ObjectMeta::default()
    }
}

fn node(random: &mut Random) -> Node {
    let mut metadata = metadata(HERE, "", &[]);
    metadata.namespace = None;
    if random.chance(80) {
        metadata.labels = Some([("topology.kubernetes.io/zone".to_owned(), "a".to_owned())].into());
    }
    let count = if random.chance(30) { 2 } else { 1 };
    let named = FAMILIES.iter().flat_map(|places| &places.node[..count]);
    let address = |address: &str| NodeAddress { address: address.to_owned(), type_: "InternalIP".to_owned() };
    Node {
        metadata,
        status: Some(NodeStatus {
            addresses: Some(named.map(|named| address(named)).collect()),
            ..NodeStatus::default()
        }),
        ..Node::default()
    }
}

fn policy(random: &mut Random) -> Option<String> {
    random.of(&[None, Some("Cluster"), Some("Local")]).map(str::to_owned)
}

fn service(random: &mut Random, number: usize) -> Service {
    let mut labels = Vec::new();
    if random.chance(6) {
        labels.push(("service.kubernetes.io/service-proxy-name", random.of(&["ours", "others"])));
    }
    if random.chance(5) {
        labels.push(("service.kubernetes.io/headless", ""));
    }
    let mut metadata = metadata(&format!("s{number}"), random.of(&["default", "shop"]), &labels);
    // No two of one age: the contract names the older.
    let age = (random.below(1_000) * 10 + number) as i64;
    metadata.creation_timestamp = Some(Time(Timestamp::from_second(1_700_000_000 + age).unwrap()));
    let kind = random.of(&["ClusterIP", "NodePort", "NodePort", "LoadBalancer", "LoadBalancer"]);
    let mut spec = ServiceSpec {
        type_: Some(kind.to_owned()),
        internal_traffic_policy: policy(random),
        external_traffic_policy: policy(random),
        ports: Some(service_ports(random, number, kind != "ClusterIP")),
        external_ips: Some(some(random, 25)),
        ..ServiceSpec::default()
    };
    // F4: one family, or both, the second one second.
    let families = random.of(&[&[&V4][..], &[&V4], &[&V6], &[&V6], &[&V4, &V6], &[&V6, &V4]]);
    let at = if random.chance(3) { 0 } else { number };
    let addresses: Vec<String> = families.iter().map(|places| places.cluster_ip(at)).collect();
    spec.cluster_ip = addresses.first().cloned();
    spec.cluster_ips = random.chance(90).then_some(addresses);
    if random.chance(25) {
        spec.load_balancer_source_ranges = Some(source_ranges(random));
    }
    if random.chance(5) {
        (spec.cluster_ip, spec.cluster_ips) = (Some("None".to_owned()), Some(vec!["None".to_owned()]));
    } else if random.chance(3) {
        spec.type_ = Some("ExternalName".to_owned());
        spec.external_name = Some("example.com".to_owned());
    }
    if random.chance(30) {
        spec.session_affinity = Some("ClientIP".to_owned());
        // No case lasts that long.
        let timeout_seconds = random.of(&[None, Some(3_600), Some(10_800), Some(86_400)]);
        let client_ip = Some(ClientIPConfig { timeout_seconds });
        spec.session_affinity_config = Some(SessionAffinityConfig { client_ip });
    }
    metadata.annotations = choice(random);
    let status = (kind == "LoadBalancer").then(|| ServiceStatus {
        load_balancer: Some(LoadBalancerStatus { ingress: Some(ingress(random)) }),
        ..ServiceStatus::default()
    });
    Service { metadata, spec: Some(spec), status }
}

/// Annotations that say how endpoints are chosen (L1, L3); now and then in words that mean nothing.
fn choice(random: &mut Random) -> Option<BTreeMap<String, String>> {
    let mut annotations = BTreeMap::new();
    if random.chance(60) {
        let name = random.of(&[
            "service.portolan.dev/lb-algorithm",
            "service.portolan.dev/lb-algorithm",
            "service.cilium.io/lb-algorithm",
            "kube-router.io/service.scheduler",
        ]);
        let word = random.of(&[
            "random",
            "round-robin",
            "maglev",
            "source-hash",
            "least-connections",
            "rr",
            "sh",
            "lc",
            "dh",
            "whatever",
        ]);
        annotations.insert(name.to_owned(), word.to_owned());
    }
    if random.chance(30) {
        let places = random.of(&FAMILIES);
        let mut weights = BTreeMap::new();
        for _ in 0..random.below(5) {
            let word = match random.below(6) {
                0 => "*".to_owned(),
                1 => format!("node={}", random.of(&[HERE, "there"])),
                2 => format!("zone={}", random.of(&["a", "b"])),
                3 => format!("pod-{}", random.below(3)),
                _ => endpoint_address(random, places).to_owned(),
            };
            weights.insert(word, random.of(&[0, 0, 1, 2, 7, 65_535]));
        }
        let text = serde_json::to_string(&weights).unwrap();
        let text = if random.chance(5) { text.replace(':', "=") } else { text };
        annotations.insert("service.portolan.dev/weights".to_owned(), text);
    }
    (!annotations.is_empty()).then_some(annotations)
}

/// Ranges of clients of both families (S2); now and then everybody.
fn source_ranges(random: &mut Random) -> Vec<String> {
    let mut ranges = Vec::new();
    for _ in 0..1 + random.below(3) {
        let of = random.of(&FAMILIES).ranges;
        ranges.push(
            if random.chance(5) { of[of.len() - 1] } else { random.of(&of[..of.len() - 1]) }.to_owned(),
        );
    }
    ranges
}

/// Some LB IPs or external IPs of both families, and now and then one that must not be programmed (Z1).
fn some(random: &mut Random, percent: usize) -> Vec<String> {
    let mut chosen = Vec::new();
    while random.chance(percent) && chosen.len() < 4 {
        let places = random.of(&FAMILIES);
        let address = match random.below(12) {
            0 => random.of(&places.nobody).to_owned(),
            1 => random.of(&places.pods).to_owned(),
            2 => places.cluster_ip(random.below(SERVICES)),
            _ => random.of(&places.outer).to_owned(),
        };
        if !chosen.contains(&address) {
            chosen.push(address);
        }
    }
    chosen
}

fn ingress(random: &mut Random) -> Vec<LoadBalancerIngress> {
    let mut list = Vec::new();
    for ip in some(random, 75) {
        let mode = random.of(&[None, Some("VIP"), Some("VIP"), Some("Proxy")]).map(str::to_owned);
        list.push(LoadBalancerIngress { ip: Some(ip), ip_mode: mode, ..LoadBalancerIngress::default() });
    }
    if random.chance(10) {
        let hostname = Some("lb.example.com".to_owned());
        list.push(LoadBalancerIngress { hostname, ..LoadBalancerIngress::default() });
    }
    list
}

fn service_ports(random: &mut Random, number: usize, outside: bool) -> Vec<ServicePort> {
    let count = 1 + random.below(3);
    let mut ports: Vec<ServicePort> = Vec::new();
    for index in 0..count {
        let protocol = random.of(&[None, Some("TCP"), Some("UDP"), Some("UDP"), Some("SCTP")]);
        let port = i32::from(random.of(&PORTS));
        let same = |other: &ServicePort| {
            other.port == port && protocol.unwrap_or("TCP") == other.protocol.as_deref().unwrap_or("TCP")
        };
        if ports.iter().any(same) {
            continue;
        }
        // S3: a port may go without a node port. Now and then two Services claim the same.
        let own = NODE_PORTS[(number * 3 + index) % NODE_PORTS.len()];
        let node_port = if random.chance(10) { random.of(&NODE_PORTS) } else { own + number as u16 * 10 };
        ports.push(ServicePort {
            name: (count > 1 || random.chance(50)).then(|| format!("p{index}")),
            protocol: protocol.map(str::to_owned),
            port,
            node_port: (outside && random.chance(85)).then_some(i32::from(node_port)),
            ..ServicePort::default()
        });
    }
    ports
}

/// A slice of a Service, or now and then of none.
fn slice(random: &mut Random, service: &Service, number: usize) -> EndpointSlice {
    let name = service.metadata.name.clone().unwrap_or_default();
    let namespace = service.metadata.namespace.clone().unwrap_or_default();
    let owner = if random.chance(97) { name.clone() } else { "nobody".to_owned() };
    let mut labels = vec![("kubernetes.io/service-name", owner.as_str())];
    if random.chance(3) {
        labels.push(("service.kubernetes.io/headless", ""));
    }
    let cluster_ips = service.spec.iter().flat_map(|spec| spec.cluster_ips.iter().flatten());
    let own: Vec<_> = cluster_ips.map(|ip| Places::of(ip.contains(':')).name).collect();
    let address_type = match random.below(30) {
        0 => "FQDN",
        1 | 2 => random.of(&FAMILIES).name,
        _ if own.is_empty() => random.of(&FAMILIES).name,
        _ => random.of(&own),
    };
    let mut ports = Vec::new();
    for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
        if random.chance(90) {
            ports.push(EndpointPort {
                name: port.name.clone().or_else(|| random.chance(50).then(String::new)),
                protocol: port.protocol.clone(),
                port: random.chance(96).then(|| i32::from(random.of(&[8080_u16, 8080, 9090, 80]))),
                ..EndpointPort::default()
            });
        }
    }
    EndpointSlice {
        metadata: metadata(&format!("{name}-{number}"), &namespace, &labels),
        address_type: address_type.to_owned(),
        endpoints: endpoints(random, address_type),
        ports: Some(ports),
    }
}

fn endpoints(random: &mut Random, address_type: &str) -> Option<Vec<Endpoint>> {
    // Hints count only if all endpoints have them, so one throw decides for a whole slice.
    let hints = random.below(4);
    let places = Places::of(address_type == V6.name);
    let addresses = match address_type {
        "FQDN" => vec!["example.com".to_owned()],
        _ => (0..random.below(5)).map(|_| endpoint_address(random, places).to_owned()).collect(),
    };
    let endpoint = |address: String| {
        let here = places.pods.contains(&address.as_str()) || places.has_node(&address);
        let node = if here { Some(HERE) } else { Some("there") };
        let node = if random.chance(92) { node } else { random.of(&[None, Some("there")]) };
        let mut addresses = vec![address];
        if random.chance(8) {
            addresses.push(places.far[4].to_owned());
        }
        Endpoint {
            addresses,
            node_name: node.map(str::to_owned),
            conditions: conditions(random),
            hints: self::hints(random, hints),
            zone: random.of(&[None, Some("a"), Some("b")]).map(str::to_owned),
            target_ref: random.chance(50).then(|| ObjectReference {
                kind: Some("Pod".to_owned()),
                name: Some(format!("pod-{}", random.below(3))),
                ..ObjectReference::default()
            }),
            ..Endpoint::default()
        }
    };
    Some(addresses.into_iter().map(endpoint).collect())
}

fn endpoint_address(random: &mut Random, places: &Places) -> &'static str {
    match random.below(30) {
        0 => places.narrow,
        1 => places.lost,
        2 => places.server,
        3 => random.of(&places.nobody),
        4 | 5 => places.node[0],
        6..=15 => random.of(&places.pods),
        _ => random.of(&places.far),
    }
}

fn conditions(random: &mut Random) -> Option<EndpointConditions> {
    let mut condition = |usual: bool| match random.below(10) {
        0 => None,
        1 | 2 => Some(!usual),
        _ => Some(usual),
    };
    let conditions = EndpointConditions {
        ready: condition(true),
        serving: condition(true),
        terminating: condition(false),
    };
    random.chance(92).then_some(conditions)
}

fn hints(random: &mut Random, kind: usize) -> Option<EndpointHints> {
    if kind == 0 || random.chance(4) {
        return None;
    }
    let zone = || ForZone { name: "a".to_owned() };
    let other = || ForZone { name: "b".to_owned() };
    let for_zones = match random.below(3) {
        0 => vec![zone()],
        1 => vec![other()],
        _ => vec![zone(), other()],
    };
    let for_nodes = vec![ForNode { name: random.of(&[HERE, "there"]).to_owned() }];
    match kind {
        1 => Some(EndpointHints { for_zones: Some(for_zones), for_nodes: None }),
        2 => Some(EndpointHints { for_zones: Some(for_zones), for_nodes: Some(for_nodes) }),
        _ => None,
    }
}

/// All addresses that a packet of a random case may go to, and near misses.
pub(crate) fn destinations() -> Vec<String> {
    let of = |places: &Places| {
        let mut all: Vec<String> = (0..SERVICES).map(|number| places.cluster_ip(number)).collect();
        let fixed = places.outer.iter().chain(&places.node).chain(&places.pods).chain(&places.far);
        let fixed = fixed.chain([&places.unknown, &places.server, &places.narrow, &places.loopback]);
        all.extend(fixed.map(|address| (*address).to_owned()));
        all
    };
    FAMILIES.into_iter().flat_map(of).collect()
}
