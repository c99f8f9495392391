//! An object as the API server sends it: read as far as it can be read, so that one that cannot costs no other (Z5).

use crate::model::{Kind, Object, ObjectName, Reference};
use crate::watch::names::Names;
use crate::watch::objects::{Metadata, Written};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// An object, or why it is none.
#[derive(Clone, Debug)]
pub(super) struct Seen<W> {
    object: Result<W, Unread>,
    /// `kube` wants one of its own; nothing is in it.
    metadata: ObjectMeta,
}

/// What can be told of an object that could not be read.
#[derive(Clone, Debug)]
struct Unread {
    metadata: Metadata,
    error: String,
}

#[derive(Default, Deserialize)]
struct Named {
    #[serde(default)]
    metadata: Metadata,
}

impl<'de, W: Written> Deserialize<'de> for Seen<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let object = serde_json::from_str(text.get()).map_err(|error| {
            let named: Named = serde_json::from_str(text.get()).unwrap_or_default();
            Unread { metadata: named.metadata, error: error.to_string() }
        });
        Ok(Self { object, metadata: ObjectMeta::default() })
    }
}

impl<W: Written> Seen<W> {
    fn written(&self) -> &Metadata {
        match &self.object {
            Ok(object) => object.metadata(),
            Err(unread) => &unread.metadata,
        }
    }

    /// Where the watch is after this object.
    pub(super) fn resource_version(&self) -> Option<&str> {
        self.written().resource_version.as_deref()
    }

    /// The object's name.
    pub(super) fn reference(&self, names: &mut Names) -> Reference {
        let name = self.written().object_name(W::NAMESPACED, names);
        Reference { kind: W::KIND, name: name.unwrap_or_else(|_| ObjectName::new("", "(without a name)")) }
    }

    /// The object; or its name, and why it cannot be read.
    pub(super) fn read(self, names: &mut Names) -> Result<Object, (Reference, String)> {
        let reference = self.reference(names);
        let converted = match self.object {
            Ok(written) => written.convert(names).map_err(|error| error.to_string()),
            Err(unread) => Err(unread.error),
        };
        converted.map_err(|error| (reference, format!("{error} (look at it with kubectl get -o yaml)")))
    }
}

impl<W: Written> Resource for Seen<W> {
    type DynamicType = ();
    type Scope = kube::core::DynamicResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        match W::KIND {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
        }
        .into()
    }

    fn group((): &()) -> Cow<'_, str> {
        W::GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        W::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
