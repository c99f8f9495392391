//! The manifests that a lab's agents watch: Services, EndpointSlices and Nodes, as YAML files in one folder.
//!
//! A file appears and changes by rename, so that an agent reads the old one or the new one and never a part.

use super::network::{Addresses, Family};
use super::node::Node;
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A port of a Service, and that of its endpoints.
#[derive(Clone, Debug)]
struct Port {
    name: String,
    protocol: &'static str,
    port: u16,
    target: u16,
    node_port: Option<u16>,
}

/// A Service and the EndpointSlice that belongs to it, one for each family that the Service has.
///
/// What has no method is set with [`Service::spec`], [`Service::label`] or [`Service::status`].
#[derive(Clone, Debug)]
pub struct Service {
    namespace: String,
    name: String,
    cluster_ips: Vec<IpAddr>,
    spec: Map<String, Value>,
    status: Value,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

impl Service {
    /// A Service of type ClusterIP in the namespace `default`, of the one family of its address.
    pub fn new(name: &str, cluster_ip: impl Into<IpAddr>) -> Self {
        let mut spec = Map::new();
        spec.insert("type".into(), json!("ClusterIP"));
        Self {
            namespace: "default".into(),
            name: name.into(),
            cluster_ips: vec![cluster_ip.into()],
            spec,
            status: Value::Null,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            ports: Vec::new(),
            endpoints: Vec::new(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ClusterIP of the other family as well: dual-stack.
    #[must_use]
    pub fn and_cluster_ip(mut self, cluster_ip: impl Into<IpAddr>) -> Self {
        self.cluster_ips.push(cluster_ip.into());
        self
    }

    /// In another namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// A TCP port and the port of its endpoints. Ports are named `tcp-PORT`.
    #[must_use]
    pub fn tcp(self, port: u16, target: u16) -> Self {
        self.port("TCP", port, target, None)
    }

    /// A UDP port and the port of its endpoints. Ports are named `udp-PORT`.
    #[must_use]
    pub fn udp(self, port: u16, target: u16) -> Self {
        self.port("UDP", port, target, None)
    }

    /// A TCP port with a node port; the type becomes NodePort.
    #[must_use]
    pub fn tcp_node_port(self, port: u16, target: u16, node_port: u16) -> Self {
        self.port("TCP", port, target, Some(node_port)).spec("type", json!("NodePort"))
    }

    /// A UDP port with a node port; the type becomes NodePort.
    #[must_use]
    pub fn udp_node_port(self, port: u16, target: u16, node_port: u16) -> Self {
        self.port("UDP", port, target, Some(node_port)).spec("type", json!("NodePort"))
    }

    fn port(mut self, protocol: &'static str, port: u16, target: u16, node_port: Option<u16>) -> Self {
        let name = format!("{}-{port}", protocol.to_lowercase());
        self.ports.push(Port { name, protocol, port, target, node_port });
        self
    }

    /// `externalTrafficPolicy: Local`.
    #[must_use]
    pub fn external_local(self) -> Self {
        self.spec("externalTrafficPolicy", json!("Local"))
    }

    /// `internalTrafficPolicy: Local`.
    #[must_use]
    pub fn internal_local(self) -> Self {
        self.spec("internalTrafficPolicy", json!("Local"))
    }

    /// Any field of `spec`.
    #[must_use]
    pub fn spec(mut self, field: &str, value: Value) -> Self {
        self.spec.insert(field.into(), value);
        self
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.insert(name.into(), value.into());
        self
    }

    /// `status`.
    #[must_use]
    pub fn status(mut self, status: Value) -> Self {
        self.status = status;
        self
    }

    /// A label of the Service.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.into(), value.into());
        self
    }

    /// The endpoints, in place of those it had.
    #[must_use]
    pub fn endpoints(mut self, endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        self.endpoints = endpoints.into_iter().collect();
        self
    }

    /// The same, on a Service that is kept.
    pub fn set_endpoints(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) {
        self.endpoints = endpoints.into_iter().collect();
    }

    /// The endpoints, to be changed one by one.
    pub fn endpoints_mut(&mut self) -> &mut Vec<Endpoint> {
        &mut self.endpoints
    }

    /// Changes the endpoint of one pod.
    pub fn change(&mut self, pod: &str, change: impl FnOnce(&mut Endpoint)) {
        if let Some(endpoint) = self.endpoints.iter_mut().find(|endpoint| endpoint.pod == pod) {
            change(endpoint);
        }
    }

    /// The Service and its slices.
    pub fn objects(&self) -> Vec<Value> {
        let slices = self.cluster_ips.iter().map(|address| self.slice(Family::of(*address)));
        [self.service()].into_iter().chain(slices).collect()
    }

    /// The Service alone.
    pub fn service(&self) -> Value {
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| {
                let mut value = json!({
                    "name": port.name, "protocol": port.protocol, "port": port.port, "targetPort": port.target,
                });
                if let Some(node_port) = port.node_port {
                    value["nodePort"] = json!(node_port);
                }
                value
            })
            .collect();
        let mut spec = self.spec.clone();
        spec.insert("ports".into(), ports.into());
        if let [first, others @ ..] = self.cluster_ips.as_slice() {
            let families: Vec<_> =
                self.cluster_ips.iter().map(|address| family_name(Family::of(*address))).collect();
            let policy = if others.is_empty() { "SingleStack" } else { "RequireDualStack" };
            for (field, value) in [
                ("clusterIP", json!(first)),
                ("clusterIPs", json!(self.cluster_ips)),
                ("ipFamilies", json!(families)),
                ("ipFamilyPolicy", json!(policy)),
            ] {
                spec.entry(field).or_insert(value);
            }
        }
        let mut metadata = json!({ "name": self.name, "namespace": self.namespace });
        for (field, entries) in [("labels", &self.labels), ("annotations", &self.annotations)] {
            if !entries.is_empty() {
                metadata[field] = json!(entries);
            }
        }
        let mut value = json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec });
        if !self.status.is_null() {
            value["status"] = self.status.clone();
        }
        value
    }

    fn slice(&self, family: Family) -> Value {
        let endpoints: Vec<_> = self.endpoints.iter().filter_map(|endpoint| endpoint.value(family)).collect();
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| json!({ "name": port.name, "protocol": port.protocol, "port": port.target }))
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{}", self.name, family_name(family).to_lowercase()),
                "namespace": self.namespace,
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "addressType": family_name(family),
            "ports": ports,
            "endpoints": endpoints,
        })
    }
}

/// As Kubernetes writes it.
const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// An endpoint, of the slices of each family that it has an address of.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The pod's name.
    pub pod: String,
    /// Its IPv4 address.
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub address6: Option<Ipv6Addr>,
    /// The node's name; empty: the field is missing.
    pub node: String,
    /// `conditions.ready`; `None`: missing.
    pub ready: Option<bool>,
    /// `conditions.serving`; `None`: missing.
    pub serving: Option<bool>,
    /// `conditions.terminating`; `None`: missing.
    pub terminating: Option<bool>,
    /// `hints.forNodes`.
    pub for_nodes: Vec<String>,
    /// `hints.forZones`.
    pub for_zones: Vec<String>,
}

impl Endpoint {
    /// A ready endpoint with an address of each family.
    pub fn of(pod: &str, addresses: Addresses, node: &str) -> Self {
        Self { address6: Some(addresses.v6), ..Self::new(pod, addresses.v4, node) }
    }

    /// A ready endpoint with one address.
    pub fn new(pod: &str, address: impl Into<IpAddr>, node: &str) -> Self {
        let (address, address6) = match address.into() {
            IpAddr::V4(address) => (Some(address), None),
            IpAddr::V6(address) => (None, Some(address)),
        };
        Self {
            pod: pod.into(),
            address,
            address6,
            node: node.into(),
            ready: Some(true),
            serving: Some(true),
            terminating: Some(false),
            for_nodes: Vec::new(),
            for_zones: Vec::new(),
        }
    }

    /// Not ready, not serving, not terminating.
    pub fn set_not_ready(&mut self) {
        (self.ready, self.serving, self.terminating) = (Some(false), Some(false), Some(false));
    }

    /// Terminating, and serving still or not.
    pub fn set_terminating(&mut self, serving: bool) {
        (self.ready, self.serving, self.terminating) = (Some(false), Some(serving), Some(true));
    }

    /// As a slice of a family has it; `None` if it has no address of that.
    fn value(&self, family: Family) -> Option<Value> {
        let address = match family {
            Family::V4 => self.address.map(IpAddr::V4),
            Family::V6 => self.address6.map(IpAddr::V6),
        }?;
        let mut conditions = Map::new();
        for (name, value) in
            [("ready", self.ready), ("serving", self.serving), ("terminating", self.terminating)]
        {
            if let Some(value) = value {
                conditions.insert(name.into(), value.into());
            }
        }
        let mut value = json!({ "addresses": [address], "conditions": conditions });
        if !self.pod.is_empty() {
            value["targetRef"] = json!({ "kind": "Pod", "name": self.pod, "namespace": "default" });
        }
        if !self.node.is_empty() {
            value["nodeName"] = json!(self.node);
        }
        let names = |list: &[String]| list.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
        if !self.for_nodes.is_empty() {
            value["hints"]["forNodes"] = names(&self.for_nodes).into();
        }
        if !self.for_zones.is_empty() {
            value["hints"]["forZones"] = names(&self.for_zones).into();
        }
        Some(value)
    }
}

/// The folder.
#[derive(Debug)]
pub struct Manifests {
    folder: PathBuf,
}

impl Manifests {
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.into() })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a Service with its endpoints to `NAMESPACE-NAME.yaml`.
    pub fn apply(&self, service: &Service) -> Result<()> {
        self.write(&Self::file(service), &documents(&service.objects()))
    }

    /// Deletes a Service with its endpoints.
    pub fn delete(&self, service: &Service) -> Result<()> {
        self.remove(&Self::file(service))
    }

    fn file(service: &Service) -> String {
        format!("{}-{}.yaml", service.namespace, service.name)
    }

    /// Writes a file in one step.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let new = self.folder.join(format!(".{file}.{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::write(&new, text).with_context(|| new.display().to_string())?;
        fs::rename(&new, self.folder.join(file)).with_context(|| file.to_owned())
    }

    /// Removes a file.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.folder.join(file)).with_context(|| file.to_owned())
    }
}

/// A Node, as the manifests have it.
pub(crate) fn node(node: &Node) -> Value {
    let [first, second] = node.addresses().both();
    let ranges = node.pod_ranges();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node.name(), "labels": node.labels() },
        "spec": { "podCIDR": ranges[0], "podCIDRs": ranges },
        "status": { "addresses": [
            { "type": "InternalIP", "address": first },
            { "type": "InternalIP", "address": second },
            { "type": "Hostname", "address": node.name() },
        ] },
    })
}

/// Objects as YAML documents of one file.
pub fn documents(objects: &[Value]) -> String {
    objects.iter().map(yaml).collect::<Vec<_>>().join("---\n")
}

/// One object as YAML.
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    block(value, 0, &mut text);
    text
}

/// A mapping or a list, one entry per line; the cursor is at the indentation already.
fn block(value: &Value, indent: usize, text: &mut String) {
    let margin = " ".repeat(indent);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (index, (name, value)) in fields.iter().enumerate() {
                if index > 0 {
                    text.push_str(&margin);
                }
                text.push_str(&scalar(name));
                text.push(':');
                entry(value, indent + 2, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push_str(&margin);
                }
                text.push_str("- ");
                block(item, indent + 2, text);
            }
        }
        Value::String(string) => {
            text.push_str(&scalar(string));
            text.push('\n');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            text.push_str(&value.to_string());
            text.push('\n');
        }
    }
}

/// The value of a field: on the next line if it has lines of its own.
fn entry(value: &Value, indent: usize, text: &mut String) {
    let nested = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    };
    if nested {
        text.push('\n');
        text.push_str(&" ".repeat(indent));
    } else {
        text.push(' ');
    }
    block(value, indent, text);
}

/// A string bare where YAML reads it as that string, else quoted as in JSON.
fn scalar(string: &str) -> String {
    let bare = string.starts_with(|first: char| first.is_ascii_alphabetic())
        && string.chars().all(|char| char.is_ascii_alphanumeric() || "-./".contains(char))
        && !["true", "false", "yes", "no", "on", "off", "null", "y", "n"]
            .contains(&string.to_ascii_lowercase().as_str());
    if bare { string.into() } else { Value::from(string).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_written_as_plain_yaml() {
        let object = json!({ "kind": "Service", "metadata": { "labels": { "a/b": "true" } },
            "spec": { "ips": ["10.0.0.1"], "ports": [{ "name": "http", "port": 80 }], "empty": [] } });
        let text = "kind: Service\nmetadata:\n  labels:\n    a/b: \"true\"\nspec:\n  empty: []\n  ips:\n    \
            - \"10.0.0.1\"\n  ports:\n    - name: http\n      port: 80\n";
        assert_eq!(yaml(&object), text);
    }

    #[test]
    fn an_endpoint_that_drains_is_terminating_and_serving() {
        let mut service = Service::new("web", Ipv4Addr::new(10, 96, 0, 10))
            .tcp(80, 8080)
            .endpoints([Endpoint::new("web-0", Ipv4Addr::new(10, 244, 1, 2), "node-1")]);
        service.change("web-0", |endpoint| endpoint.set_terminating(true));
        let conditions = &service.objects()[1]["endpoints"][0]["conditions"];
        assert_eq!(*conditions, json!({ "ready": false, "serving": true, "terminating": true }));
    }

    #[test]
    fn a_dual_stack_service_has_a_slice_of_each_family() {
        let v6: Ipv6Addr = "fd00:10:244:1::2".parse().unwrap();
        let both =
            Endpoint { address6: Some(v6), ..Endpoint::new("web-0", Ipv4Addr::new(10, 244, 1, 2), "n") };
        let service = Service::new("web", Ipv4Addr::new(10, 96, 0, 10))
            .and_cluster_ip("fd00:10:96::10".parse::<Ipv6Addr>().unwrap())
            .tcp(80, 8080)
            .endpoints([both, Endpoint::new("web-1", Ipv4Addr::new(10, 244, 1, 3), "n")]);
        let objects = service.objects();
        assert_eq!(objects[0]["spec"]["clusterIPs"], json!(["10.96.0.10", "fd00:10:96::10"]));
        assert_eq!(objects[0]["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
        let addresses = |slice: &Value| {
            let endpoints = slice["endpoints"].as_array().unwrap().iter();
            endpoints
                .map(|endpoint| endpoint["addresses"][0].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(objects[1]["addressType"], "IPv4");
        assert_eq!(addresses(&objects[1]), ["10.244.1.2", "10.244.1.3"]);
        assert_eq!(
            (&objects[2]["addressType"], addresses(&objects[2])),
            (&json!("IPv6"), vec![v6.to_string()])
        );
    }
}
