//! Kubernetes in the form of a release, and the node image that `kind build node-image` makes of it.

use super::archive::Archive;
use super::{Parts, build, install, module_folder};
use crate::kind::docker::Docker;
use crate::kind::programs::KUBERNETES;
use crate::kind::undo;
use anyhow::{Context as _, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// What kind's build makes is called so for a moment.
const NAME: &str = "portolan/node-full:1";
/// What a release has an archive of each, in this order.
const COMPONENTS: [&str; 4] = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy"];

/// Adds Kubernetes to a base image; what comes out has this name.
pub(super) fn add(docker: &Docker, parts: &Parts, base: &str, version: &str, name: &str) -> Result<()> {
    let release = parts.work.join("release");
    let programs = release.join("kubernetes/server/bin");
    fs::create_dir_all(&programs)?;
    fs::write(release.join("kubernetes/version"), format!("{version}\n"))?;
    for name in ["kubeadm", "kubelet", "kubectl"] {
        install(&parts.kubernetes.join(name), &programs.join(name))?;
    }
    let names = image_names(parts, version)?;
    for component in COMPONENTS {
        let archive = archive_of(component, parts, &names)?;
        archive.write(&programs.join(format!("{component}.tar")))?;
    }
    let arch = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
    let file = parts.work.join(format!("kubernetes-server-linux-{arch}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.env("GZIP", "-1")
        .args(["--create", "--gzip", "--directory"])
        .arg(&release)
        .arg("--file")
        .arg(&file)
        .arg("kubernetes");
    undo::output(&mut tar, "")?;
    fs::remove_dir_all(&release)?;
    let mut of_kind = docker.command(&parts.kind);
    of_kind.args(["build", "node-image", "--type", "file", "--base-image", base, "--image", NAME]).arg(&file);
    undo::output(&mut of_kind, "")?;
    // Its storage driver is a stand-in: without it, kind takes a storage class alone.
    let lines = [format!("FROM {NAME}"), "RUN rm -f /kind/manifests/default-storage.yaml".into()];
    build(docker, name, &lines)?;
    docker.docker(&["rmi", NAME]).map(drop)
}

/// The images that a node needs, by the names that kubeadm, the container runtime and kind call them.
fn image_names(parts: &Parts, version: &str) -> Result<Vec<String>> {
    let mut list = Command::new(parts.kubernetes.join("kubeadm"));
    let listed = undo::output(list.args(["config", "images", "list", "--kubernetes-version", version]), "")?;
    let mut names: Vec<String> = listed.lines().map(str::to_owned).collect();
    let runtime = fs::read_to_string(parts.kind_module.join("images/base/files/etc/containerd/config.toml"))?;
    names.extend(quoted_after(&runtime, "sandbox_image = "));
    for (file, mark) in [("const_cni.go", "const kindnetdImage = "), ("const_storage.go", "const storage")] {
        let source = fs::read_to_string(parts.kind_module.join("pkg/build/nodeimage").join(file))?;
        names.extend(quoted_after(&source, mark).filter(|name| name.contains('/')));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// What stands in quotes on the lines that begin so.
fn quoted_after<'a>(text: &'a str, mark: &'a str) -> impl Iterator<Item = String> + 'a {
    let lines = text.lines().filter(move |line| line.trim_start().starts_with(mark));
    lines.filter_map(|line| line.split('"').nth(1).map(str::to_owned))
}

/// The last part of an image's name, without its tag.
fn short(name: &str) -> &str {
    let name = name.rsplit('/').next().unwrap_or(name);
    name.split(':').next().unwrap_or(name)
}

/// The archive of a component. That of the scheduler carries everything that a release has no place for.
fn archive_of(component: &str, parts: &Parts, names: &[String]) -> Result<Archive> {
    let mut archive = Archive::default();
    let own = names
        .iter()
        .find(|name| short(name) == component)
        .with_context(|| format!("no image of {component}"))?;
    let path = format!("usr/local/bin/{component}");
    let layer = archive.layer(&[(&parts.kubernetes.join(component), &path)])?;
    archive.image(own, &layer, &[]);
    if component != "kube-scheduler" {
        return Ok(archive);
    }
    let etcd = archive.layer(&[(&parts.kubernetes.join("etcd"), "usr/local/bin/etcd")])?;
    let coredns = archive.layer(&[(&parts.coredns.join("coredns"), "coredns")])?;
    let pause = archive.layer(&[(&compiled_pause(&parts.work)?, "pause")])?;
    for name in names.iter().filter(|name| !COMPONENTS.contains(&short(name))) {
        match short(name) {
            "etcd" => archive.image(name, &etcd, &[]),
            "coredns" => archive.image(name, &coredns, &["/coredns"]),
            // The pause image; and kind's pod network and storage driver, which it insists on and these clusters do not use.
            _ => archive.image(name, &pause, &["/pause"]),
        }
    }
    Ok(archive)
}

/// What holds the namespaces of a pod, from the source in Kubernetes' own module.
fn compiled_pause(work: &Path) -> Result<std::path::PathBuf> {
    let source = module_folder(KUBERNETES, "k8s.io/kubernetes")?.join("build/pause/linux/pause.c");
    let program = work.join("pause");
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-static", "-s", "-DVERSION=\"portolan\"", "-o"]).arg(&program).arg(source);
    undo::output(&mut compile, "")?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images_are_read_where_they_are_written() {
        let text = "// const storageImage\nconst storageProvisionerImage = \"docker.io/kindest/a:v1\"\n  sandbox_image = \"registry.k8s.io/pause:3.10\"\n";
        assert_eq!(quoted_after(text, "const storage").collect::<Vec<_>>(), ["docker.io/kindest/a:v1"]);
        assert_eq!(
            quoted_after(text, "sandbox_image = ").collect::<Vec<_>>(),
            ["registry.k8s.io/pause:3.10"]
        );
        assert_eq!(short("registry.k8s.io/coredns/coredns:v1.14"), "coredns");
    }
}
