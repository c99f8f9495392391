//! The lab's scheduler: gives each pod of a DaemonSet the node that it is for, and each other one the node that has the fewest
//! pods. It knows no resources, taints or other affinity, only `spec.unschedulable` (`kubectl cordon`).

use super::objects::insist;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ListParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Runs for ever.
pub(crate) async fn run(client: Client, nodes: Vec<String>) {
    let mut bound: BTreeMap<String, String> = BTreeMap::new();
    let mut events = std::pin::pin!(watcher(Api::<Pod>::all(client.clone()), watcher::Config::default()));
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(pod) | Event::InitApply(pod)) => {
                let uid = pod.uid().unwrap_or_default();
                match pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) {
                    Some(node) => {
                        bound.insert(uid, node);
                    }
                    None if pod.metadata.deletion_timestamp.is_none() && !bound.contains_key(&uid) => {
                        let node = match wanted_node(&pod) {
                            Some(node) => Some(node),
                            None => emptiest(&schedulable(&client, &nodes).await, &bound),
                        };
                        let Some(node) = node else { continue };
                        match bind(&client, &pod, &node).await {
                            Ok(()) => {
                                bound.insert(uid, node);
                            }
                            Err(error) => eprintln!("lab scheduler: {}: {error}", pod.name_any()),
                        }
                    }
                    None => {}
                }
            }
            Ok(Event::Delete(pod)) => {
                bound.remove(&pod.uid().unwrap_or_default());
            }
            Ok(Event::Init | Event::InitDone) => {}
            // The watcher begins anew; the API server may be restarting.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(200)).await,
        }
    }
}

/// The node that a DaemonSet made the pod for.
fn wanted_node(pod: &Pod) -> Option<String> {
    let affinity = pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    let fields = terms.iter().flat_map(|term| term.match_fields.iter().flatten());
    let names = fields.filter(|field| field.key == "metadata.name" && field.operator == "In");
    names.flat_map(|field| field.values.iter().flatten()).next().cloned()
}

/// The nodes that are not cordoned.
async fn schedulable(client: &Client, nodes: &[String]) -> Vec<String> {
    let cordoned = |node: &Node| node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true));
    let Ok(list) = Api::<Node>::all(client.clone()).list(&ListParams::default()).await else {
        return nodes.to_vec();
    };
    list.items.iter().filter(|node| !cordoned(node)).map(|node| node.name_any()).collect()
}

fn emptiest(nodes: &[String], bound: &BTreeMap<String, String>) -> Option<String> {
    nodes.iter().min_by_key(|node| bound.values().filter(|other| other == node).count()).cloned()
}

async fn bind(client: &Client, pod: &Pod, node: &str) -> kube::Result<()> {
    let name = pod.name_any();
    let api = Api::<Pod>::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding", "metadata": { "name": name },
        "target": { "apiVersion": "v1", "kind": "Node", "name": node },
    });
    let parameters = PostParams::default();
    insist(|| api.create_subresource::<_, Value>("binding", &name, &parameters, &binding)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_spread_over_the_nodes() {
        let nodes = ["node-1", "node-2"].map(str::to_owned);
        let bound = BTreeMap::from([("a".to_owned(), "node-1".to_owned())]);
        assert_eq!(emptiest(&nodes, &bound).as_deref(), Some("node-2"));
    }
}
