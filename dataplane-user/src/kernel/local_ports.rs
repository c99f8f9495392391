//! Which ports the node itself uses, so that flows leave them alone (P12). Never changes anything.

use dataplane_common::node::PORT_RANGES;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;

/// The first port that a translated source may have: those below belong to root's programs.
const FIRST: u16 = 1_024;
/// Where node ports are by default (`--service-node-port-range` of the API server).
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// What the kernel gives to sockets where nobody says otherwise.
const LOCAL: RangeInclusive<u16> = 32_768..=60_999;

/// The ports that are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPorts {
    /// What the kernel gives to sockets that connect (`ip_local_port_range`).
    local: RangeInclusive<u16>,
    /// What it gives to none, for somebody else has it (`ip_local_reserved_ports`).
    reserved: Vec<RangeInclusive<u16>>,
    /// Those of sockets that listen, or that are bound.
    sockets: BTreeSet<u16>,
}

/// Reads them for this network namespace. What cannot be read counts as the kernel's default.
pub fn read() -> LocalPorts {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let sockets = ["tcp", "tcp6", "udp", "udp6"].map(|kind| text(&format!("/proc/net/{kind}")));
    LocalPorts::parse(
        &text("/proc/sys/net/ipv4/ip_local_port_range"),
        &text("/proc/sys/net/ipv4/ip_local_reserved_ports"),
        sockets.iter().map(String::as_str),
    )
}

/// The ranges in a list of ports such as `ip_local_reserved_ports`: `30000-32767,61000`.
pub(super) fn ranges(list: &str) -> impl Iterator<Item = RangeInclusive<u16>> {
    list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse().ok()?..=last.parse().ok()?)
    })
}

impl LocalPorts {
    fn parse<'a>(local: &str, reserved: &str, sockets: impl IntoIterator<Item = &'a str>) -> Self {
        let mut ends = local.split_whitespace().filter_map(|end| end.parse().ok());
        let local = match (ends.next(), ends.next()) {
            (Some(first), Some(last)) => first..=last,
            _ => LOCAL,
        };
        let reserved = ranges(reserved);
        let sockets = sockets.into_iter().flat_map(str::lines).filter_map(bound_port);
        let outside = |port: &u16| *port >= FIRST && !local.contains(port) && !NODE_PORTS.contains(port);
        Self { reserved: reserved.collect(), sockets: sockets.filter(outside).collect(), local }
    }

    /// What is left for translated sources: the largest of the ranges between what is taken.
    pub fn left(&self) -> Vec<RangeInclusive<u16>> {
        let mut taken: Vec<_> =
            self.reserved.iter().cloned().chain(self.sockets.iter().map(|port| *port..=*port)).collect();
        taken.extend([self.local.clone(), NODE_PORTS]);
        taken.sort_by_key(|range| *range.start());
        let (mut left, mut next) = (Vec::new(), u32::from(FIRST));
        for range in taken {
            let (first, last) = (u32::from(*range.start()), u32::from(*range.end()));
            if first > next {
                left.push(next as u16..=(first - 1) as u16);
            }
            next = next.max(last + 1);
        }
        if next <= u32::from(u16::MAX) {
            left.push(next as u16..=u16::MAX);
        }
        left.sort_by_key(|range| std::cmp::Reverse(range.len()));
        left.truncate(PORT_RANGES);
        left.sort_by_key(|range| *range.start());
        left
    }

    /// The same, where others have these ports too.
    #[must_use]
    pub fn with(mut self, ports: RangeInclusive<u16>) -> Self {
        self.reserved.push(ports);
        self
    }

    /// What else has some of these ports.
    pub fn clashes(&self, ports: &RangeInclusive<u16>) -> Vec<String> {
        let meets =
            |other: &RangeInclusive<u16>| other.start() <= ports.end() && ports.start() <= other.end();
        let mut clashes = Vec::new();
        if meets(&self.local) {
            let (first, last) = (self.local.start(), self.local.end());
            clashes.push(format!("the node's own connections have {first}-{last} (ip_local_port_range)"));
        }
        if meets(&NODE_PORTS) {
            clashes.push(format!("node ports are in {}-{}", NODE_PORTS.start(), NODE_PORTS.end()));
        }
        clashes.extend(
            self.sockets
                .iter()
                .filter(|port| ports.contains(port))
                .map(|port| format!("a socket has {port}")),
        );
        clashes
    }
}

impl fmt::Display for LocalPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.local.start(), self.local.end());
        write!(
            f,
            "{first}-{last} (ip_local_port_range), {}-{} (node ports)",
            NODE_PORTS.start(),
            NODE_PORTS.end()
        )?;
        write!(
            f,
            ", {} ranges of ip_local_reserved_ports and {} ports of sockets",
            self.reserved.len(),
            self.sockets.len()
        )
    }
}

/// The port of a socket in a line of `/proc/net/tcp` or its like, if it has no other end: it listens, or is bound.
fn bound_port(line: &str) -> Option<u16> {
    let mut fields = line.split_whitespace().skip(1);
    let (own, other) = (fields.next()?, fields.next()?);
    let (_, port) = own.rsplit_once(':')?;
    let (_, other_port) = other.rsplit_once(':')?;
    (other_port == "0000").then(|| u16::from_str_radix(port, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:2710 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
";

    fn ports(local: &str, reserved: &str, sockets: &str) -> LocalPorts {
        LocalPorts::parse(local, reserved, [sockets])
    }

    /// P12
    #[test]
    fn what_the_node_uses_is_left_alone() {
        let default = ports("32768\t60999\n", "\n", "");
        assert_eq!(default.left(), [1_024..=29_999, 61_000..=65_535]);
        assert!(default.left().iter().map(ExactSizeIterator::len).sum::<usize>() >= 33_000);
        let narrow = ports("60000 60999", "", "");
        assert!(narrow.left().iter().map(ExactSizeIterator::len).sum::<usize>() >= 60_000);
        let used = ports("32768 60999", "2000-2999,5000", TCP);
        let ranges = [1_024..=1_999, 3_000..=4_999, 5_001..=8_079, 8_081..=29_999, 61_000..=65_535];
        assert_eq!(used.left(), ranges, "a listener's 8080, and no connection's 10000");
        assert_eq!(ports("1024 65535", "", "").left(), []);
        assert_eq!(ports("", "", ""), default);
    }

    #[test]
    fn the_largest_ranges_are_taken() {
        let reserved: Vec<_> = (1..20).map(|port| (1_024 + 100 * port).to_string()).collect();
        let left = ports("32768 60999", &reserved.join(","), "").left();
        assert_eq!(left.len(), PORT_RANGES);
        assert!(left.contains(&(2_925..=29_999)) && left.contains(&(61_000..=65_535)));
    }

    #[test]
    fn a_range_that_clashes_is_told() {
        let used = ports("32768 60999", "", TCP);
        assert_eq!(used.clashes(&(61_000..=65_535)), Vec::<String>::new());
        assert_eq!(used.clashes(&(8_000..=9_000)), ["a socket has 8080"]);
        assert_eq!(used.clashes(&(31_000..=33_000)).len(), 2);
    }
}
