//! Who may name what: the Kubernetes API is known to `watch` only, and aya to `kernel` only.

use std::fs;
use std::path::{Path, PathBuf};

/// The Rust files under `folder`.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Whether code (not a comment) names the crate: as a path's first part, or after `use` or `extern crate`.
fn names_crate(line: &str, name: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices(name).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + name.len()..]);
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let path = before.strip_suffix("::").unwrap_or(before);
        let is_first = !path.ends_with(|c| is_word(c) || c == '>');
        let is_used = path.trim_end().ends_with("use") || path.trim_end().ends_with("extern crate");
        is_first && (after.starts_with("::") || is_used && !after.starts_with(is_word))
    })
}

/// The lines of `src/` that name one of `crates` outside of `folder`.
fn trespasses(crates: &[&str], folder: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    assert!(files.len() > 10, "found no sources in {}", root.display());
    let mut found = Vec::new();
    for file in files {
        let name = file.strip_prefix(&root).expect("a path under src");
        if name.starts_with(folder) || name == Path::new(folder).with_extension("rs") {
            continue;
        }
        let text = fs::read_to_string(&file).expect("text");
        let named = |line: &str| crates.iter().any(|name| names_crate(line, name));
        let lines = text.lines().enumerate().filter(|(_, line)| named(line));
        found.extend(lines.map(|(number, line)| format!("{}:{}: {line}", name.display(), number + 1)));
    }
    found
}

#[test]
fn the_kubernetes_client_is_named_under_watch_only() {
    let crates = ["kube", "kube_client", "kube_core", "kube_runtime", "k8s_openapi"];
    assert_eq!(trespasses(&crates, "watch"), Vec::<String>::new());
}

#[test]
fn aya_is_named_under_kernel_only() {
    assert_eq!(trespasses(&["aya", "aya_log", "aya_obj"], "kernel"), Vec::<String>::new());
}

#[test]
fn a_crate_is_recognised_where_it_is_named() {
    for line in
        ["use kube::Api;", "    let a: kube::Client;", "use kube;", "pub use ::kube::api;", "use {kube::Api}"]
    {
        assert!(names_crate(line, "kube"), "{line}");
    }
    for line in [
        "use crate::watch::kube;",
        "// kube::Api",
        "let kube = 1;",
        "kubelet::x",
        "mod kube;",
        "watch::kube::watch()",
    ] {
        assert!(!names_crate(line, "kube"), "{line}");
    }
}
