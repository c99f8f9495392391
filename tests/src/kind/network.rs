//! The pod network of a cluster whose node image is our own: what kind's own would make, once.
//!
//! Each node gets a configuration of the plugins `ptp` and `portmap` with its range, routes to the other nodes' ranges, and a rule
//! that masquerades what pods send out of the pod network.

use super::cluster::{Cluster, wait};
use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde_json::{Value, json};
use std::net::IpAddr;

/// A node and what it has.
struct Member {
    name: String,
    addresses: Vec<IpAddr>,
    /// One of each IP family.
    ranges: Vec<IpNet>,
}

/// Makes it, when every node has been given its ranges.
pub(super) fn raise(cluster: &Cluster) -> Result<()> {
    let count = cluster.nodes()?.len();
    wait("every node has a range of addresses for its pods", || Ok(members(cluster)?.len() == count))?;
    let members = members(cluster)?;
    let all: Vec<_> = members.iter().flat_map(|member| member.ranges.iter().copied()).collect();
    for member in &members {
        let run = |arguments: &[&str], input: &str| cluster.on_node(&member.name, arguments, input);
        for other in members.iter().filter(|other| other.name != member.name) {
            for range in &other.ranges {
                let via = other.addresses.iter().find(|address| address.is_ipv4() == is_ipv4(range));
                let via =
                    via.with_context(|| format!("{} has no address of the family of {range}", other.name))?;
                run(&["ip", "route", "replace", &range.to_string(), "via", &via.to_string()], "")?;
            }
        }
        for range in &member.ranges {
            let forwarding =
                if is_ipv4(range) { "net.ipv4.ip_forward=1" } else { "net.ipv6.conf.all.forwarding=1" };
            run(&["sysctl", "--quiet", "--write", forwarding], "")?;
            run(&["nft", "-f", "-"], &masquerading(range, &all))?;
        }
        // The file appears whole: the runtime watches the folder.
        let place = "cat > /etc/cni/net.d/.new && mv /etc/cni/net.d/.new /etc/cni/net.d/10-pods.conflist";
        run(&["sh", "-c", place], &plugins(&member.ranges))?;
    }
    Ok(())
}

const fn is_ipv4(range: &IpNet) -> bool {
    matches!(range, IpNet::V4(_))
}

fn members(cluster: &Cluster) -> Result<Vec<Member>> {
    let text = cluster.kubectl(&["get", "nodes", "--output", "json"], "")?;
    let list: Value = serde_json::from_str(&text)?;
    let nodes = list["items"].as_array().context("no list of nodes")?;
    let mut members = Vec::new();
    for node in nodes {
        let name = node["metadata"]["name"].as_str().context("a node without a name")?;
        let ranges = node["spec"]["podCIDRs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let ranges = ranges.map(str::parse).collect::<Result<Vec<IpNet>, _>>()?;
        if !ranges.is_empty() {
            members.push(Member { name: name.into(), addresses: cluster.addresses(name)?, ranges });
        }
    }
    Ok(members)
}

fn plugins(own: &[IpNet]) -> String {
    let ranges: Vec<_> = own.iter().map(|range| json!([{ "subnet": range }])).collect();
    let routes = own.iter().map(|range| json!({ "dst": if is_ipv4(range) { "0.0.0.0/0" } else { "::/0" } }));
    let addresses = json!({
        "type": "host-local", "dataDir": "/run/pod-addresses", "ranges": ranges, "routes": routes.collect::<Vec<_>>(),
    });
    json!({
        "cniVersion": "1.0.0", "name": "pods",
        "plugins": [
            { "type": "ptp", "mtu": 1500, "ipMasq": false, "ipam": addresses },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
    .to_string()
}

fn masquerading(own: &IpNet, all: &[IpNet]) -> String {
    let family = if is_ipv4(own) { "ip" } else { "ip6" };
    let same = all.iter().filter(|range| is_ipv4(range) == is_ipv4(own)).map(ToString::to_string);
    format!(
        "table {family} pods {{\n chain leaving {{\n  type nat hook postrouting priority srcnat; policy accept;\n  \
         {family} saddr {own} {family} daddr != {{ {} }} fib daddr type != local masquerade\n }}\n}}\n",
        same.collect::<Vec<_>>().join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_the_pod_network_is_masqueraded_by_family() {
        let ranges =
            ["10.244.0.0/24", "fd00::/64", "10.244.1.0/24"].map(|range| range.parse::<IpNet>().unwrap());
        let text = masquerading(&ranges[0], &ranges);
        assert!(
            text.contains("ip saddr 10.244.0.0/24 ip daddr != { 10.244.0.0/24, 10.244.1.0/24 } fib"),
            "{text}"
        );
        assert!(masquerading(&ranges[1], &ranges).contains("table ip6 pods"));
        let plugins: Value = serde_json::from_str(&plugins(&ranges[..2])).unwrap();
        assert_eq!(
            plugins["plugins"][0]["ipam"]["routes"],
            json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }])
        );
    }
}
