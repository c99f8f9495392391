//! Images in one file, as `docker save` writes them and `ctr images import` reads them.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

/// What a program is looked for in.
const SEARCH_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Images of one layer each, which several may share.
#[derive(Default)]
pub(super) struct Archive {
    layers: BTreeMap<String, Vec<u8>>,
    configurations: BTreeMap<String, String>,
    /// Name, configuration, layer.
    images: Vec<(String, String, String)>,
}

impl Archive {
    /// Adds a layer of programs, each with its path in the image.
    pub(super) fn layer(&mut self, programs: &[(&Path, &str)]) -> Result<String> {
        let mut tar = tar::Builder::new(Vec::new());
        for (program, path) in programs {
            let content = fs::read(program).with_context(|| program.display().to_string())?;
            append(&mut tar, path, 0o755, &content)?;
        }
        let content = tar.into_inner()?;
        let digest = hex(&Sha256::digest(&content));
        self.layers.insert(digest.clone(), content);
        Ok(digest)
    }

    /// Adds an image.
    pub(super) fn image(&mut self, name: &str, layer: &str, entrypoint: &[&str]) {
        let architecture = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
        let configuration = json!({
            "architecture": architecture,
            "os": "linux",
            "config": { "Env": [SEARCH_PATH], "Entrypoint": entrypoint, "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
        });
        let text = configuration.to_string();
        let digest = hex(&Sha256::digest(&text));
        self.configurations.insert(digest.clone(), text);
        self.images.push((name.into(), digest, layer.into()));
    }

    /// Writes the file. `repositories` is first: there kind looks for the names.
    pub(super) fn write(&self, file: &Path) -> Result<()> {
        let mut repositories: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
        for (name, configuration, _) in &self.images {
            let (repository, tag) = name.rsplit_once(':').with_context(|| format!("{name} has no tag"))?;
            repositories.entry(repository).or_default().insert(tag, configuration);
        }
        let manifest: Vec<Value> = self.images.iter().map(|(name, configuration, layer)| {
            json!({ "Config": format!("{configuration}.json"), "RepoTags": [name], "Layers": [format!("{layer}.tar")] })
        }).collect();
        let mut tar = tar::Builder::new(File::create(file).with_context(|| file.display().to_string())?);
        append(&mut tar, "repositories", 0o644, json!(repositories).to_string().as_bytes())?;
        for (digest, text) in &self.configurations {
            append(&mut tar, &format!("{digest}.json"), 0o644, text.as_bytes())?;
        }
        for (digest, content) in &self.layers {
            append(&mut tar, &format!("{digest}.tar"), 0o644, content)?;
        }
        append(&mut tar, "manifest.json", 0o644, json!(manifest).to_string().as_bytes())?;
        tar.finish()?;
        Ok(())
    }
}

fn append(tar: &mut tar::Builder<impl std::io::Write>, path: &str, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, path, content).with_context(|| format!("cannot pack {path}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
