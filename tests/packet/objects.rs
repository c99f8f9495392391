//! The objects that the cases share.

/// ClusterIP of the Service.
pub(crate) const CLUSTER_IP: &str = "10.96.0.1";

/// A Service `web` with TCP and UDP port 80 and node port 30080, extra lines of its spec, and one slice with these
/// endpoints: address, node, conditions.
pub(crate) fn web(spec: &str, endpoints: &[(&str, &str, &str)]) -> String {
    let mut yaml = format!(
        "apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec:
  type: NodePort
  clusterIP: {CLUSTER_IP}
  clusterIPs: [{CLUSTER_IP}]
  {spec}
  ports:
  - {{name: tcp, protocol: TCP, port: 80, targetPort: 8080, nodePort: 30080}}
  - {{name: udp, protocol: UDP, port: 80, targetPort: 8080, nodePort: 30080}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports:
- {{name: tcp, protocol: TCP, port: 8080}}
- {{name: udp, protocol: UDP, port: 8080}}
"
    );
    if endpoints.is_empty() {
        yaml.push_str("endpoints: []\n");
        return yaml;
    }
    yaml.push_str("endpoints:\n");
    for (address, node, conditions) in endpoints {
        yaml.push_str(&format!(
            "- {{addresses: [{address}], nodeName: {node}, conditions: {{{conditions}}}}}\n"
        ));
    }
    yaml
}

/// An endpoint in a pod of this node.
pub(crate) const LOCAL: (&str, &str, &str) = ("10.244.1.9", "here", "ready: true");
/// An endpoint on another node.
pub(crate) const REMOTE: (&str, &str, &str) = ("10.244.2.9", "there", "ready: true");
