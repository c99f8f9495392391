//! What other Service proxies have left on this node, or make anew: their netfilter rules, and kube-proxy's ipvs interface. Nothing
//! is changed, and tables that the kernel does not have are not loaded.

use super::netlink;
use super::roles::LEFT_OVER;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkPayload};
use netlink_packet_netfilter::nftables::{ChainAttribute, ChainMessage, NfTablesMessage};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;

/// kube-proxy's table in the mode `nftables`.
const NFT_TABLE: &str = "kube-proxy";
/// The chain that kube-proxy's rules of the mode `iptables` begin with; that of the mode `ipvs` as well.
const CHAIN: &str = "KUBE-SERVICES";

/// Netfilter of one IP family, as iptables' old interface has it.
struct Xtables {
    names: &'static str,
    level: libc::c_int,
    bind: &'static str,
    word: &'static str,
}

const XTABLES: [Xtables; 2] = [
    Xtables {
        names: "/proc/self/net/ip_tables_names",
        level: libc::SOL_IP,
        bind: "127.0.0.1:0",
        word: "iptables (legacy)",
    },
    Xtables {
        names: "/proc/self/net/ip6_tables_names",
        level: libc::SOL_IPV6,
        bind: "[::1]:0",
        word: "ip6tables (legacy)",
    },
];

/// What was found, each in words; and what could not be looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Rules and interfaces.
    pub traces: Vec<String>,
    /// Why something is not known.
    pub unknown: Vec<String>,
}

/// Looks at this network namespace.
pub fn look() -> Found {
    let mut found = Found::default();
    match nft_chains() {
        Ok(chains) => found.traces.extend(of_chains(&chains)),
        // A kernel without nf_tables has no such rules.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPROTONOSUPPORT)) => {}
        Err(error) => found.unknown.push(format!("nftables cannot be read: {error}")),
    }
    for family in XTABLES {
        match family.has_chain() {
            Ok(true) => found.traces.push(format!("chain {CHAIN} of {}", family.word)),
            Ok(false) => {}
            Err(error) => found.unknown.push(format!("{} cannot be read: {error}", family.word)),
        }
    }
    let interfaces = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let names: BTreeSet<_> =
        interfaces.lines().filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
    found.traces.extend(
        LEFT_OVER.iter().filter(|name| names.contains(*name)).map(|name| format!("interface {name}")),
    );
    found
}

/// Table and chain of each chain in nftables, those of iptables' new interface included.
fn nft_chains() -> io::Result<Vec<(String, String)>> {
    let netlink = netlink::connect(NETLINK_NETFILTER)?;
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let get = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
    netlink::send(&netlink, NLM_F_REQUEST | NLM_F_DUMP, NetfilterMessage::new(header, get))?;
    let mut chains = Vec::new();
    loop {
        for message in netlink::receive::<NetfilterMessage>(&netlink)? {
            if let NetlinkPayload::InnerMessage(message) = message {
                if let NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) = message.inner {
                    chains.extend(names(chain));
                }
            } else if let NetlinkPayload::Error(error) = message {
                return Err(error.to_io());
            } else if let NetlinkPayload::Done(_) = message {
                return Ok(chains);
            }
        }
    }
}

/// Table and name of a chain.
fn names(chain: ChainMessage) -> Option<(String, String)> {
    let (mut table, mut name) = (None, None);
    for attribute in chain.attributes {
        if let ChainAttribute::Table(text) = attribute {
            table = Some(text);
        } else if let ChainAttribute::Name(text) = attribute {
            name = Some(text);
        }
    }
    table.zip(name)
}

/// The traces of kube-proxy among chains, each once.
fn of_chains(chains: &[(String, String)]) -> Vec<String> {
    let of_one = |(table, chain): &(String, String)| {
        if table == NFT_TABLE {
            Some(format!("table {NFT_TABLE} of nftables"))
        } else if chain == CHAIN {
            Some(format!("chain {CHAIN} of iptables, table {table}"))
        } else {
            None
        }
    };
    chains.iter().filter_map(of_one).collect::<BTreeSet<_>>().into_iter().collect()
}

impl Xtables {
    /// Whether a table that there is has the chain: a name in what the kernel gives of its rules.
    fn has_chain(&self) -> io::Result<bool> {
        let names = match fs::read_to_string(self.names) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        for table in names.lines() {
            let rules = self.rules(table)?;
            if rules.windows(CHAIN.len()).any(|part| part == CHAIN.as_bytes()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The rules of a table as the kernel has them.
    fn rules(&self, table: &str) -> io::Result<Vec<u8>> {
        /// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`; those of IPv6 have the same numbers.
        const GET_INFO: libc::c_int = 64;
        const GET_ENTRIES: libc::c_int = 65;
        /// `XT_TABLE_MAXNAMELEN`; the size of the rules in `struct ipt_getinfo`, which is as long; the head of
        /// `struct ipt_get_entries`.
        const NAME: usize = 32;
        const SIZE_AT: usize = 80;
        const INFO: usize = 84;
        const HEAD: usize = 40;
        let socket = UdpSocket::bind(self.bind)?;
        let name = CString::new(table)?;
        let name = name.as_bytes_with_nul();
        let ask = |what, buffer: &mut [u8]| {
            buffer[..name.len().min(NAME)].copy_from_slice(&name[..name.len().min(NAME)]);
            let mut length = buffer.len() as libc::socklen_t;
            // SAFETY: the buffer has the length given beside it; both outlive the call.
            let result = unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    self.level,
                    what,
                    buffer.as_mut_ptr().cast(),
                    &raw mut length,
                )
            };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        let mut info = [0; INFO];
        ask(GET_INFO, &mut info)?;
        let size =
            u32::from_ne_bytes([info[SIZE_AT], info[SIZE_AT + 1], info[SIZE_AT + 2], info[SIZE_AT + 3]]);
        let mut rules = vec![0; HEAD + size as usize];
        rules[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
        ask(GET_ENTRIES, &mut rules)?;
        Ok(rules.split_off(HEAD))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kube_proxy_is_known_by_its_table_and_its_first_chain() {
        let chain = |table: &str, chain: &str| (table.to_owned(), chain.to_owned());
        let chains = [
            chain("kube-proxy", "services"),
            chain("kube-proxy", "masquerading"),
            chain("nat", "KUBE-SERVICES"),
            chain("filter", "KUBE-FIREWALL"),
            chain("cni", "masquerade"),
        ];
        let expected = ["chain KUBE-SERVICES of iptables, table nat", "table kube-proxy of nftables"];
        assert_eq!(of_chains(&chains), expected);
        assert!(of_chains(&chains[3..]).is_empty(), "the kubelet makes chains of its own");
    }
}
