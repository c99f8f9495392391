//! Objects that cannot be read, or that break a rule so that they are none: each costs itself only (Z5).

use crate::random::Random;
use dataplane_tests::oracle::Cluster;
use serde_json::{Value, json};

/// What is wrong with a Service: a path into it, and what stands there.
fn of_service(random: &mut Random) -> Vec<(&'static str, Value)> {
    let wrongs = [
        vec![("/spec/ports/0/port", json!(70_000))],
        vec![("/spec/ports/0/port", json!("eighty"))],
        vec![("/spec/ports/0/port", Value::Null)],
        vec![("/spec/ports/0/nodePort", json!(-1))],
        vec![("/spec/ports/0/protocol", json!("ICMP"))],
        vec![("/spec/ports", json!("none"))],
        vec![("/spec/type", json!("Everywhere"))],
        vec![("/spec/clusterIPs", json!(["10.96.0.300"]))],
        vec![("/spec/clusterIPs", json!(["fd00::g"]))],
        vec![("/spec/externalIPs", json!(["nowhere"]))],
        vec![("/spec/loadBalancerSourceRanges", json!(["10.0.0.0/33"]))],
        vec![("/spec/sessionAffinity", json!("Sticky"))],
        vec![
            ("/spec/sessionAffinity", json!("ClientIP")),
            ("/spec/sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 86_401}})),
        ],
        vec![("/status", json!({"loadBalancer": {"ingress": [{"ip": "1.2.3"}]}}))],
        vec![("/metadata/name", Value::Null)],
    ];
    wrongs[random.below(wrongs.len())].clone()
}

/// The same of a slice.
fn of_slice(random: &mut Random) -> Vec<(&'static str, Value)> {
    let wrongs = [
        vec![("/addressType", json!("IPv5"))],
        vec![("/addressType", Value::Null)],
        vec![("/addressType", json!("IPv4")), ("/endpoints", json!([{"addresses": ["10.244.1"]}]))],
        vec![("/addressType", json!("IPv6")), ("/endpoints", json!([{"addresses": ["fd00:::1"]}]))],
        vec![("/endpoints", json!({"addresses": []}))],
        vec![("/ports", json!([{"name": "p0", "protocol": "TCP", "port": 65_536}]))],
        vec![("/ports", json!([{"name": "p0", "protocol": "GRE", "port": 80}]))],
        vec![("/metadata/name", Value::Null)],
    ];
    wrongs[random.below(wrongs.len())].clone()
}

/// What is no object at all.
const NOTHING: [&str; 3] = ["{]", "apiVersion: v1\nkind: Service\nmetadata: 3", "just words"];

/// Breaks some objects of a cluster: they are no longer in it, but among the documents that are given back.
pub(crate) fn some(random: &mut Random, cluster: &mut Cluster) -> Vec<String> {
    let mut broken = Vec::new();
    while random.chance(25) {
        let (services, slices) = (cluster.services.len(), cluster.slices.len());
        let (object, wrongs) = match random.below(3) {
            0 if services > 1 => {
                let service = cluster.services.remove(random.below(services));
                (serde_json::to_value(service), of_service(random))
            }
            1 if slices > 0 => {
                let at = random.below(slices);
                // F3: nobody reads these.
                let labels = cluster.slices[at].metadata.labels.as_ref();
                if labels.is_some_and(|labels| labels.contains_key("service.kubernetes.io/headless")) {
                    continue;
                }
                let slice = cluster.slices.remove(at);
                (serde_json::to_value(slice), of_slice(random))
            }
            _ => {
                broken.push(random.of(&NOTHING).to_owned());
                continue;
            }
        };
        let mut object = object.unwrap();
        for (path, wrong) in wrongs {
            put(&mut object, path, wrong);
        }
        broken.push(object.to_string());
    }
    broken
}

/// Puts a value at the end of a path, of which all but the last step is there.
fn put(object: &mut Value, path: &str, value: Value) {
    let Some((parent, last)) = path.rsplit_once('/') else { return };
    match object.pointer_mut(parent) {
        Some(Value::Object(fields)) => drop(fields.insert(last.to_owned(), value)),
        _ => panic!("{path} leads nowhere in {object}"),
    }
}
