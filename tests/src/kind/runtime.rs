//! `portolan-lab runc`: Docker's runtime where a machine lacks capabilities, or Docker does not know all of them.
//!
//! A privileged container asks for every capability that Docker knows. Where this process may not have one of them, the container
//! does not start; and a Docker before 23 knows neither `CAP_BPF` nor `CAP_PERFMON`, so no container has them. Here a privileged
//! container gets exactly those that this process may have, and any other none that it may not have. Then runc does the rest.

use anyhow::{Context as _, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// By their numbers (linux/capability.h).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Changes what runc is about to read, and becomes runc.
pub fn become_runc(arguments: &[OsString]) -> Result<()> {
    let bounding =
        bounding_set(&fs::read_to_string("/proc/self/status")?).context("no CapBnd in /proc/self/status")?;
    for (file, part) in specifications(arguments) {
        change(&file, part, &bounding).with_context(|| file.display().to_string())?;
    }
    let error = Command::new("runc").args(arguments).exec();
    Err(error).context("runc")
}

/// The files that say what a container, or a process in it, may do; and where in them.
fn specifications(arguments: &[OsString]) -> Vec<(PathBuf, &'static str)> {
    let verb = |name: &str| arguments.iter().any(|argument| argument == name);
    let pairs = arguments.windows(2);
    pairs
        .filter_map(|pair| {
            let value = Path::new(&pair[1]);
            match pair[0].to_str()? {
                "--bundle" | "-b" if verb("create") || verb("run") => {
                    Some((value.join("config.json"), "/process"))
                }
                "--process" | "-p" if verb("exec") => Some((value.to_owned(), "")),
                _ => None,
            }
        })
        .collect()
}

fn change(file: &Path, part: &str, bounding: &BTreeSet<String>) -> Result<()> {
    let mut text: Value = serde_json::from_slice(&fs::read(file)?)?;
    if let Some(sets) = text.pointer_mut(&format!("{part}/capabilities")).and_then(Value::as_object_mut) {
        for set in sets.values_mut() {
            *set = allowed(set, bounding);
        }
    }
    Ok(fs::write(file, text.to_string())?)
}

/// What a container gets of a set that it asks for.
fn allowed(set: &Value, bounding: &BTreeSet<String>) -> Value {
    let asked: BTreeSet<String> =
        set.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    // What has both is privileged: Docker gives neither otherwise.
    let privileged = ["CAP_SYS_ADMIN", "CAP_SYS_MODULE"].iter().all(|name| asked.contains(*name));
    let given = if privileged { bounding.clone() } else { asked.intersection(bounding).cloned().collect() };
    given.into_iter().collect()
}

/// The capabilities that a process may have, from its `/proc/PID/status`.
fn bounding_set(status: &str) -> Option<BTreeSet<String>> {
    let bits = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
    let bits = u64::from_str_radix(bits.trim(), 16).ok()?;
    let held = NAMES.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1);
    Some(held.map(|(_, name)| format!("CAP_{name}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_privileged_container_gets_what_this_machine_has() {
        // All but CAP_SYS_RESOURCE (24).
        let held = bounding_set("Name:\tx\nCapBnd:\t000001fffeffffff\n").unwrap();
        assert_eq!(held.len(), NAMES.len() - 1);
        assert!(held.contains("CAP_BPF") && held.contains("CAP_CHOWN") && !held.contains("CAP_SYS_RESOURCE"));
        let asked = json!(["CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_SYS_RESOURCE"]);
        let given = allowed(&asked, &held);
        assert!(given.as_array().unwrap().contains(&"CAP_BPF".into()));
        assert!(!given.as_array().unwrap().contains(&"CAP_SYS_RESOURCE".into()));
        assert_eq!(allowed(&json!(["CAP_CHOWN", "CAP_SYS_RESOURCE"]), &held), json!(["CAP_CHOWN"]));
    }

    #[test]
    fn the_specification_is_where_runc_reads_it() {
        let create = words("--root /r create --bundle /b --pid-file /p id");
        assert_eq!(specifications(&create), [(PathBuf::from("/b/config.json"), "/process")]);
        assert_eq!(specifications(&words("exec --process /x id")), [(PathBuf::from("/x"), "")]);
        assert_eq!(specifications(&words("delete --bundle /b id")), []);
    }
}
