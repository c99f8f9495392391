//! Single requests to the API server, and the keys it needs.

use crate::lab;
use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::{Api, Client};
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use serde_json::{Value, json};
use std::fs;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a request is tried again while the API server does not answer, and how often.
const PATIENCE: Duration = Duration::from_secs(120);
const RETRY_PERIOD: Duration = Duration::from_millis(200);

/// Who writes.
const FIELD_MANAGER: &str = "portolan-lab";

/// The keys of service accounts, which CoreDNS uses and the API server wants.
pub(crate) fn write_account_keys(folder: &Path) -> Result<()> {
    /// `SubjectPublicKeyInfo` of an uncompressed point on P-256, up to the point.
    const PUBLIC_KEY_HEAD: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
        0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    let random = ring::rand::SystemRandom::new();
    let failed = |_| anyhow::anyhow!("no key could be made");
    let private = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).map_err(failed)?;
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, private.as_ref(), &random)
        .map_err(|error| anyhow::anyhow!("the key that was made: {error}"))?;
    let public = [&PUBLIC_KEY_HEAD, pair.public_key().as_ref()].concat();
    for (file, label, der) in
        [("accounts.key", "PRIVATE KEY", private.as_ref()), ("accounts.pub", "PUBLIC KEY", &public)]
    {
        fs::write(folder.join(file), pem::encode(&pem::Pem::new(label, der)))?;
    }
    Ok(())
}

/// Whether the API server says that it is ready.
pub(crate) async fn is_ready(client: &Client) -> Result<()> {
    let request = http::Request::get("/readyz").body(Vec::new())?;
    client.request_text(request).await?;
    // Ready comes before the namespaces are there.
    Api::<k8s_openapi::api::core::v1::Namespace>::all(client.clone()).get("default").await?;
    Ok(())
}

/// Makes a request again until the API server answers it, as a kubelet and a scheduler must: it may be restarting.
///
/// # Errors
/// What the API server refuses it for, or the last failure when patience ends.
pub(crate) async fn insist<T, F>(request: impl Fn() -> F) -> kube::Result<T>
where
    F: Future<Output = kube::Result<T>>,
{
    let end = Instant::now() + PATIENCE;
    loop {
        match request().await {
            Err(kube::Error::Api(status)) if status.code < 500 && status.code != 429 => {
                return Err(kube::Error::Api(status));
            }
            Err(_) if Instant::now() < end => tokio::time::sleep(RETRY_PERIOD).await,
            answered => return answered,
        }
    }
}

/// A Node object for each node of the lab.
pub(crate) async fn create_nodes(client: &Client, nodes: &[Arc<lab::Node>]) -> Result<()> {
    let api = Api::<Node>::all(client.clone());
    for node in nodes {
        let mut object = lab::manifests::node(node);
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        let mut status = object["status"].take();
        status["conditions"] = json!([{
            "type": "Ready", "status": "True", "reason": "Lab", "message": "a namespace",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }]);
        for field in ["capacity", "allocatable"] {
            status[field] = json!({ "cpu": "8", "memory": "16Gi", "pods": "250" });
        }
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        api.patch(node.name(), &parameters, &Patch::Apply(&object)).await?;
        // Apply knows addresses by their type, and a node has one of each family.
        let status = json!({ "status": status });
        api.patch_status(node.name(), &PatchParams::default(), &Patch::Merge(&status)).await?;
    }
    Ok(())
}

/// The API and the name of an object that is known by its manifest.
fn addressed(client: &Client, object: &Value) -> Result<(Api<DynamicObject>, String)> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let (version, kind) = version.zip(kind).context("an object without apiVersion or kind")?;
    let name = text(&object["metadata"]["name"]).context("an object without a name")?;
    let (group, version) = version.split_once('/').unwrap_or(("", &version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
    let namespace = text(&object["metadata"]["namespace"]).unwrap_or_else(|| "default".into());
    let api = match kind.as_str() {
        "Node" | "Namespace" | "ServiceCIDR" | "ClusterRole" | "ClusterRoleBinding" => {
            Api::all_with(client.clone(), &resource)
        }
        _ => Api::namespaced_with(client.clone(), &namespace, &resource),
    };
    Ok((api, name))
}

pub(crate) async fn apply(client: &Client, objects: &[Value]) -> Result<()> {
    for object in objects {
        let (api, name) = addressed(client, object)?;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let applied = api.patch(&name, &parameters, &Patch::Apply(object)).await;
        applied.with_context(|| format!("{} {name}", object["kind"]))?;
    }
    Ok(())
}

pub(crate) async fn delete(client: &Client, objects: &[Value]) -> Result<()> {
    for object in objects {
        let (api, name) = addressed(client, object)?;
        let deleted = api.delete(&name, &DeleteParams::background()).await;
        deleted.with_context(|| format!("{} {name}", object["kind"]))?;
    }
    Ok(())
}

/// How many endpoints of a Service are ready.
pub(crate) async fn ready_endpoints(client: &Client, service: &str) -> Result<usize> {
    let parameters = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
    let slices = Api::<EndpointSlice>::default_namespaced(client.clone()).list(&parameters).await?;
    let ready = |slice: &EndpointSlice| {
        let endpoints = slice.endpoints.iter().flatten();
        endpoints
            .filter(|endpoint| {
                endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
            })
            .count()
    };
    Ok(slices.items.iter().map(ready).sum())
}
