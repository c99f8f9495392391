//! kube-proxy's configuration file (`KubeProxyConfiguration`, `kubeproxy.config.k8s.io/v1alpha1`): the fields that mean something here,
//! taken as the flags of the same meaning; and the names of those that do not, for somebody may rely on them.

use super::{AgentArgs, BindAddress, NodePortRange, duration, idle_time};
use crate::compile::selection;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot read --config {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// It is no YAML, or of another kind.
    #[error("--config {}: {reason}: it must be a KubeProxyConfiguration", file.display())]
    Kind {
        /// The file.
        file: PathBuf,
        /// What it is.
        reason: String,
    },
    /// A field has a value that means nothing.
    #[error("--config {}: {field}: {reason}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// Takes a value over; what is wrong with it otherwise.
type Take = fn(&mut AgentArgs, &Value) -> Result<(), String>;

/// What IPVS schedules by.
const SCHEDULER: &str = "ipvs.scheduler";

/// The fields that are taken: where they are, the flag whose place they take, and how.
const FIELDS: [(&str, &str, Take); 16] = [
    ("clientConnection.kubeconfig", "kubeconfig", |args, value| {
        args.kubeconfig = Some(text(value)?.into());
        Ok(())
    }),
    ("hostnameOverride", "node_name", |args, value| {
        args.node_name = Some(text(value)?.to_owned());
        Ok(())
    }),
    ("healthzBindAddress", "healthz_bind_address", |args, value| {
        args.healthz_bind_address = address(text(value)?, 10_256)?;
        Ok(())
    }),
    ("metricsBindAddress", "metrics_bind_address", |args, value| {
        args.metrics_bind_address = address(text(value)?, 10_249)?;
        Ok(())
    }),
    ("nodePortAddresses", "nodeport_addresses", |args, value| {
        let list = value.as_array().ok_or("is no list")?;
        let texts = list.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        args.nodeport_addresses = parsed::<NodePortRange>(texts.into_iter())?;
        Ok(())
    }),
    ("linux.masqueradeAll", "masquerade_all", masquerade_all),
    ("iptables.masqueradeAll", "masquerade_all", masquerade_all),
    ("nftables.masqueradeAll", "masquerade_all", masquerade_all),
    ("conntrack.tcpEstablishedTimeout", "conntrack_tcp_timeout_established", |args, value| {
        args.conntrack.conntrack_tcp_timeout_established = idle_time(text(value)?)?;
        Ok(())
    }),
    ("conntrack.tcpCloseWaitTimeout", "conntrack_tcp_timeout_close_wait", |args, value| {
        args.conntrack.conntrack_tcp_timeout_close_wait = duration(text(value)?)?;
        Ok(())
    }),
    ("conntrack.maxPerCore", "conntrack_max_per_core", |args, value| {
        args.conntrack.conntrack_max_per_core = number(value)?;
        Ok(())
    }),
    ("conntrack.min", "conntrack_min", |args, value| {
        args.conntrack.conntrack_min = number(value)?;
        Ok(())
    }),
    ("iptables.masqueradeBit", "masquerade_bit", masquerade_bit),
    ("nftables.masqueradeBit", "masquerade_bit", masquerade_bit),
    (SCHEDULER, "lb_algorithm", |args, value| {
        let word = text(value)?;
        let why = match selection::algorithm(word) {
            Ok(algorithm) => {
                args.lb_algorithm = algorithm;
                String::new()
            }
            // Services are served all the same.
            Err(why) => format!(": {why}"),
        };
        tracing::warn!(
            "--config: {SCHEDULER} {word}{why}; endpoints are chosen by {}",
            args.lb_algorithm.name()
        );
        Ok(())
    }),
    ("conntrack.udpStreamTimeout", "conntrack_udp_timeout_stream", |args, value| {
        args.conntrack_udp_timeout_stream = idle_time(text(value)?)?;
        Ok(())
    }),
];

fn masquerade_all(args: &mut AgentArgs, value: &Value) -> Result<(), String> {
    args.masquerade_all |= value.as_bool().ok_or("is neither true nor false")?;
    Ok(())
}

fn masquerade_bit(args: &mut AgentArgs, value: &Value) -> Result<(), String> {
    let bit = number(value)?;
    args.masquerade_bit = u8::try_from(bit)
        .ok()
        .filter(|bit| *bit < 32)
        .ok_or_else(|| format!("`{bit}` is no bit of a mark"))?;
    Ok(())
}

fn number(value: &Value) -> Result<u32, String> {
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    number.ok_or_else(|| format!("`{value}` is no number of 32 bits"))
}

fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| format!("`{value}` is no text"))
}

fn parsed<'a, T: std::str::FromStr>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<T>, String>
where
    T::Err: ToString,
{
    let parse =
        |text: &str| text.trim().parse::<T>().map_err(|error| format!("`{text}`: {}", error.to_string()));
    texts.map(parse).collect()
}

/// kube-proxy takes an address without a port as well.
fn address(text: &str, port: u16) -> Result<BindAddress, String> {
    match text.parse::<std::net::IpAddr>() {
        Ok(ip) => Ok(BindAddress(Some((ip, port).into()))),
        Err(_) => text.parse(),
    }
}

/// Takes what a file says over, but for what `given` says that a flag says. The names of the fields that are ignored.
///
/// # Errors
/// If the file cannot be read, or a field that is taken has a value that means nothing.
pub fn apply(
    args: &mut AgentArgs,
    file: &Path,
    given: &dyn Fn(&str) -> bool,
) -> Result<Vec<String>, ConfigFileError> {
    let read = |source| ConfigFileError::Read { file: file.to_owned(), source };
    let kind = |reason| ConfigFileError::Kind { file: file.to_owned(), reason };
    let yaml = fs::read_to_string(file).map_err(read)?;
    let config: Value = serde_saphyr::from_str(&yaml).map_err(|error| kind(error.to_string()))?;
    match config.get("kind").and_then(Value::as_str) {
        Some("KubeProxyConfiguration") => {}
        Some(other) => return Err(kind(format!("it is a {other}"))),
        None => return Err(kind("it has no kind".to_owned())),
    }
    let mut ignored = leaves(&config, "");
    ignored.retain(|path| !["kind", "apiVersion"].contains(&path.as_str()));
    // Another mode has no schedulers, whatever is written.
    let schedules = config.get("mode").and_then(Value::as_str) == Some("ipvs");
    for (path, flag, take) in FIELDS.into_iter().filter(|(path, ..)| schedules || *path != SCHEDULER) {
        let value = path.split('.').try_fold(&config, |value, name| value.get(name));
        // A 0 that somebody writes here is a number: as many connections as there are, or the first bit.
        let Some(value) = value.filter(|value| value.is_number() || !is_unset(value)) else { continue };
        let is_it = |leaf: &String| leaf == path || leaf.starts_with(&format!("{path}["));
        ignored.retain(|leaf| !is_it(leaf));
        if !given(flag) {
            let wrong = |reason| ConfigFileError::Field { file: file.to_owned(), field: path, reason };
            take(args, value).map_err(wrong)?;
        }
    }
    Ok(ignored)
}

/// Whether a value stands for kube-proxy's default, as kubeadm writes it.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty() || text == "0s",
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    }
}

/// The paths of all that is set.
fn leaves(value: &Value, path: &str) -> Vec<String> {
    match value {
        _ if is_unset(value) => Vec::new(),
        Value::Object(map) => {
            let below = |(name, value): (&String, &Value)| {
                leaves(value, &if path.is_empty() { name.clone() } else { format!("{path}.{name}") })
            };
            map.iter().flat_map(below).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            vec![path.to_owned()]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cli, Command};
    use clap::Parser as _;
    use std::time::Duration;

    /// What kubeadm writes, and a few things set.
    const KUBEADM: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack: {maxPerCore: 16384, min: 262144, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: 2h0m0s, udpStreamTimeout: 0s}
detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}
detectLocalMode: ''
enableProfiling: false
healthzBindAddress: 127.0.0.1
hostnameOverride: ''
iptables: {localhostNodePorts: null, masqueradeAll: true, masqueradeBit: 15, minSyncPeriod: 1s, syncPeriod: 0s}
kind: KubeProxyConfiguration
metricsBindAddress: 0.0.0.0:10249
mode: nftables
nodePortAddresses: [primary]
oomScoreAdj: null
";

    fn args(flags: &[&str]) -> AgentArgs {
        let cli = Cli::try_parse_from(["portolan", "agent"].iter().chain(flags)).unwrap();
        let Command::Agent(args) = cli.command else { panic!("not the agent") };
        *args
    }

    fn apply_text(text: &str, given: &[&str]) -> (AgentArgs, Result<Vec<String>, ConfigFileError>) {
        let file =
            std::env::temp_dir().join(format!("portolan-config-{}-{}", std::process::id(), text.len()));
        fs::write(&file, text).unwrap();
        let mut args = args(&[]);
        let result = apply(&mut args, &file, &|flag| given.contains(&flag));
        fs::remove_file(file).unwrap();
        (args, result)
    }

    #[test]
    fn what_kubeadm_writes_is_taken_and_what_means_nothing_is_named() {
        let (args, ignored) = apply_text(KUBEADM, &[]);
        assert_eq!(ignored.unwrap(), ["bindAddress", "clusterCIDR", "iptables.minSyncPeriod", "mode"]);
        assert_eq!(args.kubeconfig.unwrap().to_str(), Some("/var/lib/kube-proxy/kubeconfig.conf"));
        assert_eq!(args.node_name, None);
        assert_eq!(args.healthz_bind_address, "127.0.0.1:10256".parse().unwrap());
        assert_eq!(args.metrics_bind_address, "0.0.0.0:10249".parse().unwrap());
        assert_eq!(args.nodeport_addresses, [NodePortRange::Primary]);
        assert!(args.masquerade_all);
        assert_eq!(args.masquerade_bit, 15);
        assert_eq!((args.conntrack.conntrack_max_per_core, args.conntrack.conntrack_min), (16_384, 262_144));
        assert_eq!(args.conntrack.conntrack_tcp_timeout_established, Duration::from_secs(7_200));
        assert_eq!(args.conntrack_udp_timeout_stream, Duration::from_secs(180), "unset is the default");
    }

    /// L1
    #[test]
    fn the_scheduler_of_ipvs_is_kept_where_there_is_one() {
        use dataplane_common::service::Algorithm;
        let algorithm = |text: &str| {
            let (args, ignored) = apply_text(&format!("kind: KubeProxyConfiguration\n{text}\n"), &[]);
            (args.lb_algorithm, ignored.unwrap())
        };
        assert_eq!(algorithm("mode: ipvs\nipvs: {scheduler: wrr}").0, Algorithm::RoundRobin);
        assert_eq!(algorithm("mode: ipvs\nipvs: {scheduler: sh}").0, Algorithm::SourceHash);
        assert_eq!(algorithm("mode: ipvs\nipvs: {scheduler: dh}").0, Algorithm::Random);
        assert_eq!(algorithm("mode: ipvs\nipvs: {scheduler: ''}").0, Algorithm::Random);
        let unused = algorithm("mode: iptables\nipvs: {scheduler: rr}");
        assert_eq!(unused, (Algorithm::Random, vec!["ipvs.scheduler".to_owned(), "mode".to_owned()]));
        assert_eq!(args(&["--ipvs-scheduler=rr"]).lb_algorithm, Algorithm::RoundRobin);
    }

    #[test]
    fn a_flag_says_more_than_the_file() {
        let (args, ignored) = apply_text(KUBEADM, &["kubeconfig", "healthz_bind_address"]);
        assert_eq!(ignored.unwrap().len(), 4);
        assert_eq!((args.kubeconfig, args.masquerade_all), (None, true));
        assert_eq!(args.healthz_bind_address, "0.0.0.0:10256".parse().unwrap());
    }

    #[test]
    fn a_file_that_is_none_is_refused_with_what_is_wrong() {
        let error = |text: &str| apply_text(text, &[]).1.unwrap_err().to_string();
        assert!(error("kind: KubeletConfiguration\n").contains("it is a KubeletConfiguration"));
        assert!(
            error("kind: KubeProxyConfiguration\nmetricsBindAddress: all\n")
                .contains("metricsBindAddress: `all` is no address")
        );
        assert!(error("a: [\n").contains("must be a KubeProxyConfiguration"));
    }

    /// Each field takes the place of a flag that there is.
    #[test]
    fn every_field_has_a_flag() {
        use clap::CommandFactory as _;
        let command = Cli::command();
        let agent = command.get_subcommands().find(|verb| verb.get_name() == "agent").unwrap();
        for (path, flag, _) in FIELDS {
            assert!(agent.get_arguments().any(|argument| argument.get_id() == flag), "{path}: {flag}");
        }
    }
}
