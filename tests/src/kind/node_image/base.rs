//! The base image: Debian with systemd, the container runtime and kind's own files.

use super::{Parts, build, contained, install};
use crate::kind::docker::Docker;
use crate::kind::undo;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

const NAME: &str = "portolan/node-base:1";
/// What kind's Dockerfile installs, less what only network storage and rootless nodes need; and runc, which it compiles.
const PACKAGES: &str = "bash,bpftool,ca-certificates,conntrack,curl,e2fsprogs,ethtool,iproute2,iptables,jq,kmod,libseccomp2,mount,\
    nftables,pigz,procps,runc,systemd,util-linux";
/// What nobody reads on a node.
const NEEDLESS: [&str; 6] =
    ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "var/log"];
/// Folders of links to units that have no place in a container, and which of the links: those that contain one of these words.
const UNWANTED: [(&str, &[&str]); 5] = [
    ("usr/lib/systemd/system/sysinit.target.wants", &["systemd-tmpfiles-setup.service"]),
    ("usr/lib/systemd/system/multi-user.target.wants", &[""]),
    ("usr/lib/systemd/system/local-fs.target.wants", &[""]),
    ("usr/lib/systemd/system/sockets.target.wants", &["udev", "initctl"]),
    ("usr/lib/systemd/system/basic.target.wants", &[""]),
];

/// Makes it and says its name.
pub(super) fn make(docker: &Docker, parts: &Parts) -> Result<String> {
    let root = parts.work.join("base");
    debootstrap(&root)?;
    copy_kinds_files(&parts.kind_module.join("images/base/files"), &root)?;
    choose_units(&root)?;
    install_programs(parts, &root)?;
    configure_containerd(&root)?;
    put_entrypoint_before(&root)?;
    import(docker, &root)?;
    build(
        docker,
        NAME,
        &[
            format!("FROM {NAME}-files"),
            "ENV container=docker".into(),
            "STOPSIGNAL SIGRTMIN+3".into(),
            r#"ENTRYPOINT [ "/usr/local/bin/entrypoint", "/sbin/init" ]"#.into(),
        ],
    )?;
    fs::remove_dir_all(&root)?;
    Ok(NAME.into())
}

/// The release of this machine's Debian, from the server that apt has it from.
fn debootstrap(root: &Path) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release")?;
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let suite = suite.context("/etc/os-release names no VERSION_CODENAME")?;
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"]);
    let targets = undo::output(&mut targets, "")?;
    let server = targets.lines().find_map(|line| line.split_once(' ').filter(|(name, _)| *name == suite));
    let (_, server) =
        server.with_context(|| format!("apt knows no server of {suite}: run `apt-get update`"))?;
    let mut command = contained("debootstrap");
    command.arg("--variant=minbase").arg(format!("--include={PACKAGES}")).arg(suite).arg(root).arg(server);
    undo::output(&mut command, "")?;
    for folder in NEEDLESS {
        let _ = fs::remove_dir_all(root.join(folder));
    }
    Ok(fs::create_dir_all(root.join("var/log"))?)
}

/// A module's own files are read-only: their content is copied, and programs are told by their folder.
fn copy_kinds_files(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            copy_kinds_files(&entry.path(), &target)?;
        } else {
            let _ = fs::remove_file(&target);
            fs::write(&target, fs::read(entry.path())?)?;
            let mode = if to.ends_with("bin") { 0o755 } else { 0o644 };
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

fn choose_units(root: &Path) -> Result<()> {
    for (folder, words) in UNWANTED {
        remove_links(&root.join(folder), words)?;
    }
    for entry in fs::read_dir(root.join("etc/systemd/system"))? {
        let folder = entry?.path();
        if folder.extension().is_some_and(|extension| extension == "wants") {
            remove_links(&folder, &[""])?;
        }
    }
    let journal = root.join("etc/systemd/journald.conf");
    let text = fs::read_to_string(&journal)?;
    fs::write(journal, text + "ReadKMsg=no\n")?;
    let init = root.join("usr/sbin/init");
    if !init.is_symlink() {
        std::os::unix::fs::symlink("/usr/lib/systemd/systemd", init)?;
    }
    let systemctl = |arguments: &[&str]| {
        undo::output(contained("chroot").arg(root).arg("systemctl").args(arguments), "").map(drop)
    };
    systemctl(&["enable", "kubelet.service", "containerd.service", "undo-mount-hacks.service"])?;
    // What that registers would be the machine's.
    systemctl(&["mask", "systemd-binfmt.service"])
}

fn remove_links(folder: &Path, words: &[&str]) -> Result<()> {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if words.iter().any(|word| name.contains(word)) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn install_programs(parts: &Parts, root: &Path) -> Result<()> {
    for folder in ["etc/kubernetes/manifests", "opt/cni/bin", "kind/manifests"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let programs = root.join("usr/local/bin");
    for name in ["containerd", "containerd-shim-runc-v2", "ctr"] {
        install(&parts.containerd.join(name), &programs.join(name))?;
    }
    install(&parts.crictl.join("crictl"), &programs.join("crictl"))?;
    for name in ["host-local", "loopback", "ptp", "portmap"] {
        install(&parts.cni.join(name), &root.join("opt/cni/bin").join(name))?;
    }
    Ok(())
}

/// Without the snapshotter for rootless nodes, which is not in this image; and without what a machine may not let it have.
fn configure_containerd(root: &Path) -> Result<()> {
    let file = root.join("etc/containerd/config.toml");
    let text = fs::read_to_string(&file)?;
    fs::write(
        &file,
        without_proxy_plugins(&text)
            .replace("restrict_oom_score_adj = false", "restrict_oom_score_adj = true"),
    )?;
    let spec = undo::output(contained("chroot").arg(root).args(["/usr/local/bin/ctr", "oci", "spec"]), "")?;
    let mut spec: Value = serde_json::from_str(&spec).context("ctr oci spec")?;
    spec["process"].as_object_mut().context("ctr oci spec has no process")?.remove("rlimits");
    // As kind has it: a pod sees the node's product files.
    spec["hooks"]["createContainer"] = json!([{ "path": "/kind/bin/mount-product-files.sh" }]);
    Ok(fs::write(root.join("etc/containerd/cri-base.json"), spec.to_string())?)
}

/// Leaves out the tables below `proxy_plugins`.
fn without_proxy_plugins(text: &str) -> String {
    let mut left_out = false;
    let kept = text.lines().filter(|line| {
        if line.starts_with('[') {
            left_out = line.starts_with("[proxy_plugins");
        }
        !left_out
    });
    kept.map(|line| format!("{line}\n")).collect()
}

fn put_entrypoint_before(root: &Path) -> Result<()> {
    let entrypoint = root.join("usr/local/bin/entrypoint");
    fs::rename(&entrypoint, entrypoint.with_extension("kind"))?;
    fs::write(&entrypoint, include_str!("entrypoint"))?;
    Ok(fs::set_permissions(entrypoint, fs::Permissions::from_mode(0o755))?)
}

/// The folder as an image.
fn import(docker: &Docker, root: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "--directory"]).arg(root).args(["--create", "."]);
    let mut tar = tar.stdout(Stdio::piped()).spawn().context("tar")?;
    let archive = tar.stdout.take().context("tar has no output")?;
    let mut import = docker.command("docker");
    let imported = import
        .args(["import", "-", &format!("{NAME}-files")])
        .stdin(archive)
        .stdout(Stdio::null())
        .status()?;
    let packed = tar.wait()?;
    ensure!(packed.success(), "tar: {packed}");
    if !imported.success() {
        bail!("docker import: {imported}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshotter_that_is_not_there_is_not_configured() {
        let text = "version = 2\n[proxy_plugins]\n# a\n[proxy_plugins.\"x\"]\n  type = \"snapshot\"\n[plugins]\n  a = 1\n";
        assert_eq!(without_proxy_plugins(text), "version = 2\n[plugins]\n  a = 1\n");
    }
}
