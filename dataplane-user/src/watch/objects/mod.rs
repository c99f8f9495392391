//! Kubernetes objects as they are written, with no more fields than the contract reads, and their conversion into
//! [`model`](crate::model) types.
//!
//! An object that breaks a rule is refused as a whole, with the field named (Z5); the caller keeps what it knew of it.
//! Nothing here does I/O, and nothing knows whether an object came from an API server or from a file.

mod annotations;
mod node;
mod service;
mod slice;

use super::names::Names;
use crate::model::{ChoiceAnnotations, Kind, Object, ObjectName, Protocol, Reference};
use annotations::Annotations;
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::net::{IpAddr, Ipv4Addr};

pub use node::{WrittenNode, WrittenServiceCidr};
pub use service::WrittenService;
pub use slice::WrittenEndpointSlice;

/// The label of F2.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// The label of F3.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Why an object cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// The object has no name.
    #[error("metadata.name is missing")]
    NoName,
    /// A port number out of range.
    #[error("{field} is {value}, which is not a port (1 to 65535)")]
    Port {
        /// The field.
        field: String,
        /// What it holds.
        value: i64,
    },
    /// A field that must be there is not.
    #[error("{field} is missing")]
    Missing {
        /// The field.
        field: String,
    },
    /// Not an IP address.
    #[error("{field} is \"{value}\", which is not an IP address")]
    Address {
        /// The field.
        field: String,
        /// What it holds.
        value: String,
    },
    /// Not a range of IP addresses.
    #[error("{field} is \"{value}\", which is not a range of addresses such as 10.0.0.0/8")]
    Range {
        /// The field.
        field: String,
        /// What it holds.
        value: String,
    },
    /// A word that is none of those allowed.
    #[error("{field} is \"{value}\", which is none of {allowed}")]
    Word {
        /// The field.
        field: String,
        /// What it holds.
        value: String,
        /// The words allowed.
        allowed: &'static str,
    },
    /// An affinity timeout out of range.
    #[error(
        "spec.sessionAffinityConfig.clientIP.timeoutSeconds is {value}, which is not between 1 and 86400 seconds"
    )]
    AffinityTimeout {
        /// What it holds.
        value: i64,
    },
}

/// A kind of object as it is written.
pub trait Written: DeserializeOwned + Clone + Send + Sync + std::fmt::Debug + 'static {
    /// The kind it becomes.
    const KIND: Kind;
    /// Its API group; empty for the core group.
    const GROUP: &'static str;
    /// Its name in a URL.
    const PLURAL: &'static str;
    /// Whether it lives in a namespace.
    const NAMESPACED: bool;

    /// Its metadata.
    fn metadata(&self) -> &Metadata;

    /// The object in the model's terms.
    fn convert(self, names: &mut Names) -> Result<Object, ObjectError>;

    /// Kind and name; the namespace is `default` where none is written.
    fn reference(&self, names: &mut Names) -> Result<Reference, ObjectError> {
        Ok(Reference { kind: Self::KIND, name: self.metadata().object_name(Self::NAMESPACED, names)? })
    }
}

/// `metadata`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// `name`.
    pub name: Option<String>,
    /// `namespace`.
    pub namespace: Option<String>,
    /// `resourceVersion`.
    pub resource_version: Option<String>,
    uid: Option<String>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<IgnoredAny>,
    labels: Option<Labels>,
    annotations: Option<Annotations>,
}

/// The labels that the contract reads.
#[derive(Clone, Debug, Default, Deserialize)]
struct Labels {
    #[serde(rename = "service.kubernetes.io/service-proxy-name")]
    proxy_name: Option<String>,
    #[serde(rename = "service.kubernetes.io/headless")]
    headless: Option<IgnoredAny>,
    #[serde(rename = "kubernetes.io/service-name")]
    service_name: Option<String>,
    #[serde(rename = "topology.kubernetes.io/zone")]
    zone: Option<String>,
    #[serde(rename = "endpointslice.kubernetes.io/managed-by")]
    managed_by: Option<String>,
}

impl Metadata {
    /// Namespace and name.
    pub fn object_name(&self, namespaced: bool, names: &mut Names) -> Result<ObjectName, ObjectError> {
        let name = self.name.as_deref().filter(|name| !name.is_empty()).ok_or(ObjectError::NoName)?;
        let namespace = match (namespaced, self.namespace.as_deref()) {
            (false, _) => "",
            (true, None | Some("")) => "default",
            (true, Some(namespace)) => namespace,
        };
        Ok(ObjectName::new(names.get(namespace), name))
    }

    /// Whether the label of F3 is there.
    pub fn is_headless(&self) -> bool {
        self.labels.as_ref().is_some_and(|labels| labels.headless.is_some())
    }

    /// The value of the label of F2.
    pub fn proxy_name(&self) -> Option<&str> {
        self.labels.as_ref()?.proxy_name.as_deref()
    }

    /// What its annotations ask of the choice of an endpoint (L1).
    fn choice(&self) -> Option<Box<ChoiceAnnotations>> {
        self.annotations.as_ref()?.choice()
    }

    /// Seconds since 1970; 0 where there is no (readable) time.
    fn created(&self) -> i64 {
        let written = self.creation_timestamp.as_deref();
        written.and_then(|time| time.parse::<Timestamp>().ok()).map_or(0, Timestamp::as_second)
    }
}

/// Converts each entry of a list; `convert` is told the entry's path and may leave it out.
fn all<T, U>(
    field: &str,
    list: Option<Vec<T>>,
    mut convert: impl FnMut(&str, T) -> Result<Option<U>, ObjectError>,
) -> Result<Vec<U>, ObjectError> {
    let list = list.unwrap_or_default();
    let mut converted = Vec::with_capacity(list.len());
    for (index, entry) in list.into_iter().enumerate() {
        converted.extend(convert(&format!("{field}[{index}]"), entry)?);
    }
    converted.shrink_to_fit();
    Ok(converted)
}

fn protocol(field: &str, word: Option<&str>) -> Result<Protocol, ObjectError> {
    match word {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(ObjectError::Word {
            field: format!("{field}.protocol"),
            value: other.to_owned(),
            allowed: "TCP, UDP, SCTP",
        }),
    }
}

fn port(field: &str, value: i64) -> Result<u16, ObjectError> {
    let port = u16::try_from(value).ok().filter(|port| *port != 0);
    port.ok_or_else(|| ObjectError::Port { field: field.to_owned(), value })
}

/// The API server writes 0 for a port that was not given.
fn optional_port(field: &str, value: Option<i64>) -> Result<Option<u16>, ObjectError> {
    value.filter(|value| *value != 0).map(|value| port(field, value)).transpose()
}

fn address(field: &str, text: &str) -> Result<IpAddr, ObjectError> {
    parse_ip(text).ok_or_else(|| ObjectError::Address { field: field.to_owned(), value: text.to_owned() })
}

/// Ranges, trimmed (F4); bits behind the prefix do not count.
fn ranges(field: &str, list: Option<Vec<String>>) -> Result<Vec<IpNet>, ObjectError> {
    all(field, list, |field, text: String| match parse_range(text.trim()) {
        Some(range) => Ok(Some(range)),
        None => Err(ObjectError::Range { field: field.to_owned(), value: text }),
    })
}

/// Numbers with leading zeros are decimal and mapped addresses are IPv4, as in Kubernetes, where objects older than
/// today's validation may hold them.
fn parse_ip(text: &str) -> Option<IpAddr> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.to_canonical());
    }
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *octet = part.parse().ok()?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets).into())
}

fn parse_range(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    if length.is_empty() || !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    IpNet::new(parse_ip(address)?, length.parse().ok()?).ok().map(|range| range.trunc())
}

#[cfg(test)]
mod tests;
