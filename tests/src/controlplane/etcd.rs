//! Objects in great number, written into etcd as the API server would store them: it then serves them like all others, and
//! tells its watchers of them. By its own front door, 10,000 Services take it minutes on two cores.

use super::{ControlPlane, ETCD_PORT, forward};
use crate::lab::at;
use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use http::Request;
use k8s_openapi::ByteString;
use kube::{Client, Config};
use serde_json::{Value, json};
use std::net::Ipv4Addr;

/// etcd's `--max-txn-ops`.
const OBJECTS_AT_ONCE: usize = 128;
/// Transactions under way.
const TRANSACTIONS_AT_ONCE: usize = 4;

/// An object as it is stored.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// Its key below the API server's prefix, such as `services/specs/NAMESPACE/NAME`.
    pub(crate) key: String,
    /// All of it, with `apiVersion`, `kind` and what the API server sets by default.
    pub(crate) object: Value,
}

impl ControlPlane {
    /// Writes objects that nothing else writes. Nobody checks them: they must be as the API server would have made them.
    pub(crate) async fn store(&self, objects: &[Stored]) -> Result<()> {
        let address = forward::listen(self.place.clone(), at(Ipv4Addr::LOCALHOST, ETCD_PORT)).await?;
        let client = Client::try_from(Config::new(format!("http://{address}").parse()?))?;
        futures::stream::iter(objects.chunks(OBJECTS_AT_ONCE))
            .map(|chunk| put(&client, chunk))
            .buffer_unordered(TRANSACTIONS_AT_ONCE)
            .try_collect()
            .await
    }
}

/// One transaction, by etcd's gateway from JSON to gRPC.
async fn put(client: &Client, objects: &[Stored]) -> Result<()> {
    let put = |stored: &Stored| -> Result<Value> {
        let key = ByteString(format!("/registry/{}", stored.key).into_bytes());
        let value = ByteString(serde_json::to_vec(&stored.object)?);
        Ok(json!({ "requestPut": { "key": key, "value": value } }))
    };
    let puts: Vec<_> = objects.iter().map(put).collect::<Result<_>>()?;
    let body = serde_json::to_vec(&json!({ "success": puts }))?;
    let answer: Value =
        client.request(Request::post("/v3/kv/txn").body(body)?).await.context("a transaction of etcd")?;
    ensure!(answer["succeeded"] == true, "etcd refused a transaction: {answer}");
    Ok(())
}
