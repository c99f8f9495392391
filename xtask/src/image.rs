//! `image`: the agent as an OCI image in one file, and the laboratory's program as another for the pods of a cluster, as `ctr images import`, `podman load`, `docker load` and `skopeo copy` take it
//! (OCI Image Format 1.1, with the `manifest.json` that `docker load` asks for before Docker 25).
//!
//! The agent is linked statically, so nothing else is in the image but the licences and the list of what it is made of. No time and
//! no path of this machine is written into it: the same source makes the same digest by the same compiler, in whatever folder.

use crate::command::{CommandLine, REVISION, all_targets, cargo_home, program, revision, workspace};
use crate::sbom::sbom;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::path::Path;
use std::process::Stdio;
use std::{env, fs};

/// What an image is called unless it is told: a name that no registry has.
const DEFAULT_NAME: &str = concat!("localhost/portolan:", env!("CARGO_PKG_VERSION"));
/// What the image of the laboratory's program is called.
const LAB_NAME: &str = concat!("localhost/portolan-lab:", env!("CARGO_PKG_VERSION"));
/// What lies in `licenses` of the image.
const LICENCES: [&str; 3] = ["LICENSE-APACHE", "LICENSE-MIT", "dataplane-ebpf/LICENSE-GPL2"];

/// How the agent in the image is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// For use.
    Release,
    /// For tests: as all else that they start, so that nothing is compiled twice.
    Debug,
}

/// A program of the workspace that is to be an image.
struct Content<'a> {
    name: &'a str,
    program: &'static str,
    description: &'static str,
    layer: Vec<u8>,
}

/// Builds the agent, writes `image/portolan.tar` below the target folder, and says where it lies and what it is called.
pub(crate) fn image(name: Option<&str>, profile: Profile) -> Result<String> {
    write(&Content {
        name: name.unwrap_or(DEFAULT_NAME),
        program: "portolan",
        description: "A Kubernetes Service dataplane, in the place of kube-proxy",
        layer: layer(profile)?,
    })
}

/// Builds the laboratory's program and writes `image/portolan-lab.tar`: the pods that serve and ask in a cluster.
pub(crate) fn lab_image() -> Result<String> {
    let mut files = Files::default();
    files.folder("bin")?;
    files.file("bin/portolan-lab", 0o755, &linked_statically("dataplane-tests", "portolan-lab")?)?;
    write(&Content {
        name: LAB_NAME,
        program: "portolan-lab",
        description: "Portolan's laboratory: pods that serve and ask",
        layer: files.finish()?,
    })
}

fn write(content: &Content<'_>) -> Result<String> {
    let (archive, digest) = archive(content)?;
    let path = all_targets()?.join("image").join(format!("{}.tar", content.program));
    fs::create_dir_all(path.parent().context("the target folder lies nowhere")?)?;
    fs::write(&path, &archive).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    println!("{}@{digest}", content.name);
    Ok(digest)
}

/// Builds the image here and from a copy of the source in another folder, and compares them.
pub(crate) fn image_twice(name: Option<&str>) -> Result<()> {
    let here = image(name, Profile::Release)?;
    let copy = env::temp_dir().join(format!("portolan-twice-{}", std::process::id()));
    let there = copy_source(&copy).and_then(|()| digest_of(&copy, name));
    fs::remove_dir_all(&copy).with_context(|| format!("cannot remove {}", copy.display()))?;
    let there = there?;
    ensure!(here == there, "the image is {here} here and {there} in {}", copy.display());
    println!("the same in another folder");
    Ok(())
}

/// Copies the files that git knows, as they are.
fn copy_source(folder: &Path) -> Result<()> {
    let listed = program("git").args(["ls-files", "-z"]).output().context("cannot run git")?;
    ensure!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    for name in String::from_utf8(listed.stdout)?.split_terminator('\0') {
        let (from, to) = (workspace().join(name), folder.join(name));
        fs::create_dir_all(to.parent().context("a file without a folder")?)?;
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

/// What `image` says in another folder.
fn digest_of(folder: &Path, name: Option<&str>) -> Result<String> {
    let mut command = program("cargo");
    command.current_dir(folder).args(["xtask", "image"]).env("CARGO_TARGET_DIR", folder.join("target"));
    command.args(name.iter().flat_map(|name| ["--name", name]));
    command.env(REVISION, revision().unwrap_or_default());
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "building in {} failed", folder.display());
    let text = String::from_utf8(output.stdout)?;
    let digest = text.trim_end().rsplit_once('@').map(|(_, digest)| digest.to_owned());
    digest.with_context(|| format!("no digest in {text}"))
}

/// Builds the agent with glibc in it, which resolves names by `/etc/hosts` and DNS without any library.
///
/// For use, with no path of this machine in it.
fn agent(profile: Profile) -> Result<Vec<u8>> {
    match profile {
        Profile::Release => {
            build_for_use()?;
            read(&all_targets()?.join(target()).join("release/portolan"))
        }
        Profile::Debug => linked_statically("dataplane-user", "portolan"),
    }
}

/// A program as tests have it, with glibc in it. Only the last crate is told how to be linked: the others are the same that every
/// other build has.
fn linked_statically(package: &str, program: &str) -> Result<Vec<u8>> {
    let build = CommandLine::new("cargo rustc --locked").args(&["--package", package, "--bin", program]);
    build.args(&["--", "-C", "target-feature=+crt-static", "-C", "strip=debuginfo"]).with_revision().run()?;
    read(&all_targets()?.join("debug").join(program))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn build_for_use() -> Result<()> {
    println!("everything is compiled anew for the image, which takes minutes (cargo says what) …");
    let target = target();
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    // Paths get into panics and names of symbols. The last that fits counts: the target folder may lie in the workspace.
    for (folder, name) in [(workspace(), "portolan"), (cargo_home(), "cargo"), (all_targets()?, "target")] {
        flags.push(format!("--remap-path-prefix={}=/{name}", folder.display()));
    }
    CommandLine::new("cargo build --locked --release --package dataplane-user --bin portolan --target")
        .arg(&target)
        .arg("--config")
        .arg(format!("target.{target}.rustflags={}", json!(flags)))
        .arg("--config")
        .arg("profile.release.strip=\"debuginfo\"")
        .with_revision()
        .run()
}

fn target() -> String {
    format!("{}-unknown-linux-gnu", env::consts::ARCH)
}

/// The one layer of the image: an archive of its files.
fn layer(profile: Profile) -> Result<Vec<u8>> {
    let mut files = Files::default();
    files.folder("bin")?;
    files.file("bin/portolan", 0o755, &agent(profile)?)?;
    files.file("sbom.cdx.json", 0o644, &sbom(&target(), env!("CARGO_PKG_VERSION"))?)?;
    files.folder("licenses")?;
    for licence in LICENCES {
        let path = workspace().join(licence);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().context("a licence without a name")?.to_string_lossy().into_owned();
        files.file(&format!("licenses/{name}"), 0o644, &text)?;
    }
    files.finish()
}

/// The archive that an image is carried in, and the digest of its manifest.
fn archive(content: &Content<'_>) -> Result<(Vec<u8>, String)> {
    let Content { name, program, description, layer } = content;
    let architecture = match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let version = name.rsplit_once(':').map_or("latest", |(_, version)| version);
    let mut labels = json!({
        "org.opencontainers.image.title": program,
        "org.opencontainers.image.description": description,
        "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
        "org.opencontainers.image.licenses": "MIT OR Apache-2.0",
    });
    if let Some(revision) = revision() {
        labels["org.opencontainers.image.revision"] = revision.into();
    }
    let mut blobs = Vec::new();
    let layer = blob(&mut blobs, "application/vnd.oci.image.layer.v1.tar", layer.clone());
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Entrypoint": [format!("/bin/{program}")],
            "Env": ["PATH=/bin"],
            "Labels": labels,
        },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob(&mut blobs, "application/vnd.oci.image.config.v1+json", config.to_string().into());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
    });
    let mut manifest =
        blob(&mut blobs, "application/vnd.oci.image.manifest.v1+json", manifest.to_string().into());
    let digest = text(&manifest["digest"]);
    manifest["annotations"] =
        json!({ "org.opencontainers.image.ref.name": version, "io.containerd.image.name": name });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    let for_docker = json!([{
        "Config": path_of(&config), "RepoTags": [name], "Layers": [path_of(&layer)],
    }]);
    let mut files = Files::default();
    files.file("oci-layout", 0o644, json!({ "imageLayoutVersion": "1.0.0" }).to_string().as_bytes())?;
    files.file("index.json", 0o644, index.to_string().as_bytes())?;
    files.file("manifest.json", 0o644, for_docker.to_string().as_bytes())?;
    files.folder("blobs")?;
    files.folder("blobs/sha256")?;
    for (path, content) in &blobs {
        files.file(path, 0o644, content)?;
    }
    Ok((files.finish()?, digest))
}

/// Adds a blob, and gives the descriptor that others know it by.
fn blob(blobs: &mut Vec<(String, Vec<u8>)>, media_type: &str, content: Vec<u8>) -> Value {
    let digest = format!("sha256:{}", hex(&Sha256::digest(&content)));
    let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": content.len() });
    blobs.push((path_of(&descriptor), content));
    descriptor
}

/// Where the archive has a blob, by its descriptor.
fn path_of(descriptor: &Value) -> String {
    format!("blobs/{}", text(&descriptor["digest"]).replace(':', "/"))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A tar archive whose files are root's and have no time.
struct Files(tar::Builder<Vec<u8>>);

impl Default for Files {
    fn default() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }
}

impl Files {
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        self.append(header, path, mode, content)
    }

    fn folder(&mut self, path: &str) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Directory);
        self.append(header, &format!("{path}/"), 0o755, &[])
    }

    fn append(&mut self, mut header: tar::Header, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, path, content).with_context(|| format!("cannot pack {path}"))
    }

    fn finish(self) -> Result<Vec<u8>> {
        self.0.into_inner().context("cannot close the archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read as _;

    fn content(name: &str) -> Content<'_> {
        Content { name, program: "portolan", description: "a program", layer: b"a layer".to_vec() }
    }

    fn unpacked(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let files = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let (path, mut content) = (entry.path().unwrap().display().to_string(), Vec::new());
            entry.read_to_end(&mut content).unwrap();
            (path, content)
        });
        files.collect()
    }

    #[test]
    fn every_blob_of_an_image_is_where_its_digest_says() {
        let (archive, digest) = archive(&content("example.org/portolan:1.2")).unwrap();
        let files = unpacked(&archive);
        let json = |path: &str| serde_json::from_slice::<Value>(&files[path]).unwrap();
        let index = json("index.json");
        assert_eq!(index["manifests"][0]["digest"], digest);
        let manifest = json(&path_of(&index["manifests"][0]));
        let config = json(&path_of(&manifest["config"]));
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        assert_eq!(files[&path_of(&manifest["layers"][0])], b"a layer");
        assert_eq!(json("manifest.json")[0]["RepoTags"][0], "example.org/portolan:1.2");
        for (path, content) in
            files.iter().filter(|(path, _)| path.starts_with("blobs/sha256/") && !path.ends_with('/'))
        {
            assert_eq!(*path, format!("blobs/sha256/{}", hex(&Sha256::digest(content))));
        }
    }

    #[test]
    fn a_cluster_is_told_of_the_image_by_its_name() {
        for file in ["portolan.yaml", "cleanup.yaml", "static-pod.yaml"] {
            let text = fs::read_to_string(workspace().join("deploy").join(file)).unwrap();
            assert!(text.contains(&format!("image: {DEFAULT_NAME}\n")), "{file}");
        }
    }

    #[test]
    fn the_same_layer_makes_the_same_image() {
        let twice = [(); 2].map(|()| archive(&content("portolan:1")).unwrap());
        assert_eq!(twice[0], twice[1]);
    }
}
