//! `portolan report`: one archive for a bug report, of what the verbs show and what the node is. Credentials are none of it: nothing is
//! read that holds some, and what looks like one in what is read is struck out.

pub mod nodes;

use super::check::{self, CheckPage};
use super::{AdminError, View, render, status, structured};
use crate::config::{CheckArgs, Output, ReportArgs};
use crate::kernel::links;
use crate::kernel::maps::KernelMaps;
use crate::kernel::whereabouts::WhereaboutsError;
use crate::version;
use dataplane_common::tables::LAYOUT;
use flate2::Compression;
use flate2::write::GzEncoder;
use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, SystemTime};

/// The folder that the archive unpacks to.
const FOLDER: &str = "portolan-report";
/// Where metrics are told unless the agent was told otherwise.
const METRICS: u16 = 10_249;
/// How long the agent may take to tell them.
const PATIENCE: Duration = Duration::from_secs(10);
/// What of `/proc` tells how the node is set up.
const FILES: [(&str, &str); 12] = [
    ("/proc/version", "kernel.txt"),
    ("/etc/os-release", "os-release.txt"),
    ("/proc/self/mounts", "mounts.txt"),
    ("/proc/meminfo", "meminfo.txt"),
    ("/proc/sys/net/ipv4/ip_forward", "sysctl/ip_forward.txt"),
    ("/proc/sys/net/ipv4/ip_local_port_range", "sysctl/ip_local_port_range.txt"),
    ("/proc/sys/net/ipv4/conf/all/rp_filter", "sysctl/rp_filter.txt"),
    ("/proc/sys/net/ipv6/conf/all/forwarding", "sysctl/ipv6_forwarding.txt"),
    ("/proc/sys/net/core/bpf_jit_enable", "sysctl/bpf_jit_enable.txt"),
    ("/proc/sys/kernel/unprivileged_bpf_disabled", "sysctl/unprivileged_bpf_disabled.txt"),
    ("/proc/self/net/snmp", "snmp.txt"),
    ("/proc/self/net/dev", "devices.txt"),
];

/// Writes the archive.
///
/// # Errors
/// If it cannot be written. What cannot be read stands in it as the reason why.
pub async fn write(args: &ReportArgs, to: impl Write) -> Result<(), AdminError> {
    let mut archive = Archive::new(to);
    let about = format!(
        "Made by portolan {} at {}.\nThe agent's log is not in it, but with --node or --all-nodes: `kubectl logs --namespace kube-system \
         daemonset/portolan`, or the node's journal.\nIt names Services, addresses and nodes; passwords and tokens are struck out.\n",
        version::text(),
        status_time()
    );
    archive.file("README.txt", &about)?;
    archive
        .outcome("status.json", status::look(&args.bpffs).and_then(|page| structured(&page, Output::Json)))?;
    archive.outcome("check.json", checked(args).await.and_then(|page| structured(&page, Output::Json)))?;
    match KernelMaps::open(&args.bpffs.join(LAYOUT)) {
        Ok(maps) => {
            let names = super::names::Names::read(&args.bpffs);
            for (view, name) in [
                (View::Services, "services.json"),
                (View::Backends, "backends.json"),
                (View::Flows, "flows.json"),
                (View::Drops, "drops.json"),
                (View::TakeOver, "take-over.json"),
            ] {
                archive.outcome(name, render(view, &maps, &names, Output::Json))?;
            }
        }
        Err(error) => archive.outcome("services.json", Err(error.into()))?,
    }
    archive.outcome("interfaces.txt", interfaces().await)?;
    archive.file("metrics.txt", &metrics().unwrap_or_else(|error| format!("not read: {error}\n")))?;
    for (path, name) in FILES {
        let text = fs::read_to_string(path).unwrap_or_else(|error| format!("not read: {error}\n"));
        archive.file(name, &text)?;
    }
    archive.finish()?;
    Ok(())
}

async fn checked(args: &ReportArgs) -> Result<CheckPage, AdminError> {
    check::look(&CheckArgs::of(&args.bpffs)).await
}

fn status_time() -> String {
    crate::status::timestamp(SystemTime::now()).unwrap_or_default()
}

/// Interfaces, addresses, what their routes do, and what each is.
async fn interfaces() -> Result<String, AdminError> {
    let interfaces = links::look().await.map_err(WhereaboutsError::from)?;
    Ok(format!("{interfaces:#?}\n"))
}

/// The agent's metrics, as they are.
fn metrics() -> io::Result<String> {
    use std::io::Read as _;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS));
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

struct Archive<W: Write>(tar::Builder<GzEncoder<W>>);

impl<W: Write> Archive<W> {
    fn new(to: W) -> Self {
        Self(tar::Builder::new(GzEncoder::new(to, Compression::default())))
    }

    fn file(&mut self, name: &str, text: &str) -> io::Result<()> {
        let text = without_secrets(text);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        header.set_mtime(now.as_secs());
        self.0.append_data(&mut header, format!("{FOLDER}/{name}"), text.as_bytes())
    }

    /// A part, or why there is none.
    fn outcome(&mut self, name: &str, text: Result<String, AdminError>) -> io::Result<()> {
        match text {
            Ok(text) => self.file(name, &text),
            Err(error) => self.file(&format!("{name}.error"), &format!("{error}\n")),
        }
    }

    fn finish(self) -> io::Result<()> {
        self.0.into_inner()?.finish()?.flush()
    }
}

/// A text without what looks like a credential: a password in a URL, a bearer token, a JSON web token.
fn without_secrets(text: &str) -> String {
    const STRUCK: &str = "[struck out]";
    let mut clean = String::with_capacity(text.len());
    let mut after_bearer = false;
    for word in text.split_inclusive(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',')) {
        let (body, end) = match word.char_indices().next_back() {
            Some((at, c)) if c.is_whitespace() || matches!(c, '"' | '\'' | ',') => word.split_at(at),
            Some(_) | None => (word, ""),
        };
        let is_token = body.starts_with("eyJ") && body.matches('.').count() == 2;
        match (body.split_once("://"), body.split_once('@')) {
            _ if body.is_empty() => {}
            _ if after_bearer || is_token => clean.push_str(STRUCK),
            (Some((scheme, rest)), Some(_))
                if rest.split('/').next().is_some_and(|host| host.contains('@')) =>
            {
                let (_, rest) = rest.split_once('@').unwrap_or(("", rest));
                clean.push_str(&format!("{scheme}://{STRUCK}@{rest}"));
            }
            (_, _) => clean.push_str(body),
        }
        after_bearer = if body.is_empty() { after_bearer } else { body.eq_ignore_ascii_case("bearer") };
        clean.push_str(end);
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read as _;

    #[test]
    fn what_looks_like_a_credential_is_struck_out() {
        let text = "proxy http://me:pass@proxy:3128/x, \"Authorization: Bearer abc.def\" eyJhbGciOi.eyJpc3Mi.c2ln\n\
                    server https://192.0.2.1:6443/ me@example.org\n";
        let expected = "proxy http://[struck out]@proxy:3128/x, \"Authorization: Bearer [struck out]\" [struck out]\n\
                        server https://192.0.2.1:6443/ me@example.org\n";
        assert_eq!(without_secrets(text), expected);
    }

    #[tokio::test]
    async fn the_archive_has_everything_or_says_why_not() {
        let mut bytes = Vec::new();
        let args = ReportArgs { bpffs: "/no/such/pins".into(), output: None, node: None, all_nodes: false };
        write(&args, &mut bytes).await.unwrap();
        let mut files = BTreeMap::new();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&bytes[..]));
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let (name, mut text) = (entry.path().unwrap().display().to_string(), String::new());
            entry.read_to_string(&mut text).unwrap();
            files.insert(name, text);
        }
        assert!(files["portolan-report/status.json"].contains("\"verdict\": \"failing\""), "{files:?}");
        assert!(
            files["portolan-report/services.json.error"].contains("no maps of Portolan are pinned"),
            "{files:?}"
        );
        assert!(files["portolan-report/check.json"].contains("\"kernel\""));
        assert!(files["portolan-report/interfaces.txt"].contains("lo"));
        assert!(files.values().all(|text| !text.is_empty()));
    }
}
