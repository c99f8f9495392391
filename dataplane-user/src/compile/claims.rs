//! Who has an address, port and protocol that several Services claim (Z1). A ClusterIP goes before every other kind of
//! address, then the older Service before the younger, then the smaller name.
//!
//! Work and memory follow the frontends of the Services that change and of their rivals; nobody else is looked at.

use super::complaint::{Complaint, ComplaintReason};
use super::service::complaint;
use super::tables::ServiceTables;
use super::text::Shown;
use crate::model::ObjectName;
use dataplane_common::Addr;
use dataplane_common::frontend::{FrontendKey, FrontendKind};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// A Service that claims something. The smaller one is older.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    created: i64,
    name: ObjectName,
}

/// A claim on one frontend. The smallest has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    kind: FrontendKind,
    claimant: Arc<Claimant>,
}

impl Claim {
    /// ClusterIPs first, then age.
    fn rank(&self) -> (bool, &Claimant) {
        (self.kind != FrontendKind::ClusterIp, &self.claimant)
    }

    fn is_of(&self, service: &ObjectName) -> bool {
        self.claimant.name == *service
    }
}

/// The claims on one frontend, by rank: most have one.
type Ranking = SmallVec<[Claim; 1]>;

/// The claims of all Services.
///
/// A Service with a ClusterIP also claims the address as such ([`FrontendKey::any_port`]), which keeps LB IPs and
/// external IPs of other Services off it on every port.
#[derive(Debug, Default)]
pub struct Claims {
    /// Sorted by rank; never empty.
    claims: BTreeMap<FrontendKey, Ranking>,
    /// What each Service claims.
    claimed: HashMap<ObjectName, Box<[FrontendKey]>>,
}

impl Claims {
    /// Replaces the claims of a Service by those of `tables`, before [`Self::decide`] took any from it. Gives back the
    /// other Services that claim something whose holder changed by it.
    pub fn enter(
        &mut self,
        service: &ObjectName,
        created: i64,
        tables: &ServiceTables,
    ) -> BTreeSet<ObjectName> {
        let mut disturbed = BTreeSet::new();
        let wanted = wanted(tables);
        let claimant = Arc::new(Claimant { created, name: service.clone() });
        for key in self.claimed.remove(service).unwrap_or_default() {
            let kind = wanted.get(&key).copied();
            let same = |claim: &Claim| Some(claim.kind) == kind && claim.claimant == claimant;
            let mine =
                self.claims.get(&key).and_then(|claims| claims.iter().find(|claim| claim.is_of(service)));
            if !mine.is_some_and(same) {
                self.withdraw(key, service, &mut disturbed);
            }
        }
        for (key, kind) in &wanted {
            self.claim(*key, Claim { kind: *kind, claimant: claimant.clone() }, &mut disturbed);
        }
        if !wanted.is_empty() {
            self.claimed.insert(service.clone(), wanted.into_keys().collect());
        }
        disturbed.remove(service);
        disturbed
    }

    /// Takes from `tables` what another Service has.
    pub fn decide(&self, service: &ObjectName, tables: &mut ServiceTables) -> Vec<Complaint> {
        let mut complaints = Vec::new();
        for port in tables.ports.values_mut() {
            port.frontends.retain(|key, kind| match self.lost_to(*key, *kind, service) {
                Some(winner) => {
                    let text =
                        format!("{} is not programmed: Service {} has it", Shown(key, *kind), winner.name);
                    complaints.push(complaint(service, ComplaintReason::AddressConflict, text));
                    false
                }
                None => true,
            });
        }
        tables.closed.retain(|addr| self.holds(FrontendKey::any_port(*addr), service));
        complaints
    }

    /// Whether some Service has this address as an LB IP: node ports do not answer there (P16).
    pub fn is_load_balancer_ip(&self, addr: Addr) -> bool {
        self.at(addr).any(|(_, claims)| claims[0].kind == FrontendKind::LoadBalancerIp)
    }

    fn at(&self, addr: Addr) -> impl Iterator<Item = (&FrontendKey, &Ranking)> {
        self.claims.range(FrontendKey::any_port(addr)..).take_while(move |(key, _)| *key.addr() == addr)
    }

    fn holds(&self, key: FrontendKey, service: &ObjectName) -> bool {
        self.claims.get(&key).is_some_and(|claims| claims[0].is_of(service))
    }

    /// The Service that has the frontend, if it is not this one.
    fn lost_to(&self, key: FrontendKey, kind: FrontendKind, service: &ObjectName) -> Option<&Claimant> {
        let winner = |key| {
            let first: &Claim = self.claims.get(&key)?.first()?;
            (!first.is_of(service)).then_some(&*first.claimant)
        };
        let cluster_ip = FrontendKey::any_port(*key.addr());
        winner(key).or_else(|| if kind == FrontendKind::ClusterIp { None } else { winner(cluster_ip) })
    }

    fn claim(&mut self, key: FrontendKey, claim: Claim, disturbed: &mut BTreeSet<ObjectName>) {
        let claims = self.claims.entry(key).or_default();
        if claims.contains(&claim) {
            return;
        }
        let at = claims.partition_point(|other| other.rank() < claim.rank());
        if at == 0 {
            disturbed.extend(names(claims.iter()));
        }
        claims.insert(at, claim);
        if at == 0 && key == FrontendKey::any_port(*key.addr()) {
            self.disturb_address(*key.addr(), disturbed);
        }
    }

    fn withdraw(&mut self, key: FrontendKey, service: &ObjectName, disturbed: &mut BTreeSet<ObjectName>) {
        let Some(claims) = self.claims.get_mut(&key) else { return };
        let had = claims[0].is_of(service);
        claims.retain(|claim| !claim.is_of(service));
        if had {
            disturbed.extend(names(claims.iter()));
        }
        if claims.is_empty() {
            self.claims.remove(&key);
        }
        if had && key == FrontendKey::any_port(*key.addr()) {
            self.disturb_address(*key.addr(), disturbed);
        }
    }

    /// The Services with an LB IP or external IP at an address whose ClusterIP came or went.
    fn disturb_address(&self, addr: Addr, disturbed: &mut BTreeSet<ObjectName>) {
        let others = self.at(addr).flat_map(|(_, claims)| claims);
        disturbed.extend(names(others.filter(|claim| claim.kind != FrontendKind::ClusterIp)));
    }
}

/// Not only who won or lost: all who wait are told anew who has it.
fn names<'a>(claims: impl IntoIterator<Item = &'a Claim>) -> impl Iterator<Item = ObjectName> {
    claims.into_iter().map(|claim| claim.claimant.name.clone())
}

fn wanted(tables: &ServiceTables) -> BTreeMap<FrontendKey, FrontendKind> {
    let mut wanted = BTreeMap::new();
    for (key, kind) in tables.ports.values().flat_map(|port| &port.frontends) {
        wanted.insert(*key, *kind);
        if *kind == FrontendKind::ClusterIp {
            wanted.insert(FrontendKey::any_port(*key.addr()), *kind);
        }
    }
    wanted
}
