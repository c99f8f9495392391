//! The golden tier: Kubernetes objects in, readable tables out. Each folder below `cases` is one behaviour and one test:
//!
//! - `input.yaml`: any number of documents; a comment names the rules;
//! - `then-1.yaml`, `then-2.yaml`, …, if there are any: what the objects are afterwards, all of them;
//! - `flags`, if it is there: command-line words of [`Flags`];
//! - `expected.txt`: what came of each of these files. With `PORTOLAN_BLESS=1` it is written instead of compared.

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use dataplane_common::Addr;
use dataplane_user::compile::{self, Compiler, NodePortAddresses, NodeSettings};
use dataplane_user::model::{Change, Dirty, Kind, Object, Store};
use dataplane_user::watch::manifests::{self, ManifestError};
use ipnet::IpNet;
use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

const KINDS: [Kind; 4] = [Kind::ServiceCidr, Kind::Node, Kind::Service, Kind::EndpointSlice];

/// What a case may say about the agent and its node.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Flags {
    /// The node whose tables are compiled.
    #[arg(long, default_value = "node-1")]
    node_name: String,
    /// The name this proxy goes by (F2).
    #[arg(long)]
    proxy_name: Option<String>,
    /// Pod ranges.
    #[arg(long)]
    cluster_cidr: Vec<IpNet>,
    /// Addresses on the node's interfaces besides `127.0.0.1` and those of its Node object.
    #[arg(long)]
    interface_address: Vec<IpAddr>,
    /// `primary`, or the ranges within which node ports answer (P17).
    #[arg(long)]
    nodeport_addresses: Vec<String>,
}

impl Flags {
    fn read(case: &Path) -> Result<Self> {
        let file = case.join("flags");
        let text = if file.exists() { fs::read_to_string(&file)? } else { String::new() };
        Self::try_parse_from(text.split_whitespace()).with_context(|| file.display().to_string())
    }

    fn node_port_addresses(&self) -> Result<NodePortAddresses> {
        match &self.nodeport_addresses[..] {
            [] => Ok(NodePortAddresses::All),
            [word] if word == "primary" => Ok(NodePortAddresses::Primary),
            ranges => {
                let ranges = ranges.iter().map(|range| range.parse().with_context(|| range.clone()));
                Ok(NodePortAddresses::Within(ranges.collect::<Result<_>>()?))
            }
        }
    }
}

/// A node without a kernel: what an agent does with changes, up to the tables.
struct Node {
    flags: Flags,
    store: Store,
    compiler: Compiler,
}

impl Node {
    fn new(flags: Flags) -> Self {
        Self { store: Store::new(flags.node_name.as_str()), compiler: Compiler::default(), flags }
    }

    /// Takes in all objects that there are now, and says what came of it.
    fn step(&mut self, text: &str, file: &str) -> Result<String> {
        let (objects, errors) = manifests::parse(text, file);
        let mut out = format!("== {file}\n");
        for error in &errors {
            writeln!(out, "error {error}")?;
        }
        let mut dirty = Dirty::default();
        for change in changes(&objects, &errors) {
            dirty.merge(self.store.apply(change));
        }
        let interfaces = self.interfaces();
        let addresses: BTreeSet<Addr> = interfaces.iter().map(|ip| Addr::from(*ip)).collect();
        let interfaces = interfaces.into();
        let proxy_name = self.flags.proxy_name.as_deref().map(Into::into);
        let context = compile::Context::new(&self.store, proxy_name, &self.flags.cluster_cidr, &interfaces);
        let update = self.compiler.update(&self.store, &dirty.services, &context);
        if dirty.node || update.node {
            let settings = NodeSettings {
                service_ranges: self.store.service_ranges(),
                node_port_addresses: self.flags.node_port_addresses()?,
                snat_ports: vec![61_000..=65_535],
                flags: 0,
                masquerade_mark: 0,
                connection_mark: 0,
                sources: compile::Sources::default(),
                netns_cookie: 0,
                secret: 1,
            };
            let lb_ips = self.compiler.load_balancer_ips(&addresses);
            let (tables, complaints) = compile::node(&settings, self.store.own_node(), &interfaces, &lb_ips);
            write!(out, "{tables}")?;
            complaints.iter().try_for_each(|complaint| writeln!(out, "complaint {complaint}"))?;
            writeln!(out)?;
        }
        write!(out, "{update}")?;
        Ok(out)
    }

    fn interfaces(&self) -> Vec<IpAddr> {
        let mut interfaces = vec![IpAddr::from(Ipv4Addr::LOCALHOST)];
        interfaces.extend(&self.flags.interface_address);
        interfaces.extend(self.store.own_node().into_iter().flat_map(|node| &node.addresses));
        interfaces
    }
}

/// As an API server's lists tell them: everything of each kind, and what of it cannot be read.
fn changes(objects: &[Object], errors: &[ManifestError]) -> Vec<Change> {
    let refused = |kind| {
        let named = errors.iter().filter_map(|error| match error {
            ManifestError::Object { object, .. } => Some(object),
            ManifestError::File { .. } | ManifestError::Document { .. } | ManifestError::Duplicate { .. } => {
                None
            }
        });
        named.filter(move |object| object.kind == kind).cloned().collect()
    };
    let list = |kind| {
        let of_kind = objects.iter().filter(|object| object.reference().kind == kind);
        Change::Replaced { kind, objects: of_kind.cloned().collect(), unreadable: refused(kind) }
    };
    KINDS.map(list).into()
}

fn run(case: &Path) -> Result<()> {
    let mut node = Node::new(Flags::read(case)?);
    let mut steps = vec!["input.yaml".to_owned()];
    steps.extend((1..).map(|n| format!("then-{n}.yaml")).take_while(|file| case.join(file).exists()));
    let mut actual = String::new();
    for file in steps {
        let text = fs::read_to_string(case.join(&file)).with_context(|| file.clone())?;
        actual.push_str(&node.step(&text, &file)?);
    }
    let actual = format!("{}\n", actual.trim_end());
    let expected_file = case.join("expected.txt");
    if env::var_os("PORTOLAN_BLESS").is_some_and(|value| value == "1") {
        return Ok(fs::write(expected_file, actual)?);
    }
    let expected = fs::read_to_string(expected_file).context("no expected.txt: run `cargo xtask bless`")?;
    if expected != actual {
        bail!("{}`cargo xtask bless` accepts it", difference(&expected, &actual));
    }
    Ok(())
}

/// What remains of both texts without their common beginning and end.
fn difference(expected: &str, actual: &str) -> String {
    let [expected, actual] = [expected, actual].map(|text| text.lines().collect::<Vec<_>>());
    let same = |(a, b): &(&&str, &&str)| a == b;
    let head = expected.iter().zip(&actual).take_while(same).count();
    let tails = expected[head..].iter().rev().zip(actual[head..].iter().rev());
    let tail = tails.take_while(same).count();
    let mut out = format!("expected.txt differs from line {} on:\n", head + 1);
    for (sign, lines) in [('-', &expected), ('+', &actual)] {
        for line in &lines[head..lines.len() - tail] {
            out.push_str(&format!("{sign} {line}\n"));
        }
    }
    out
}

fn cases(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut cases = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    cases.sort();
    Ok(cases)
}

fn main() -> Result<ExitCode> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/cases");
    let trial = |case: PathBuf| {
        let name = case.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Trial::test(name, move || run(&case).map_err(|error| Failed::from(format!("{error:#}"))))
    };
    let trials = cases(&folder)?.into_iter().map(trial).collect();
    Ok(libtest_mimic::run(&Arguments::from_args(), trials).exit_code())
}
