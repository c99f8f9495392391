//! How many connections are open at once, over all listeners, and which of them is closed when one more comes.
//!
//! The one that goes is the oldest of the client that has most: who opens thousands loses his own. Only where all have
//! equally many it is the oldest of all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// How many connections may be open at once. Load balancers and kubelets close each as soon as they have their answer.
const LIMIT: usize = 256;
/// Bits of an IPv6 address that a client cannot choose: a network's hosts number themselves.
const IPV6_PREFIX: u32 = 64;

/// An open connection.
#[derive(Debug)]
struct Connection {
    id: u64,
    group: u64,
    peer: IpAddr,
    /// Told by being dropped.
    _closes: oneshot::Sender<()>,
}

/// All open connections, the oldest first.
#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: Vec<Connection>,
}

/// Where connections come in: a group of listeners with a limit of its own, below the limit of all.
#[derive(Clone, Debug)]
pub struct Gate {
    open: Arc<Mutex<Open>>,
    group: u64,
    limit: usize,
}

/// A place that a connection has until it is dropped.
#[derive(Debug)]
pub struct Admitted {
    open: Arc<Mutex<Open>>,
    id: u64,
    closed: oneshot::Receiver<()>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { open: Arc::default(), group: 0, limit: LIMIT }
    }
}

impl Gate {
    /// A group of listeners whose connections count for all, and that has no more than `limit` of them.
    pub fn group(&self, limit: usize) -> Self {
        let mut open = lock(&self.open);
        open.next += 1;
        Self { open: self.open.clone(), group: open.next, limit: limit.min(LIMIT) }
    }

    /// A place for a new connection of this client; another one is closed if there is no room.
    pub fn admit(&self, peer: IpAddr) -> Admitted {
        let peer = network(peer);
        let (closes, closed) = oneshot::channel();
        let mut open = lock(&self.open);
        let in_group = |connection: &Connection| connection.group == self.group;
        if open.connections.iter().filter(|it| in_group(it)).count() >= self.limit {
            open.close_one(in_group);
        }
        if open.connections.len() >= LIMIT {
            open.close_one(|_| true);
        }
        open.next += 1;
        let id = open.next;
        open.connections.push(Connection { id, group: self.group, peer, _closes: closes });
        Admitted { open: self.open.clone(), id, closed }
    }

    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        lock(&self.open).connections.len()
    }
}

impl Open {
    /// Closes the oldest connection of the client that has most, of those that are asked about.
    fn close_one(&mut self, among: impl Fn(&Connection) -> bool) {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for connection in self.connections.iter().filter(|it| among(it)) {
            *counts.entry(connection.peer).or_default() += 1;
        }
        let most = counts.values().max().copied();
        let oldest =
            self.connections.iter().position(|it| among(it) && counts.get(&it.peer).copied() == most);
        if let Some(at) = oldest {
            self.connections.remove(at);
        }
    }
}

impl Admitted {
    /// Returns when the place is needed for another one.
    pub async fn closed(&mut self) {
        // The other end is dropped, never used.
        let _ = (&mut self.closed).await;
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        lock(&self.open).connections.retain(|connection| connection.id != self.id);
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What tells clients apart.
fn network(peer: IpAddr) -> IpAddr {
    match peer {
        IpAddr::V4(_) => peer,
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) & (u128::MAX << (128 - IPV6_PREFIX))).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn is_closed(admitted: &mut Admitted) -> bool {
        admitted.closed.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn who_has_most_connections_loses_his_oldest() {
        let gate = Gate::default();
        let mut single = gate.admit(ip("192.0.2.1"));
        let mut many: Vec<_> = (1..LIMIT).map(|_| gate.admit(ip("192.0.2.2"))).collect();
        let mut newer = gate.admit(ip("192.0.2.3"));
        assert_eq!(gate.open(), LIMIT);
        assert!(!is_closed(&mut single) && !is_closed(&mut newer));
        assert!(is_closed(&mut many[0]) && !is_closed(&mut many[1]));
    }

    #[test]
    fn where_all_have_as_many_the_oldest_goes() {
        let gate = Gate::default();
        let address = |n: usize| IpAddr::from([10, 0, (n / 256) as u8, (n % 256) as u8]);
        let mut all: Vec<_> = (0..=LIMIT).map(|n| gate.admit(address(n))).collect();
        assert!(is_closed(&mut all[0]) && !is_closed(&mut all[1]) && !is_closed(&mut all[LIMIT]));
    }

    #[test]
    fn the_hosts_of_an_ipv6_network_are_one_client() {
        let gate = Gate::default();
        let mut other = gate.admit(ip("2001:db8:0:1::1"));
        let mut many: Vec<_> = (1..=LIMIT).map(|n| gate.admit(ip(&format!("2001:db8::{n:x}")))).collect();
        assert!(is_closed(&mut many[0]) && !is_closed(&mut other));
    }

    #[test]
    fn a_group_has_a_limit_of_its_own_within_that_of_all() {
        let gate = Gate::default();
        let few = gate.group(2);
        let mut others: Vec<_> = (0..3).map(|_| gate.admit(ip("192.0.2.1"))).collect();
        let mut admitted: Vec<_> = (0..3).map(|_| few.admit(ip("192.0.2.1"))).collect();
        assert!(is_closed(&mut admitted[0]) && !is_closed(&mut admitted[1]) && !is_closed(&mut admitted[2]));
        assert!(!others.iter_mut().any(is_closed));
        assert_eq!(gate.open(), 5);
        let _more: Vec<_> = (0..LIMIT).map(|_| gate.admit(ip("192.0.2.9"))).collect();
        assert_eq!(few.open(), LIMIT, "all together");
    }

    #[test]
    fn a_place_is_free_when_its_connection_ends() {
        let gate = Gate::default();
        drop(gate.admit(ip("192.0.2.1")));
        assert_eq!(gate.open(), 0);
    }
}
