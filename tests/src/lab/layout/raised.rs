//! A layout, raised.

use super::End::{self, Here, There};
use super::On::{self, Second as AtSecond, Uplink, Vpn as AtVpn};
use super::Target::{self, Cached, ClusterIp, LbIp, NodePort};
use super::{Layout, Who};
use crate::lab::client::{Client, at};
use crate::lab::manifests::{Endpoint, Service};
use crate::lab::network::{self, Addresses, Family};
use crate::lab::node::PodOptions;
use crate::lab::place::Place;
use crate::lab::process::{Process, program};
use crate::lab::tunnel;
use crate::lab::{Lab, Options};
use anyhow::{Context, Result};
use serde_json::json;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// The name of the VPN device.
const VPN: &str = "vpn0";
/// Where each end of the VPN listens on the second network.
const VPN_PORT: u16 = 8473;
const SERVICE_PORT: u16 = 80;
const TARGET: u16 = 8080;
const START_TIME: Duration = Duration::from_secs(20);

/// A layout that is raised.
#[derive(Debug)]
pub struct Raised {
    /// Its lab.
    pub lab: Lab,
    layout: &'static Layout,
    second: Option<Place>,
    vpn: Option<Place>,
    services: Vec<Service>,
    _carriers: Vec<Process>,
}

impl Layout {
    /// Makes the lab with its pods and Services. Nobody serves them yet.
    pub fn raise(&'static self) -> Result<Raised> {
        let lab = Options::default().nodes(2).pods(self.pods).create()?;
        let all = || self.second.iter().chain(self.later);
        let outside = |who, name| -> Result<Option<Place>> {
            if all().any(|other| *other == who) { lab.add_alone(name).map(Some) } else { Ok(None) }
        };
        let second = outside(Who::Second, "second")?;
        let vpn = outside(Who::Vpn, "vpn")?;
        let mut raised =
            Raised { layout: self, second, vpn, services: Vec::new(), _carriers: Vec::new(), lab };
        if all().next().is_some() {
            raised.lab.net().ip(&network::second_bridge())?;
        }
        for (name, node) in [("a", 0), ("c", 1)] {
            raised.lab.add_pod(name, node, &PodOptions::default())?;
        }
        raised.lab.add_pod("q", 0, &PodOptions::client())?;
        self.second.iter().try_for_each(|who| raised.join_second(*who))?;
        if raised.vpn.is_some() {
            raised.raise_vpn()?;
        }
        for (who, lines) in self.lines {
            // Rules of routing have the family of an option, and a batch has none.
            let (alone, batch): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.starts_with('-'));
            let batch: Vec<_> = batch.into_iter().map(|line: &&str| (*line).to_owned()).collect();
            raised.place(*who)?.ip(&batch)?;
            for line in alone {
                let words: Vec<_> = line.split_whitespace().collect();
                raised.place(*who)?.run("ip", &words)?;
            }
        }
        for (who, command) in self.commands {
            raised.place(*who)?.run("sh", &["-c", command])?;
        }
        if self.beside {
            raised.raise_beside()?;
        }
        for rule in self.rules {
            raised.lab.node(0).place().run("nft", &[rule])?;
        }
        raised.serve()?;
        Ok(raised)
    }
}

impl Raised {
    /// The layout.
    pub fn layout(&self) -> &'static Layout {
        self.layout
    }

    /// Has those join the second network who come later.
    pub(super) fn join_late(&self) -> Result<()> {
        self.layout.later.iter().try_for_each(|who| self.join_second(*who))
    }

    /// The Services with their endpoints.
    pub(super) fn services(&self) -> &[Service] {
        &self.services
    }

    /// A client.
    pub fn client(&self, who: Who) -> Result<Client> {
        Ok(Client::at(&self.place(who)?))
    }

    /// The address and port of a target.
    pub fn address(&self, target: Target, family: Family) -> SocketAddr {
        match target {
            ClusterIp(end) => at(cluster_ip(end.host()).of(family), SERVICE_PORT),
            NodePort(end, on) => at(self.node_address(on).of(family), end.node_port()),
            LbIp(end) => at(lb_ip(end).of(family), SERVICE_PORT),
            Cached => at(cluster_ip(CACHE_HOST).of(family), SERVICE_PORT),
        }
    }

    fn node_address(&self, on: On) -> Addresses {
        match on {
            Uplink => self.lab.node(0).addresses(),
            AtSecond => network::second(NODE_HOST),
            AtVpn => network::vpn(1),
            On::ClusterIp => cluster_ip(Here.host()),
        }
    }

    /// Where somebody is.
    ///
    /// # Errors
    /// If the layout has nobody of that kind.
    pub fn place(&self, who: Who) -> Result<Place> {
        let place = match who {
            Who::Client => Some(self.lab.client().clone()),
            Who::Second => self.second.clone(),
            Who::Vpn => self.vpn.clone(),
            Who::Node => Some(self.lab.node(0).place().clone()),
            Who::Other => Some(self.lab.node(1).place().clone()),
            Who::Pod => self.lab.pod("q").map(|pod| pod.place().clone()),
            Who::Server => self.lab.pod("a").map(|pod| pod.place().clone()),
        };
        place.with_context(|| format!("{}: there is no {who:?}", self.layout.name))
    }

    fn join_second(&self, who: Who) -> Result<()> {
        let host = match who {
            Who::Node => NODE_HOST,
            Who::Other => NODE_HOST + 1,
            Who::Vpn => VPN_HOST,
            Who::Client | Who::Second | Who::Pod | Who::Server => 200,
        };
        let place = self.place(who)?;
        let port = format!("{}-2", place.name());
        self.lab.net().ip(&[
            format!("link add {port} type veth peer name eth1 netns {}", place.namespace()),
            format!("link set {port} master br1 up"),
        ])?;
        place.ip(&network::second_side(network::second(host)))
    }

    /// A pod that has an address of the nodes' network, whose gateway is the nodes' too.
    fn raise_beside(&self) -> Result<()> {
        let pod = self.lab.add_pod("u", 0, &PodOptions::default())?;
        let node = self.lab.node(0).place();
        node.ip(&[
            format!("link set {} nomaster", pod.node_interface()),
            format!("addr flush dev {}", pod.node_interface()),
            format!("link set {} master br0 up", pod.node_interface()),
        ])?;
        pod.place().ip(&["addr flush dev eth0".to_owned()])?;
        // One of its two default routes outlives its addresses.
        let lines = network::uplink_side(network::uplink(BESIDE_HOST), network::uplink(1));
        let lines = lines.iter().map(|line| line.replace("route add", "route replace"));
        pod.place().ip(&lines.collect::<Vec<_>>())
    }

    /// A TUN device at each end, and all that the client calls by way of it.
    fn raise_vpn(&mut self) -> Result<()> {
        let everything = Family::BOTH.map(|family| family.everything().to_owned());
        let client = network::vpn(2).each().map(|(family, address)| format!("{address}/{}", family.bits()));
        let client: Vec<String> = client.collect();
        let node_routes: Vec<String> =
            client.iter().map(|range| format!("route add {range} dev {VPN}")).collect();
        let client_routes = everything.iter().map(|range| format!("route add {range} dev {VPN}")).collect();
        self.carry(Who::Node, (NODE_HOST, 1), &client, VPN_HOST, node_routes)?;
        self.carry(Who::Vpn, (VPN_HOST, 2), &everything, NODE_HOST, client_routes)
    }

    fn carry(
        &mut self,
        who: Who,
        (host, end): (u8, u8),
        ranges: &[String],
        peer: u8,
        routes: Vec<String>,
    ) -> Result<()> {
        let place = self.place(who)?;
        let mut command = place.command(program("portolan-lab", "PORTOLAN_LAB_PROGRAM")?)?;
        command.args(["carry", "--device", VPN, "--listen"]);
        command.arg(SocketAddr::new(network::second(host).v4.into(), VPN_PORT).to_string());
        command.args(["--delay", &self.layout.vpn_delay_ms.to_string()]);
        for range in ranges {
            command.arg("--peer").arg(format!("{range}={}:{VPN_PORT}", network::second(peer).v4));
        }
        let carrier = Process::start(&self.lab.logs(), &format!("vpn-{}", place.name()), command)?;
        carrier.wait_for_line(START_TIME, |line| line == tunnel::READY)?;
        self._carriers.push(carrier);
        let addresses = network::vpn(end).each();
        let mut lines: Vec<_> = addresses
            .map(|(family, address)| network::address_on(VPN, family, address, family.bits()))
            .collect();
        lines.push(format!("link set {VPN} mtu 1400 up"));
        lines.extend(routes);
        place.ip(&lines)
    }

    fn serve(&mut self) -> Result<()> {
        let ends = [Here, There].into_iter().chain(self.layout.beside.then_some(End::Beside));
        for end in ends {
            let pod = self.lab.pod(end.pod()).context("no pod")?;
            let endpoint = match end {
                Here | There => pod.endpoint(),
                End::Beside => {
                    Endpoint::of(pod.name(), network::uplink(BESIDE_HOST), self.lab.node(0).name())
                }
            };
            for family in Family::BOTH {
                let service = service(end.name(), family, cluster_ip(end.host()))
                    .tcp_node_port(SERVICE_PORT, TARGET, end.node_port())
                    .udp_node_port(SERVICE_PORT, TARGET, end.node_port())
                    .spec("type", json!("LoadBalancer"))
                    .status(json!({ "loadBalancer": { "ingress": [{ "ip": lb_ip(end).of(family), "ipMode": "VIP" }] } }));
                self.offer(service.endpoints([endpoint.clone()]))?;
            }
        }
        if self.layout.cache.is_empty() {
            return Ok(());
        }
        let other: Endpoint = self.lab.pod("c").context("no pod")?.endpoint();
        for family in Family::BOTH {
            let service = service("cached", family, cluster_ip(CACHE_HOST));
            let service = service.tcp(SERVICE_PORT, TARGET).udp(SERVICE_PORT, TARGET);
            self.offer(service.endpoints([other.clone()]))?;
        }
        let addresses: Vec<IpAddr> =
            self.layout.cache.iter().map(|address| Ok(address.parse()?)).collect::<Result<_>>()?;
        let server = PodOptions::default().tcp(&[SERVICE_PORT]).udp(&[SERVICE_PORT]).at(&addresses);
        self.lab.node(0).serve("cache", &server)
    }

    fn offer(&mut self, service: Service) -> Result<()> {
        self.lab.manifests().apply(&service)?;
        self.services.push(service);
        Ok(())
    }
}

/// The last byte of the ClusterIP of `cached`.
const CACHE_HOST: u8 = 53;
/// `node-1` on the second network; `node-2` is the next.
const NODE_HOST: u8 = 11;
/// The pod `u` on the nodes' network.
const BESIDE_HOST: u8 = 77;
/// The VPN's client there.
const VPN_HOST: u8 = 210;

fn service(name: &str, family: Family, cluster_ip: Addresses) -> Service {
    let number = match family {
        Family::V4 => 4,
        Family::V6 => 6,
    };
    Service::new(&format!("{name}-{number}"), cluster_ip.of(family))
}

/// A ClusterIP of each family.
fn cluster_ip(host: u8) -> Addresses {
    network::on(([10, 96, 0], [0xfd00, 0x10, 0x96]), host)
}

fn lb_ip(end: End) -> Addresses {
    network::on(([172, 20, 0], [0xfd00, 0x172, 0x20]), end.host())
}
