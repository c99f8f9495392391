//! The one place where compiling and the claims of rival Services meet: a set of dirty Services in, tables out.

use super::claims::Claims;
use super::complaint::Complaint;
use super::service::{Context, service};
use super::tables::ServiceTables;
use crate::model::{ObjectName, Store};
use dataplane_common::Addr;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The new tables of one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// Its tables; empty ones if it is gone or has no dataplane.
    pub tables: ServiceTables,
    /// Everything about it that is to be complained about now, not only what is new.
    pub complaints: Vec<Complaint>,
}

/// What a set of dirty Services came to.
///
/// Within one update a frontend may move from one Service to another. Whoever applies it one Service after the other
/// deletes a frontend only if it still leads to the Service that gives it up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// The dirty Services, and their rivals who won or lost an address by it.
    pub services: BTreeMap<ObjectName, Compiled>,
    /// Whether the node's tables must be compiled again: an LB IP on one of the node's addresses came or went (P16).
    pub node: bool,
}

/// Compiles Services and remembers what each claims, nothing else.
#[derive(Debug, Default)]
pub struct Compiler {
    claims: Claims,
}

impl Compiler {
    /// Compiles the Services that are dirty, deleted ones included, and the rivals whose addresses that touches.
    ///
    /// If `context` is another than last time, the Services it matters to are to be among the dirty ones: the store names
    /// them where it knows the cause; for the addresses of interfaces see [`Store::services_with_address`].
    pub fn update(&mut self, store: &Store, dirty: &BTreeSet<ObjectName>, context: &Context) -> Update {
        let ips_before = self.load_balancer_ips(&context.node_addresses);
        let mut update = Update::default();
        let mut disturbed = BTreeSet::new();
        for name in dirty {
            let compiled = compile(store, name, context);
            let created = store.service(name).map_or(0, |service| service.created);
            disturbed.append(&mut self.claims.enter(name, created, &compiled.tables));
            update.services.insert(name.clone(), compiled);
        }
        // What the rivals claim has not changed, so they disturb nobody else.
        for name in disturbed {
            update.services.entry(name.clone()).or_insert_with(|| compile(store, &name, context));
        }
        for (name, compiled) in &mut update.services {
            compiled.complaints.append(&mut self.claims.decide(name, &mut compiled.tables));
        }
        update.node = ips_before != self.load_balancer_ips(&context.node_addresses);
        update
    }

    /// Forgets all claims and takes in those of all Services in the store, for [`Self::compile`].
    pub fn claim_all(&mut self, store: &Store, context: &Context) {
        self.claims = Claims::default();
        for object in store.services() {
            // Endpoints claim nothing.
            let (tables, _) = service(object, &[], context);
            let _disturbed = self.claims.enter(&object.name, object.created, &tables);
        }
    }

    /// Compiles one Service whose claims, and those of all others, were taken in.
    pub fn compile(&self, store: &Store, name: &ObjectName, context: &Context) -> Compiled {
        let mut compiled = compile(store, name, context);
        compiled.complaints.append(&mut self.claims.decide(name, &mut compiled.tables));
        compiled
    }

    /// Those of the node's addresses that are LB IPs of Services: node ports do not answer there (P16).
    pub fn load_balancer_ips(&self, node_addresses: &BTreeSet<Addr>) -> BTreeSet<Addr> {
        node_addresses.iter().copied().filter(|addr| self.claims.is_load_balancer_ip(*addr)).collect()
    }
}

fn compile(store: &Store, name: &ObjectName, context: &Context) -> Compiled {
    let Some(object) = store.service(name) else { return Compiled::default() };
    let (tables, complaints) = service(object, store.slices(name), context);
    Compiled { tables, complaints }
}

/// For `--dry-run` and golden files.
impl fmt::Display for Update {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, Compiled { tables, complaints }) in &self.services {
            let nothing = tables.ports.is_empty() && tables.closed.is_empty();
            writeln!(f, "Service {name}{}", if nothing { ": no dataplane" } else { "" })?;
            write!(f, "{tables}")?;
            complaints.iter().try_for_each(|complaint| writeln!(f, "complaint {complaint}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}
