//! `portolan report` of other nodes, from a workstation: what the agents' pods report, by `kubectl exec`, each in a folder of its own,
//! with the agents' logs. One that does not answer is a file that says why, and the others are there all the same.

use super::super::AdminError;
use super::super::remote::{self, AgentPod};
use super::{Archive, FOLDER};
use crate::config::{DEFAULT_BPFFS, ReportArgs};
use flate2::read::GzDecoder;
use std::ffi::OsString;
use std::io::{self, Read as _, Write};
use std::path::Path;

/// How many lines of a log are taken.
const LINES: u32 = 10_000;

/// Writes the archive of the node that was named, or of all.
///
/// # Errors
/// If no agent's pod is there, `kubectl` cannot be run, or the archive cannot be written.
pub fn write(args: &ReportArgs, to: impl Write) -> Result<(), AdminError> {
    let pods = remote::pods_on(args.node.as_deref())?;
    let mut words = vec![OsString::from("report")];
    if args.bpffs != Path::new(DEFAULT_BPFFS) {
        words.extend(["--bpffs".into(), args.bpffs.clone().into_os_string()]);
    }
    let mut archive = Archive::new(to);
    for pod in &pods {
        let AgentPod { node, .. } = pod;
        match remote::bytes(pod, &words) {
            Ok(report) => archive.unpack(node, &report)?,
            Err(error) => archive.file(&format!("{node}.error"), &format!("{error}\n"))?,
        }
        archive.outcome(&format!("{node}/log.txt"), remote::log(pod, LINES, false))?;
        // Mostly there was none before.
        if let Ok(log) = remote::log(pod, LINES, true) {
            archive.file(&format!("{node}/log-before.txt"), &log)?;
        }
    }
    archive.finish()?;
    Ok(())
}

impl<W: Write> Archive<W> {
    /// Takes the files of another archive in, below a folder; those that can be read, if it was cut off.
    fn unpack(&mut self, folder: &str, report: &[u8]) -> io::Result<()> {
        let mut other = tar::Archive::new(GzDecoder::new(report));
        let mut read = || -> io::Result<()> {
            for entry in other.entries()? {
                let mut entry = entry?;
                let path = entry.path()?.into_owned();
                let name = path.strip_prefix(FOLDER).unwrap_or(&path).display().to_string();
                let mut text = String::new();
                entry.read_to_string(&mut text)?;
                self.file(&format!("{folder}/{name}"), &text)?;
            }
            Ok(())
        };
        match read() {
            Ok(()) => Ok(()),
            Err(error) => self.file(&format!("{folder}.error"), &format!("it was cut off: {error}\n")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn files(archive: &[u8]) -> BTreeMap<String, String> {
        let mut archive = tar::Archive::new(GzDecoder::new(archive));
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let (name, mut text) = (entry.path().unwrap().display().to_string(), String::new());
            entry.read_to_string(&mut text).unwrap();
            (name, text)
        });
        entries.collect()
    }

    fn archive(fill: impl FnOnce(&mut Archive<&mut Vec<u8>>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        fill(&mut archive);
        archive.finish().unwrap();
        bytes
    }

    #[test]
    fn each_node_has_a_folder_and_one_that_was_cut_off_says_so() {
        let report = archive(|archive| {
            archive.file("status.json", "{}").unwrap();
            archive.file("sysctl/ip_forward.txt", "1").unwrap();
        });
        let all = archive(|archive| {
            archive.unpack("a", &report).unwrap();
            archive.unpack("b", &report[..report.len() / 4]).unwrap();
        });
        let files = files(&all);
        assert_eq!(files["portolan-report/a/status.json"], "{}");
        assert_eq!(files["portolan-report/a/sysctl/ip_forward.txt"], "1");
        assert!(files["portolan-report/b.error"].starts_with("it was cut off"), "{files:?}");
    }
}
