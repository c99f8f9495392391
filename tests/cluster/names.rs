//! Names as users know them: a real CoreDNS behind its ClusterIP, asked over UDP and TCP through the dataplane (D1 to D9).

use crate::world::eventually;
use dataplane_tests::controlplane::{ControlPlane, dns};
use dataplane_tests::lab::{AgentOptions, Lab, Options, Source};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
/// The replicas of the StatefulSet.
const PODS: [&str; 3] = ["web-0", "web-1", "web-2"];
/// ClusterIPs of the Service `clustered`.
const V4: &str = "10.96.0.70";
const V6: &str = "fd00:10:96::70";

/// A cluster with names. The control plane ends before the lab.
struct Cluster {
    plane: ControlPlane,
    lab: Lab,
}

impl Cluster {
    /// The one that other tests have now, or a new one.
    fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Self::raise());
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    }

    fn raise() -> Self {
        let lab = Options::default().nodes(2).create().unwrap();
        let plane = ControlPlane::start(&lab).unwrap();
        let source = Source::Kubeconfig(plane.agent_kubeconfig());
        lab.start_agents(&AgentOptions::default().source(source)).unwrap();
        plane.start_dns().unwrap();
        plane.apply(&objects()).unwrap();
        plane.wait_for_endpoints("nginx", 2 * PODS.len(), PATIENCE).unwrap();
        let cluster = Self { plane, lab };
        eventually("CoreDNS answers", || {
            cluster.lab.pod("shell").is_some()
                && cluster.dig("+notcp", "kubernetes.default.svc", "A").status == "NOERROR"
        });
        cluster
    }

    /// The address of a pod, of the family of a record type.
    fn address(&self, pod: &str, kind: &str) -> String {
        let addresses = self.lab.pod(pod).unwrap().addresses();
        if kind == "A" { addresses.v4.to_string() } else { addresses.v6.to_string() }
    }

    /// Asks over one transport, from a pod and by way of its `/etc/resolv.conf`.
    fn dig(&self, transport: &str, name: &str, kind: &str) -> Answer {
        let name = if name.ends_with("arpa") { name.to_owned() } else { format!("{name}.{}", dns::DOMAIN) };
        let shell = self.lab.pod("shell").unwrap();
        let arguments = ["+noall", "+comments", "+answer", "+tries=3", "+time=2", transport, &name, kind];
        let output = shell.place().command("dig").unwrap().args(arguments).output().unwrap();
        Answer::parse(&String::from_utf8_lossy(&output.stdout))
    }

    /// Asks over UDP and TCP, which must agree.
    #[track_caller]
    fn ask(&self, name: &str, kind: &str) -> Answer {
        let [udp, tcp] = ["+notcp", "+tcp"].map(|transport| self.dig(transport, name, kind));
        assert_eq!(udp, tcp, "{name} {kind}");
        udp
    }

    /// The data of all records, which must be of that kind.
    #[track_caller]
    fn records(&self, name: &str, kind: &str) -> Vec<String> {
        let answer = self.ask(name, kind);
        assert_eq!(answer.status, "NOERROR", "{name} {kind}");
        answer.of_kind(kind)
    }
}

/// What `dig` prints.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    /// Empty: there was no answer.
    status: String,
    /// Kind and data, in order.
    records: Vec<(String, String)>,
}

impl Answer {
    fn parse(text: &str) -> Self {
        let status =
            text.split_once("status: ").and_then(|(_, rest)| rest.split(',').next()).unwrap_or_default();
        let lines = text.lines().filter(|line| !line.starts_with(';') && !line.is_empty());
        let mut records: Vec<_> = lines
            .filter_map(|line| {
                let mut words = line.split_whitespace().skip(3);
                Some((words.next()?.to_owned(), words.collect::<Vec<_>>().join(" ")))
            })
            .collect();
        records.sort();
        Self { status: status.to_owned(), records }
    }

    fn of_kind(&self, kind: &str) -> Vec<String> {
        self.records.iter().filter(|(other, _)| other == kind).map(|(_, data)| data.clone()).collect()
    }
}

fn objects() -> Vec<Value> {
    let http = json!({ "name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP" });
    let service = |name: &str, spec: Value| {
        let mut value =
            json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name }, "spec": spec });
        if name != "elsewhere" {
            value["spec"]["ports"] = json!([http]);
            value["spec"]["ipFamilyPolicy"] = json!("RequireDualStack");
        }
        value
    };
    vec![
        service("nginx", json!({ "clusterIP": "None", "selector": { "app": "nginx" } })),
        service("unready", json!({ "clusterIP": "None", "selector": { "app": "nobody" } })),
        service(
            "clustered",
            json!({ "clusterIP": V4, "clusterIPs": [V4, V6], "ipFamilies": ["IPv4", "IPv6"],
                    "selector": { "app": "nginx" } }),
        ),
        service("elsewhere", json!({ "type": "ExternalName", "externalName": dns::OUTSIDE_NAME })),
        service("bare", json!({ "clusterIP": "None", "selector": { "app": "bare" } })),
        json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": "web" },
            "spec": {
                "replicas": PODS.len(), "serviceName": "nginx", "podManagementPolicy": "Parallel",
                "selector": { "matchLabels": { "app": "nginx" } },
                "template": {
                    "metadata": { "labels": { "app": "nginx" } },
                    "spec": { "terminationGracePeriodSeconds": 1,
                              "containers": [{ "name": "web", "image": "nginx", "ports": [{ "containerPort": 8080 }] }] },
                },
            },
        }),
        pod("shell", json!({ "app": "shell" }), json!([])),
        pod("bare", json!({ "app": "bare" }), json!([{ "containerPort": 8080 }])),
    ]
}

fn pod(name: &str, labels: Value, ports: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": labels },
        "spec": { "nodeName": "node-1", "containers": [{ "name": name, "image": "lab", "ports": ports }] },
    })
}

fn sorted(mut list: Vec<String>) -> Vec<String> {
    list.sort();
    list
}

/// The name whose PTR record tells an address's name.
fn reverse(address: &str) -> String {
    match address.parse().unwrap() {
        std::net::IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        std::net::IpAddr::V6(address) => {
            let digits: Vec<_> =
                format!("{:032x}", address.to_bits()).chars().rev().map(String::from).collect();
            format!("{}.ip6.arpa", digits.join("."))
        }
    }
}

/// D1: also where the name is written otherwise.
#[test]
fn a_service_has_its_cluster_ips() {
    let cluster = Cluster::shared();
    for name in ["clustered.default.svc", "CLUSTERED.Default.SVC"] {
        assert_eq!(cluster.records(name, "A"), [V4]);
        assert_eq!(cluster.records(name, "AAAA"), [V6]);
    }
    assert_eq!(cluster.ask("nowhere.default.svc", "A").status, "NXDOMAIN");
}

/// D2
#[test]
fn a_named_port_has_its_number_and_its_service() {
    let records = Cluster::shared().records("_http._tcp.clustered.default.svc", "SRV");
    let [record] = records.as_slice() else { panic!("{records:?}") };
    assert!(record.ends_with(" 80 clustered.default.svc.cluster.local."), "{record}");
}

/// D3
#[test]
fn a_cluster_ip_has_its_services_name() {
    let cluster = Cluster::shared();
    for address in [V4, V6] {
        assert_eq!(cluster.records(&reverse(address), "PTR"), ["clustered.default.svc.cluster.local."]);
    }
}

/// D4
#[test]
fn a_headless_service_has_the_addresses_of_its_ready_pods() {
    let cluster = Cluster::shared();
    for kind in ["A", "AAAA"] {
        let same = || {
            let pods =
                sorted(
                    PODS.iter()
                        .filter_map(|pod| cluster.lab.pod(pod))
                        .map(|pod| {
                            if kind == "A" {
                                pod.address().to_string()
                            } else {
                                pod.addresses().v6.to_string()
                            }
                        })
                        .collect(),
                );
            pods.len() == PODS.len() && cluster.ask("nginx.default.svc", kind).of_kind(kind) == pods
        };
        eventually("the name has all pods", same);
        assert_eq!(cluster.ask("unready.default.svc", kind).status, "NXDOMAIN");
    }
}

/// D5: a StatefulSet's pod by its name, also after it was replaced; else a label that is made of the address.
#[test]
fn a_pod_of_a_headless_service_has_a_name_that_follows_it() {
    let cluster = Cluster::shared();
    for kind in ["A", "AAAA"] {
        let own = cluster.address("web-1", kind);
        assert_eq!(cluster.records("web-1.nginx.default.svc", kind), [own]);
    }
    let before = cluster.address("web-2", "A");
    cluster.plane.kubectl(&["delete", "pod", "web-2"], "").unwrap();
    eventually("the name has the new pod's address", || {
        let new = cluster.lab.pod("web-2").map(|pod| pod.address().to_string());
        new.is_some_and(|new| {
            new != before && cluster.ask("web-2.nginx.default.svc", "A").of_kind("A") == [new]
        })
    });
    let bare = cluster.address("bare", "A");
    let label = bare.replace('.', "-");
    assert_eq!(cluster.records(&format!("{label}.bare.default.svc"), "A"), [bare]);
}

/// D6
#[test]
fn a_named_port_of_a_headless_service_has_each_ready_pod() {
    let cluster = Cluster::shared();
    let targets = || {
        let records = cluster.ask("_http._tcp.nginx.default.svc", "SRV").of_kind("SRV");
        let mut targets: Vec<_> =
            records.iter().filter_map(|record| Some(record.split_once(" 8080 ")?.1.to_owned())).collect();
        targets.sort();
        targets.dedup();
        targets
    };
    let expected = PODS.map(|pod| format!("{pod}.nginx.default.svc.cluster.local."));
    eventually("every pod is a target on its port", || targets() == expected);
}

/// D7
#[test]
fn an_address_of_a_headless_service_has_its_pods_name() {
    let cluster = Cluster::shared();
    for kind in ["A", "AAAA"] {
        let name = reverse(&cluster.address("web-0", kind));
        let names = cluster.records(&name, "PTR");
        assert!(names.contains(&"web-0.nginx.default.svc.cluster.local.".to_owned()), "{names:?}");
    }
}

/// D8, F1: an alias, which has no dataplane.
#[test]
fn an_external_name_is_an_alias() {
    let cluster = Cluster::shared();
    let answer = cluster.ask("elsewhere.default.svc", "A");
    assert_eq!(answer.of_kind("CNAME"), [format!("{}.", dns::OUTSIDE_NAME)]);
    assert_eq!(answer.of_kind("A"), [dns::OUTSIDE_ADDRESS.to_string()]);
    let answer = cluster.ask("elsewhere.default.svc", "AAAA");
    assert_eq!(answer.of_kind("CNAME"), [format!("{}.", dns::OUTSIDE_NAME)]);
    for service in ["elsewhere", "nginx"] {
        let text = cluster.lab.node(0).portolan(&["services"]).unwrap();
        assert!(!text.contains(&format!("default/{service}")), "{text}");
    }
}

/// D9
#[test]
fn the_version_of_the_schema_is_told() {
    assert_eq!(Cluster::shared().records("dns-version", "TXT"), ["\"1.1.0\""]);
}

/// D1, D5: by the short names that a pod's search list completes, as `nslookup` asks them.
#[test]
fn short_names_are_completed_in_pods() {
    let cluster = Cluster::shared();
    let shell = cluster.lab.pod("shell").unwrap();
    let text = shell.place().run("nslookup", &["clustered"]).unwrap();
    assert!(text.contains(V4) && text.contains(&dns::ADDRESS.to_string()), "{text}");
    let own = cluster.address("web-0", "A");
    let text = shell.place().run("nslookup", &["web-0.nginx"]).unwrap();
    assert!(text.contains(&own), "{text}");
}
