//! The counters of service ports and endpoints, as series: six each, two more for a service port whose
//! connections were given to other endpoints, and never more than the operator wants.

use super::family::{
    ENDPOINT_BYTES, ENDPOINT_FLOWS, ENDPOINT_OPEN, ENDPOINT_PACKETS, Family, LEFT_OUT, SERVICE_BYTES,
    SERVICE_FLOWS, SERVICE_MOVED, SERVICE_OPEN, SERVICE_PACKETS, SERVICE_RESCUED, Text,
};
use crate::compile::ServicePortName;
use dataplane_common::Protocol;
use dataplane_common::counter::Traffic;
use std::net::SocketAddr;

/// Series of one service port or endpoint, at most.
pub const SERIES: usize = 8;

/// The names of service ports by their ids, as many as are told, in the order of the ids.
#[derive(Clone, Debug, Default)]
pub struct Ports {
    /// Ids and names.
    pub ports: Vec<(u32, ServicePortName)>,
    /// How many there are beyond those.
    pub left_out: usize,
}

impl Ports {
    /// Those of the lowest ids: which ones are told changes as little as can be.
    pub fn new<'a>(names: impl IntoIterator<Item = (u32, &'a ServicePortName)>, max: usize) -> Self {
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_unstable_by_key(|(id, _)| *id);
        let left_out = names.len().saturating_sub(max);
        names.truncate(max);
        Self { ports: names.into_iter().map(|(id, name)| (id, name.clone())).collect(), left_out }
    }

    /// The name of an id.
    pub fn get(&self, id: u32) -> Option<&ServicePortName> {
        self.ports.binary_search_by_key(&id, |(id, _)| *id).ok().map(|at| &self.ports[at].1)
    }
}

/// What the kernel counted of one service port or endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    /// What passed.
    pub traffic: Traffic,
    /// How many flows and connected sockets are open.
    pub open: u64,
    /// How many flows got another endpoint, and how many of these were answered then; of a service port.
    pub tries: Option<[u64; 2]>,
}

/// What the kernel counted.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Of service ports.
    pub services: Vec<(ServicePortName, Count)>,
    /// Of endpoints.
    pub endpoints: Vec<(ServicePortName, SocketAddr, Count)>,
    /// How many service ports and endpoints were left out.
    pub left_out: [usize; 2],
}

/// The values of the labels of one service port or endpoint, and what was counted of it.
type Row<'a> = ([&'a str; 5], &'a Count);

impl Counts {
    pub(super) fn write(&self, text: &mut Text) {
        let services: Vec<_> = self
            .services
            .iter()
            .map(|(name, count)| row(name, if name.ipv6 { "IPv6" } else { "IPv4" }, count))
            .collect();
        write(text, [&SERVICE_PACKETS, &SERVICE_BYTES, &SERVICE_FLOWS, &SERVICE_OPEN], &services);
        for (at, family) in [&SERVICE_MOVED, &SERVICE_RESCUED].into_iter().enumerate() {
            text.head(family);
            for (labels, count) in &services {
                if let Some(tries) = count.tries {
                    text.sample(family, labels, tries[at]);
                }
            }
        }
        let addresses: Vec<_> = self.endpoints.iter().map(|(_, address, _)| address.to_string()).collect();
        let endpoints: Vec<_> = self
            .endpoints
            .iter()
            .zip(&addresses)
            .map(|((name, _, count), address)| row(name, address, count))
            .collect();
        write(text, [&ENDPOINT_PACKETS, &ENDPOINT_BYTES, &ENDPOINT_FLOWS, &ENDPOINT_OPEN], &endpoints);
        text.head(&LEFT_OUT);
        for (kind, count) in ["service_port", "endpoint"].into_iter().zip(self.left_out) {
            text.sample(&LEFT_OUT, &[kind], count);
        }
    }
}

fn row<'a>(name: &'a ServicePortName, last: &'a str, count: &'a Count) -> Row<'a> {
    let protocol = match Protocol::try_from(name.proto) {
        Ok(Protocol::Tcp) => "TCP",
        Ok(Protocol::Udp) => "UDP",
        Ok(Protocol::Sctp) => "SCTP",
        Err(_) => "?",
    };
    ([&name.service.namespace, &name.service.name, &name.port, protocol, last], count)
}

fn write(text: &mut Text, [packets, bytes, flows, open]: [&Family; 4], rows: &[Row<'_>]) {
    let mut both = |family: &Family, values: fn(&Traffic) -> [u64; 2]| {
        text.head(family);
        for ([a, b, c, d, e], count) in rows {
            for (direction, value) in ["in", "out"].into_iter().zip(values(&count.traffic)) {
                text.sample(family, &[a, b, c, d, e, direction], value);
            }
        }
    };
    both(packets, |traffic| [traffic.packets_in, traffic.packets_out]);
    both(bytes, |traffic| [traffic.bytes_in, traffic.bytes_out]);
    text.head(flows);
    for (labels, count) in rows {
        text.sample(flows, labels, count.traffic.new_flows);
    }
    text.head(open);
    for (labels, count) in rows {
        text.sample(open, labels, count.open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::samples::name;

    fn port(text: &str, ipv6: bool) -> ServicePortName {
        ServicePortName { service: name(text), port: "http".into(), proto: 6, ipv6 }
    }

    /// H3
    #[test]
    fn the_names_that_are_told_are_bounded_and_stay() {
        let names: Vec<_> = (0..5).map(|n| port(&format!("web-{n}"), false)).collect();
        let ports = Ports::new([(9, &names[0]), (2, &names[1]), (5, &names[2])], 2);
        assert_eq!((ports.ports.len(), ports.left_out), (2, 1));
        assert_eq!((ports.get(2), ports.get(5), ports.get(9)), (Some(&names[1]), Some(&names[2]), None));
    }

    /// H3
    #[test]
    fn each_service_port_and_endpoint_has_its_counters() {
        let traffic = Traffic { packets_in: 1, bytes_in: 2, packets_out: 3, bytes_out: 4, new_flows: 5 };
        let count = Count { traffic, open: 8, tries: None };
        let moved = Count { tries: Some([9, 10]), ..count };
        let counts = Counts {
            services: vec![(port("web", true), moved), (port("mail", true), count)],
            endpoints: vec![(port("web", false), "10.0.0.1:8080".parse().unwrap(), count)],
            left_out: [6, 7],
        };
        let mut text = Text::default();
        counts.write(&mut text);
        let text = text.into_string();
        let labels = "namespace=\"default\",service=\"web\",port=\"http\",protocol=\"TCP\"";
        for line in [
            format!("portolan_service_packets_total{{{labels},ip_family=\"IPv6\",direction=\"in\"}} 1"),
            format!("portolan_service_bytes_total{{{labels},ip_family=\"IPv6\",direction=\"out\"}} 4"),
            format!("portolan_service_flows_total{{{labels},ip_family=\"IPv6\"}} 5"),
            format!(
                "portolan_endpoint_packets_total{{{labels},endpoint=\"10.0.0.1:8080\",direction=\"out\"}} 3"
            ),
            format!(
                "portolan_endpoint_bytes_total{{{labels},endpoint=\"10.0.0.1:8080\",direction=\"in\"}} 2"
            ),
            format!("portolan_endpoint_flows_total{{{labels},endpoint=\"10.0.0.1:8080\"}} 5"),
            format!("portolan_service_open_connections{{{labels},ip_family=\"IPv6\"}} 8"),
            format!("portolan_service_moved_total{{{labels},ip_family=\"IPv6\"}} 9"),
            format!("portolan_service_rescued_total{{{labels},ip_family=\"IPv6\"}} 10"),
            format!("portolan_endpoint_open_connections{{{labels},endpoint=\"10.0.0.1:8080\"}} 8"),
            "portolan_metrics_left_out{kind=\"service_port\"} 6".to_owned(),
            "portolan_metrics_left_out{kind=\"endpoint\"} 7".to_owned(),
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        assert_eq!(samples.count(), SERIES + 6 + 6 + 2);
    }
}
