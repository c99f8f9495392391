//! Who may call Services from outside, as a file on the node says it (S2): live, so that a ban holds within a second or two and takes
//! no new agent. What cannot be read changes nothing, and is told.

use crate::compile::Sources;
use ipnet::IpNet;
use serde::Deserialize;
use std::fs;
use std::io;
use std::path::PathBuf;

/// How many ranges a file may have: they share a table with those of Services.
const MOST: usize = 10_000;

/// `--sources-file`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    /// Who may call node ports.
    #[serde(default)]
    node_port_sources: Vec<IpNet>,
    /// Who may call nothing.
    #[serde(default)]
    denied_sources: Vec<IpNet>,
}

/// The flag and the file.
#[derive(Debug)]
pub(super) struct SourceLists {
    /// `--nodeport-source-ranges`.
    always: Vec<IpNet>,
    path: Option<PathBuf>,
    /// What was read last.
    text: Option<Result<String, String>>,
}

impl SourceLists {
    pub(super) fn new(always: Vec<IpNet>, path: Option<PathBuf>) -> Self {
        Self { always, path, text: None }
    }

    /// The lists, if they may have changed since the last time.
    pub(super) fn look(&mut self) -> Option<Sources> {
        let text = self.read();
        if self.text.as_ref() == Some(&text) {
            return None;
        }
        let first = self.text.is_none();
        let parsed = text.as_ref().map_err(Clone::clone).and_then(|text| parse(text));
        self.text = Some(text);
        match parsed {
            Ok(file) => {
                if !first || !file.denied_sources.is_empty() || !file.node_port_sources.is_empty() {
                    tracing::info!(
                        "{}: {} ranges may call node ports, {} may call nothing",
                        self.name(),
                        file.node_port_sources.len(),
                        file.denied_sources.len()
                    );
                }
                Some(Sources {
                    node_ports: self.always.iter().chain(&file.node_port_sources).map(IpNet::trunc).collect(),
                    denied: file.denied_sources.iter().map(IpNet::trunc).collect(),
                })
            }
            Err(error) => {
                tracing::error!("{}: {error}. What it said before holds on", self.name());
                first.then(|| Sources {
                    node_ports: self.always.iter().map(IpNet::trunc).collect(),
                    ..Sources::default()
                })
            }
        }
    }

    fn name(&self) -> String {
        self.path
            .as_ref()
            .map_or_else(|| "--nodeport-source-ranges".to_owned(), |path| path.display().to_string())
    }

    /// What the file holds; nothing where there is none, as where a ConfigMap is optional.
    fn read(&self) -> Result<String, String> {
        let Some(path) = &self.path else { return Ok(String::new()) };
        match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(|error| error.to_string()),
        }
    }
}

fn parse(text: &str) -> Result<File, String> {
    if text.trim().is_empty() {
        return Ok(File::default());
    }
    let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let open = |range: &&IpNet| range.prefix_len() != 0;
    file.node_port_sources.iter().filter(open).chain(&file.denied_sources).try_for_each(Sources::check)?;
    let ranges = file.node_port_sources.len() + file.denied_sources.len();
    if ranges > MOST {
        return Err(format!("{ranges} ranges, of which {MOST} are the most"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S2
    #[test]
    fn what_the_file_says_holds_until_it_says_something_else_and_nonsense_changes_nothing() {
        let path = std::env::temp_dir().join(format!("sources-{}", std::process::id()));
        let range = |text: &str| -> IpNet { text.parse().unwrap() };
        let mut lists = SourceLists::new(vec![range("10.0.0.7/8")], Some(path.clone()));
        let first = lists.look().unwrap();
        assert_eq!(
            (first.node_ports, first.denied.len()),
            ([range("10.0.0.0/8")].into(), 0),
            "there is none yet"
        );
        assert_eq!(lists.look(), None);
        let write = |text: &str| fs::write(&path, text).unwrap();
        write("deniedSources: [203.0.113.0/24, 2001:db8::7/128]\nnodePortSources:\n- 192.0.2.0/24\n");
        let second = lists.look().unwrap();
        assert_eq!(second.node_ports, [range("10.0.0.0/8"), range("192.0.2.0/24")].into());
        assert_eq!(second.denied, [range("203.0.113.0/24"), range("2001:db8::7/128")].into());
        for nonsense in ["deniedSources: [everybody]", "deniedSources: ['::/0']", "denied: [10.0.0.0/8]", "]"]
        {
            write(nonsense);
            assert_eq!(lists.look(), None, "{nonsense}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(lists.look().unwrap().denied.len(), 0);
    }
}
