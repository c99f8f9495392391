//! `docs/reference.md` is made from the code: each verb with its flags as `--help` has them, and the fields of its JSON. A field
//! that programs read cannot go or change its name without a difference that somebody reviews.

use super::check::{CheckLine, CheckPage};
use super::explain::{Client, EndpointLine, Explanation, ServiceFacts};
use super::status::{Finding, StatusPage, Verdict};
use super::{
    AddressRow, BackendRow, DropRow, EventLine, FlowRow, ServiceRow, TakeOverPage, TrafficRow, TranslatedRow,
    TriesRow,
};
use crate::config::Cli;
use crate::kernel::needs::{NEEDS, Need, ProgramType};
use crate::kernel::other_proxies;
use crate::status::{AgentStatus, Count, InterfaceStatus, WatchStatus};
use clap::builder::PossibleValue;
use clap::{Arg, Command, CommandFactory as _};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

const HEAD: &str = "# Reference: the command line

`portolan VERB`. This page is made from the code: `cargo xtask bless` writes it anew, and a test compares it. Metrics are in
[metrics.md](metrics.md), the rules by which packets are treated in [contract.md](contract.md).

Verbs that show something take `-o json` and `-o yaml`. Their fields are listed below: some are added in later versions, and none goes or
changes its meaning within a major version. A field that does not apply is `null`.

Exit codes: 0 if all is well, 1 if the verb itself failed, 2 for wrong usage; 3 where somebody should look at something, and 4 where
something does not work, of verbs that judge.
";

/// The fields of a value, as paths: `[]` is each element of a list, `*` each name of a map.
fn fields(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                fields(value, &path, found);
            }
        }
        Value::Array(list) => {
            let element = list.first().unwrap_or_else(|| panic!("the sample of {path} is empty"));
            fields(element, &format!("{path}[]"), found);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            found.insert(path.to_owned());
        }
    }
}

fn fields_of(sample: &impl Serialize) -> Vec<String> {
    let mut found = BTreeSet::new();
    fields(&serde_json::to_value(sample).unwrap(), "", &mut found);
    found.into_iter().collect()
}

/// The fields of the JSON of each verb that has some.
fn json(verb: &str) -> Option<Vec<String>> {
    let traffic = TrafficRow::default();
    Some(match verb {
        "status" => fields_of(&status_sample()),
        "services" => fields_of(&[ServiceRow {
            id: 0,
            name: String::new(),
            protocol: String::new(),
            addresses: vec![AddressRow { kind: "", address: String::new(), port: 0 }],
            cluster_endpoints: 0,
            local_endpoints: 0,
            has_endpoints: false,
            internal_local: false,
            external_local: false,
            affinity_seconds: 0,
            algorithm: "",
            retry: 0,
            tries: TriesRow::default(),
            traffic,
        }]),
        "backends" => fields_of(&[BackendRow {
            id: 0,
            service: String::new(),
            protocol: String::new(),
            address: String::new(),
            port: 0,
            local: false,
            in_use: false,
            weight: 0,
            open: 0,
            generation: 0,
            traffic,
        }]),
        "flows" => fields_of(&[FlowRow {
            protocol: String::new(),
            client: String::new(),
            frontend: String::new(),
            endpoint: String::new(),
            translated_source: None,
            service: String::new(),
            state: "",
            idle_seconds: None,
            packets_in: 0,
            bytes_in: 0,
            packets_out: 0,
            bytes_out: 0,
            whole: true,
        }]),
        "check" => fields_of(&CheckPage {
            verdict: Verdict::Well,
            installed: true,
            checks: vec![CheckLine {
                verdict: Verdict::Well,
                node: None,
                check: "",
                found: String::new(),
                helps: None,
            }],
        }),
        "explain" => fields_of(&explain_sample()),
        "drops" => fields_of(&[drop_sample()]),
        "watch" => fields_of(&EventLine::default()),
        "take-over" => fields_of(&TakeOverPage {
            taking_over: true,
            connections: vec![TranslatedRow {
                client: String::new(),
                frontend: String::new(),
                endpoint: String::new(),
                service: String::new(),
                state: "",
                expires_seconds: 0,
            }],
        }),
        _ => return None,
    })
}

fn explain_sample() -> Explanation {
    Explanation {
        verdict: Verdict::Well,
        conclusion: String::new(),
        reason: None,
        protocol: String::new(),
        from: String::new(),
        to: String::new(),
        client: Client::Pod,
        interface: String::new(),
        program: "",
        passed_by_xdp: false,
        socket_hook: None,
        service: Some(ServiceFacts {
            name: String::new(),
            kind: "",
            internal_local: false,
            external_local: false,
            affinity_seconds: 0,
            algorithm: "",
            source_ranges: false,
            cluster_endpoints: 0,
            local_endpoints: 0,
        }),
        endpoints: vec![EndpointLine::default()],
        endpoints_unknown: None,
        known_flow: false,
        translated_source: None,
        past_stack: false,
        way: None,
    }
}

fn drop_sample() -> DropRow {
    DropRow { reason: "", count: 0, disposition: "", help: "" }
}

fn status_sample() -> StatusPage {
    let agent = AgentStatus {
        warnings: vec![String::new()],
        hanging: vec![String::new()],
        complaints: vec![Count::default()],
        interfaces: vec![InterfaceStatus::default()],
        source: crate::status::Source { watches: vec![WatchStatus::default()], ..Default::default() },
        ..AgentStatus::default()
    };
    let others = other_proxies::Found { traces: vec![String::new()], unknown: Vec::new() };
    let mut page = StatusPage::new(Ok(agent), Some(super::status::kernel_sample(drop_sample())), others);
    page.findings = vec![Finding { verdict: Verdict::Well, text: String::new() }];
    page
}

/// A text of `--help` as one line of a table.
fn line(text: impl ToString) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn flag(arg: &Arg) -> String {
    let mut name =
        arg.get_long().map_or_else(|| arg.get_id().to_string().to_uppercase(), |long| format!("--{long}"));
    if let Some(short) = arg.get_short() {
        name = format!("-{short}, {name}");
    }
    let values =
        arg.get_value_names().filter(|_| arg.get_action().takes_values() && arg.get_long().is_some());
    for value in values.into_iter().flatten() {
        name = format!("{name} {value}");
    }
    name.replace('|', "\\|")
}

fn meaning(arg: &Arg) -> String {
    let mut text = line(arg.get_long_help().or_else(|| arg.get_help()).cloned().unwrap_or_default());
    let possible: Vec<PossibleValue> = arg.get_possible_values();
    let is_switch = !arg.get_action().takes_values();
    for value in possible.iter().filter(|value| !is_switch && !value.is_hide_set()) {
        let help = value.get_help().map(line).unwrap_or_default();
        let help = if help.is_empty() { String::new() } else { format!(": {help}") };
        let _ = write!(text, "<br>`{}`{help}", value.get_name());
    }
    text
}

fn default(arg: &Arg) -> String {
    let values = arg.get_default_values().iter().filter(|_| arg.get_action().takes_values());
    let values: Vec<_> = values.map(|value| value.to_string_lossy().into_owned()).collect();
    if values.is_empty() { String::new() } else { format!("`{}`", values.join(",")) }
}

fn flags<'a>(page: &mut String, args: impl Iterator<Item = &'a Arg>) {
    let args: Vec<_> = args
        .filter(|arg| !arg.is_hide_set() && *arg.get_id() != "help" && *arg.get_id() != "version")
        .collect();
    if args.is_empty() {
        return;
    }
    page.push_str("\n| flag | default | meaning |\n|---|---|---|\n");
    for arg in args {
        let _ = writeln!(page, "| `{}` | {} | {} |", flag(arg), default(arg), meaning(arg));
    }
}

fn verb(page: &mut String, command: &Command) {
    let _ = writeln!(page, "\n## portolan {}\n", command.get_name());
    let about = command.get_long_about().or_else(|| command.get_about()).cloned().unwrap_or_default();
    let _ = writeln!(page, "{}", about.to_string().trim());
    flags(page, command.get_arguments());
    if let Some(fields) = json(command.get_name()) {
        let fields: Vec<_> = fields.iter().map(|field| format!("`{field}`")).collect();
        let _ = writeln!(page, "\nJSON: {}", fields.join(", "));
    }
}

fn page() -> String {
    let mut page = HEAD.to_owned();
    let command = Cli::command();
    page.push_str("\n## All verbs\n");
    flags(&mut page, command.get_arguments());
    command.get_subcommands().filter(|sub| !sub.is_hide_set()).for_each(|sub| verb(&mut page, sub));
    needs(&mut page);
    page
}

/// What a kernel must have.
fn needs(page: &mut String) {
    page.push_str(NEEDS_HEAD);
    for needed in NEEDS {
        let (what, programs) = match needed.need {
            Need::Helper(name, _, kind) => (format!("helper `bpf_{name}`"), kind.to_string()),
            Need::Atomics => ("`atomic_fetch_add` and `cmpxchg`".to_owned(), "all".to_owned()),
            Need::MappedArrays => {
                ("arrays in a process's memory (`BPF_F_MMAPABLE`)".to_owned(), "all".to_owned())
            }
            Need::XdpFrags => ("`BPF_F_XDP_HAS_FRAGS`".to_owned(), ProgramType::Xdp.to_string()),
        };
        let _ = writeln!(page, "| {what} | {programs} | {} |", needed.since);
    }
}

const NEEDS_HEAD: &str = "
## What a kernel must have

The agent asks the kernel for each of these when it starts, and refuses one that lacks something by what it lacks, whatever its version says:
distributions bring much to old kernels. The release is that of upstream. Linux 6.1 and later have all. *Not tried*: RHEL 9, whose 5.14 has
most of newer kernels' BPF. What else is used and can be done without is told in the agent's first lines: TCX (6.6), the source address
by `bpf_fib_lookup` (6.7), BTF.

| what | in programs of | since |
|---|---|---|
";

#[test]
fn the_reference_of_the_command_line_in_the_documentation_is_up_to_date() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference.md");
    if std::env::var_os("PORTOLAN_BLESS").is_some() {
        std::fs::write(&file, page()).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page(), "docs/reference.md differs from the code: `cargo xtask bless` writes it anew");
}
