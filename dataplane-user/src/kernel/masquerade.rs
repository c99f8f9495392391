//! The source of clients from outside is translated by the node's own netfilter, where their packets leave for an endpoint of this
//! node: the programs mark them, and one rule of nftables for each protocol masquerades what is marked. So all that lies between sees
//! client and pod, and conntrack finds a port that nobody has. Another rule notes another mark of a connection, where one is wanted.
//!
//! The table is Portolan's alone, and no other is touched. The names of the protocol between agent and kernel are here and nowhere else.
#![expect(clippy::wildcard_enum_match_arm, reason = "netlink's enums are not ours and grow with the kernel")]

use super::netlink;
use dataplane_common::Protocol;
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, Immediate, InetHookNumber,
    ListAttribute, Meta, MetaKey, NfTablesMessage, Operator, Register, RuleAttribute, RuleMessage,
    TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

/// The table, of the family `inet`.
pub const TABLE: &str = "portolan";
/// A chain of it.
struct Chain {
    name: &'static str,
    hook: InetHookNumber,
    /// As the kernel orders chains.
    priority: i32,
    kind: &'static str,
}

/// `NF_IP_PRI_NAT_SRC` less one: which of two chains comes first must not hang on who was there first, and ports are ours to choose.
const POSTROUTING: Chain =
    Chain { name: "postrouting", hook: InetHookNumber::PostRouting, priority: 99, kind: "nat" };
/// `NF_IP_PRI_MANGLE`: behind conntrack, before the route.
const PREROUTING: Chain =
    Chain { name: "prerouting", hook: InetHookNumber::PreRouting, priority: -150, kind: "filter" };
/// `NFNL_SUBSYS_NFTABLES`: what a batch is about.
const SUBSYSTEM: u16 = 10;
/// What is masqueraded.
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Why netfilter masquerades nothing.
#[derive(Debug, thiserror::Error)]
pub enum MasqueradeError {
    /// The kernel does not let us.
    #[error(
        "cannot have netfilter masquerade clients from outside (nftables table inet {TABLE}): {0}. Does the kernel have nf_tables, \
         nft_chain_nat and nft_masq, and is the table nobody else's? Until then endpoints of this node see the client's own address, \
         and one whose answers do not come back by this node is not served"
    )]
    Netlink(#[from] io::Error),
}

impl MasqueradeError {
    /// Whether the kernel has no nftables at all.
    pub fn is_lacking(&self) -> bool {
        let Self::Netlink(error) = self;
        matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT))
    }
}

/// What netfilter does for the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masquerade {
    /// The bit of the mark of what is masqueraded; 0: nothing is.
    pub mark: u32,
    /// To which ports.
    pub ports: RangeInclusive<u16>,
    /// The bit of the mark that is noted of a connection; 0: none is.
    pub connection_mark: u32,
}

impl Masquerade {
    /// Makes the table unless it is there and as it should be. Whether it had to be made.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ensure(&self) -> Result<bool, MasqueradeError> {
        let rules = self.rules();
        let mut wanted: Vec<_> = rules.iter().map(|rule| rule.comment.clone()).collect();
        wanted.sort();
        let mut there = comments()?;
        there.sort();
        if there == wanted {
            return Ok(false);
        }
        // Removed and made at once: no packet finds it missing. What is removed must be there.
        let mut batch = vec![new_table(), delete_table(), new_table()];
        batch.extend([PREROUTING, POSTROUTING].iter().map(new_chain));
        batch.extend(rules.into_iter().map(Rule::message));
        transact(batch)?;
        Ok(true)
    }

    /// Whether there is anything to be done.
    pub fn is_wanted(&self) -> bool {
        self.mark != 0 || self.connection_mark != 0
    }

    fn rules(&self) -> Vec<Rule> {
        let masquerading = PROTOCOLS.iter().filter(|_| self.mark != 0).map(|protocol| self.rule(*protocol));
        masquerading.chain((self.connection_mark != 0).then(|| self.noting())).collect()
    }

    /// What tells the rule from any other, for the agent and for people.
    fn comment(&self, protocol: Protocol) -> String {
        let (first, last) = (self.ports.start(), self.ports.end());
        let protocol = format!("{protocol:?}").to_lowercase();
        format!("portolan {protocol}: mark {:#x} to ports {first}-{last}", self.mark)
    }

    /// `meta mark & MARK == MARK meta l4proto PROTOCOL counter meta mark set mark & ~MARK masquerade to :PORTS fully-random`
    fn rule(&self, protocol: Protocol) -> Rule {
        let expressions = vec![
            load(MetaKey::Mark),
            mask(self.mark, 0),
            is(self.mark.to_ne_bytes().to_vec()),
            load(MetaKey::L4Proto),
            is(vec![protocol as u8]),
            other("counter", Vec::new()),
            load(MetaKey::Mark),
            mask(!self.mark, 0),
            Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(FIRST)]),
            put(FIRST, *self.ports.start()),
            put(SECOND, *self.ports.end()),
            other("masq", masquerade_to(FIRST, SECOND)),
        ];
        Rule { chain: &POSTROUTING, expressions, comment: self.comment(protocol) }
    }

    /// `meta mark & MARK == MARK ct mark set ct mark & ~MARK ^ MARK`
    fn noting(&self) -> Rule {
        let mark = self.connection_mark;
        let expressions = vec![
            load(MetaKey::Mark),
            mask(mark, 0),
            is(mark.to_ne_bytes().to_vec()),
            connection_mark(CT_DESTINATION),
            mask(!mark, mark),
            connection_mark(CT_SOURCE),
        ];
        Rule { chain: &PREROUTING, expressions, comment: format!("portolan: mark {mark:#x} of a connection") }
    }
}

/// A rule, and by what it is known again.
struct Rule {
    chain: &'static Chain,
    expressions: Vec<Expressions>,
    comment: String,
}

impl Rule {
    fn message(self) -> (u16, NfTablesMessage) {
        let rule = RuleMessage {
            attributes: vec![
                RuleAttribute::Table(TABLE.into()),
                RuleAttribute::Chain(self.chain.name.into()),
                RuleAttribute::Expressions(self.expressions.into_iter().map(ListAttribute::from).collect()),
                RuleAttribute::UserData(user_data(&self.comment)),
            ],
        };
        (NLM_F_CREATE | NLM_F_APPEND, NfTablesMessage::NewRule(rule))
    }
}

/// Removes the table. Whether it was there.
///
/// # Errors
/// If the kernel refuses.
pub fn remove() -> Result<bool, MasqueradeError> {
    if !is_there()? {
        return Ok(false);
    }
    transact(vec![delete_table()])?;
    Ok(true)
}

/// Whether bridges hand the packets that come in by their ports to netfilter, before tc sees them.
pub fn bridges_call_netfilter() -> bool {
    ["iptables", "ip6tables"].iter().any(|family| {
        let setting = Path::new("/proc/sys/net/bridge").join(format!("bridge-nf-call-{family}"));
        std::fs::read_to_string(setting).is_ok_and(|value| value.trim() != "0")
    })
}

/// Registers of four bytes.
const FIRST: Register = Register::Reg32_00;
const SECOND: Register = Register::Reg32_01;

fn load(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(FIRST)])
}

/// `FIRST & mask ^ xor`.
fn mask(mask: u32, xor: u32) -> Expressions {
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(FIRST),
        Bitwise::DestinationRegister(FIRST),
        Bitwise::Length(size_of::<u32>() as u32),
        Bitwise::Mask(DataAttribute::Value(mask.to_ne_bytes().to_vec())),
        Bitwise::Xor(DataAttribute::Value(xor.to_ne_bytes().to_vec())),
    ])
}

/// `NFTA_CT_DREG`: the connection's mark is read.
const CT_DESTINATION: u16 = 1;
/// `NFTA_CT_SREG`: it is written.
const CT_SOURCE: u16 = 4;

/// Between the mark of a connection and `FIRST`.
fn connection_mark(direction: u16) -> Expressions {
    const KEY: u16 = 2;
    /// `NFT_CT_MARK`.
    const MARK: u32 = 3;
    let word = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    other("ct", vec![word(KEY, MARK), word(direction, FIRST.into())])
}

/// Ends the rule unless `FIRST` begins with these bytes.
fn is(bytes: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(FIRST),
        Cmp::Op(Operator::Equal),
        Cmp::Data(DataAttribute::Value(bytes)),
    ])
}

fn put(register: Register, port: u16) -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(register),
        Immediate::Data(DataAttribute::Value(port.to_be_bytes().to_vec())),
    ])
}

fn other(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other { expression_type: name.into(), attributes }
}

/// The attributes of `masq`: to a port drawn from those between two registers.
fn masquerade_to(first: Register, last: Register) -> Vec<DefaultNla> {
    const FLAGS: u16 = 1;
    const FIRST_PORT: u16 = 2;
    const LAST_PORT: u16 = 3;
    /// `NF_NAT_RANGE_PROTO_SPECIFIED`.
    const PORTS: u32 = 1 << 1;
    /// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
    const FULLY_RANDOM: u32 = 1 << 4;
    let word = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    vec![word(FLAGS, PORTS | FULLY_RANDOM), word(FIRST_PORT, first.into()), word(LAST_PORT, last.into())]
}

fn new_table() -> (u16, NfTablesMessage) {
    (NLM_F_CREATE, NfTablesMessage::NewTable(table()))
}

fn delete_table() -> (u16, NfTablesMessage) {
    (0, NfTablesMessage::DeleteTable(table()))
}

fn table() -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(TABLE.into())] }
}

fn new_chain(chain: &Chain) -> (u16, NfTablesMessage) {
    let message = ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TABLE.into()),
            ChainAttribute::Name(chain.name.into()),
            ChainAttribute::Hook(vec![
                Hook::Number(chain.hook.into()),
                Hook::Priority(chain.priority.cast_unsigned()),
            ]),
            ChainAttribute::Type(chain.kind.into()),
        ],
    };
    (NLM_F_CREATE, NfTablesMessage::NewChain(message))
}

/// What `nft` shows as a comment: the type of an entry, its length, a text and its end.
fn user_data(comment: &str) -> Vec<u8> {
    const COMMENT: u8 = 0;
    let length = u8::try_from(comment.len() + 1).unwrap_or_default();
    [&[COMMENT, length], comment.as_bytes(), &[0]].concat()
}

fn message(inner: impl Into<NetfilterMessageInner>) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0), inner)
}

/// Does all of it or nothing.
fn transact(batch: Vec<(u16, NfTablesMessage)>) -> io::Result<()> {
    let netlink = netlink::connect(NETLINK_NETFILTER)?;
    let control = |control| {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM);
        (NLM_F_REQUEST, NetfilterMessage::new(header, control))
    };
    let count = batch.len();
    let mut messages = vec![control(ControlMessage::BatchBegin)];
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    messages.extend(batch.into_iter().map(|(own, inner)| (flags | own, message(inner))));
    messages.push(control(ControlMessage::BatchEnd));
    netlink::send_all(&netlink, messages)?;
    let mut done = 0;
    while done < count {
        for answer in netlink::receive::<NetfilterMessage>(&netlink)? {
            match answer {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Error(_) => done += 1,
                _ => {}
            }
        }
    }
    Ok(())
}

/// The comments of the rules that are there.
fn comments() -> io::Result<Vec<String>> {
    let table = RuleMessage { attributes: vec![RuleAttribute::Table(TABLE.into())] };
    let mut comments = Vec::new();
    each(NfTablesMessage::GetRule(table), |answer| {
        if let NfTablesMessage::NewRule(rule) = answer {
            let data = rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::UserData(data) => Some(data.as_slice()),
                _ => None,
            });
            comments.push(data.and_then(comment_of).unwrap_or_default());
        }
    })?;
    Ok(comments)
}

fn comment_of(data: &[u8]) -> Option<String> {
    let text = data.get(2..data.len().checked_sub(1)?)?;
    String::from_utf8(text.to_vec()).ok()
}

fn is_there() -> io::Result<bool> {
    let mut found = false;
    each(NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() }), |answer| {
        if let NfTablesMessage::NewTable(table) = answer {
            found |= table.attributes.contains(&TableAttribute::Name(TABLE.into()));
        }
    })?;
    Ok(found)
}

/// Calls `tell` with each object that the kernel lists; none where there is no such table.
fn each(question: NfTablesMessage, mut tell: impl FnMut(NfTablesMessage)) -> io::Result<()> {
    let netlink = netlink::connect(NETLINK_NETFILTER)?;
    netlink::send(&netlink, NLM_F_REQUEST | NLM_F_DUMP, message(question))?;
    loop {
        for answer in netlink::receive::<NetfilterMessage>(&netlink)? {
            match answer {
                NetlinkPayload::InnerMessage(message) => {
                    if let NetfilterMessageInner::NfTables(object) = message.inner {
                        tell(object);
                    }
                }
                NetlinkPayload::Error(error) if error.to_io().raw_os_error() == Some(libc::ENOENT) => {
                    return Ok(());
                }
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::Done(_) => return Ok(()),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_told_by_what_nft_shows_as_its_comment() {
        let masquerade = Masquerade { mark: 1 << 14, ports: 1_024..=29_999, connection_mark: 0 };
        let comment = masquerade.comment(Protocol::Udp);
        assert_eq!(comment, "portolan udp: mark 0x4000 to ports 1024-29999");
        assert_eq!(comment_of(&user_data(&comment)), Some(comment));
        assert_eq!(comment_of(&[]), None);
        assert_eq!(comment_of(&[0, 1, 0]), Some(String::new()));
    }
}
