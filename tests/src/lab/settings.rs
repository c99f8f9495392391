//! The settings of a new network namespace: a lab's are the same on every machine.
//!
//! A namespace takes its IPv4 settings of interfaces from the machine's own (`net.core.devconf_inherit_init_net`), and
//! distributions and other programs have their own mind about those.

/// What an administrator may have changed, and the kernel's default (`ipv4_devconf_dflt` of net/ipv4/devinet.c).
const IPV4_DEFAULTS: [(&str, &str); 16] = [
    ("accept_local", "0"),
    ("accept_redirects", "1"),
    ("arp_accept", "0"),
    ("arp_announce", "0"),
    ("arp_filter", "0"),
    ("arp_ignore", "0"),
    ("forwarding", "0"),
    ("ignore_routes_with_linkdown", "0"),
    ("log_martians", "0"),
    ("promote_secondaries", "0"),
    ("proxy_arp", "0"),
    ("route_localnet", "0"),
    ("rp_filter", "0"),
    ("secure_redirects", "1"),
    ("send_redirects", "1"),
    ("src_valid_mark", "0"),
];

/// IPv6: usable at once, without a wait for other owners of an address, and no router is asked for, so that nothing of the kind
/// is among the packets that tests count.
const IPV6: [(&str, &str); 7] = [
    ("all/disable_ipv6", "0"),
    ("default/disable_ipv6", "0"),
    ("all/accept_dad", "0"),
    ("default/accept_dad", "0"),
    ("all/accept_ra", "0"),
    ("default/accept_ra", "0"),
    ("default/router_solicitations", "0"),
];

/// Every setting with its value, in the order in which they are to be written.
pub(super) fn of_a_new_namespace() -> Vec<(String, &'static str)> {
    let scopes = ["all", "default", "lo"];
    let ipv4 = scopes.into_iter().flat_map(|scope| {
        IPV4_DEFAULTS.map(|(name, value)| (format!("net/ipv4/conf/{scope}/{name}"), value))
    });
    ipv4.chain(IPV6.map(|(name, value)| (format!("net/ipv6/conf/{name}"), value))).collect()
}
