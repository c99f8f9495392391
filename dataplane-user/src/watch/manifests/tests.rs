//! A folder that changes under the source's eyes.

use super::*;
use crate::model::{Kind, Object, Reference};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// A folder of this test's own, removed at its end.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("portolan-manifests-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(path.join("m")).unwrap();
        Self(path)
    }

    fn manifests(&self) -> PathBuf {
        self.0.join("m")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.manifests().join(name), text).unwrap();
    }

    /// As `kubectl` and most editors save: a new file, renamed over the old one.
    fn replace(&self, name: &str, text: &str) {
        let new = self.0.join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.manifests().join(name)).unwrap();
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Source {
    watch: Watch,
    changes: mpsc::Receiver<Change>,
}

impl Source {
    fn start(folder: &Path) -> Self {
        Self::with(folder, None)
    }

    fn with(folder: &Path, service_proxy_name: Option<&str>) -> Self {
        let (sender, changes) = mpsc::channel(100);
        let options =
            Options { node_name: "n1".into(), service_proxy_name: service_proxy_name.map(Into::into) };
        Self { watch: watch(folder.to_owned(), options, sender).unwrap(), changes }
    }

    /// The next change, in words.
    async fn next(&mut self) -> String {
        let change = tokio::time::timeout(Duration::from_secs(10), self.changes.recv()).await;
        match change.expect("no change within 10 s").unwrap() {
            Change::Applied(Object::Service(service)) => {
                let ports: Vec<_> = service.ports.iter().map(|port| port.port.to_string()).collect();
                format!("+{} {}", service.name, ports.join(","))
            }
            Change::Applied(object) => format!("+{}", object.reference()),
            Change::Deleted(Reference { name, .. }) => format!("-{name}"),
            Change::Replaced { kind, objects, .. } => {
                let mut names: Vec<_> =
                    objects.iter().map(|object| object.reference().name.to_string()).collect();
                names.sort();
                format!("={kind} {}", names.join(","))
            }
            Change::Unreadable { object, .. } => format!("?{object}"),
        }
    }

    /// Takes the first snapshot, and gives back its Services.
    async fn services(&mut self) -> String {
        let mut services = String::new();
        for _ in KINDS {
            let change = self.next().await;
            assert!(change.starts_with('='), "{change}");
            if let Some(names) = change.strip_prefix("=Service ") {
                services = names.to_owned();
            }
        }
        services
    }

    async fn nothing(&mut self) {
        let change = tokio::time::timeout(Duration::from_millis(400), self.changes.recv()).await;
        assert!(change.is_err(), "{change:?}");
    }
}

fn service(name: &str, port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n---\n"
    )
}

#[tokio::test]
async fn the_first_snapshot_tells_every_kind_once() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &service("a", "1"));
    folder.write("b.yml", &service("b", "2"));
    folder.write("c.json", r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}"#);
    folder.write("d.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n");
    folder.write("notes.txt", "hello");
    folder.write(".hidden.yaml", "hello");
    let mut source = Source::start(&folder.manifests());
    let mut told = Vec::new();
    for _ in KINDS {
        told.push(source.next().await);
    }
    assert_eq!(told, ["=Node n1", "=ServiceCIDR ", "=Service default/a,default/b", "=EndpointSlice "]);
    source.nothing().await;
    assert!(source.watch.status().is_synced());
    assert_eq!(source.watch.status().of(Kind::Service).error, None);
}

#[tokio::test]
async fn a_file_that_is_saved_in_place_is_read_again() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &(service("a", "1") + &service("b", "1")));
    let mut source = Source::start(&folder.manifests());
    assert_eq!(source.services().await, "default/a,default/b");
    folder.write("a.yaml", &(service("a", "2") + &service("c", "1")));
    let told = [source.next().await, source.next().await, source.next().await];
    assert_eq!(told, ["+default/a 2", "+default/c 1", "-default/b"]);
    // What did not change is not told again.
    folder.write("a.yaml", &(service("a", "2") + "# a comment\n" + &service("c", "3")));
    assert_eq!(source.next().await, "+default/c 3");
    source.nothing().await;
}

#[tokio::test]
async fn a_file_that_is_replaced_is_read_again() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &service("a", "1"));
    let mut source = Source::start(&folder.manifests());
    source.services().await;
    for port in ["2", "3", "4"] {
        folder.replace("a.yaml", &service("a", port));
        assert_eq!(source.next().await, format!("+default/a {port}"));
    }
}

#[tokio::test]
async fn files_that_come_and_go_are_followed() {
    let folder = TempFolder::new();
    let mut source = Source::start(&folder.manifests());
    assert_eq!(source.services().await, "");
    folder.write("a.yaml", &service("a", "1"));
    assert_eq!(source.next().await, "+default/a 1");
    folder.replace("b.yaml", &service("b", "1"));
    assert_eq!(source.next().await, "+default/b 1");
    fs::remove_file(folder.manifests().join("a.yaml")).unwrap();
    assert_eq!(source.next().await, "-default/a");
    fs::rename(folder.manifests().join("b.yaml"), folder.0.join("b.yaml")).unwrap();
    assert_eq!(source.next().await, "-default/b");
}

#[tokio::test]
async fn a_file_that_is_still_being_written_is_left_until_it_is_closed() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &(service("a", "1") + &service("b", "1")));
    let mut source = Source::start(&folder.manifests());
    source.services().await;
    let mut file = fs::File::create(folder.manifests().join("a.yaml")).unwrap();
    file.write_all(service("a", "1").as_bytes()).unwrap();
    // Something else changes meanwhile.
    folder.write("other.yaml", &service("other", "1"));
    assert_eq!(source.next().await, "+default/other 1");
    source.nothing().await;
    file.write_all(service("b", "2").as_bytes()).unwrap();
    drop(file);
    assert_eq!(source.next().await, "+default/b 2");
}

#[tokio::test]
async fn a_file_that_does_not_parse_keeps_its_last_good_version() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &(service("a", "1") + &service("b", "1")));
    let mut source = Source::start(&folder.manifests());
    source.services().await;
    folder.write("a.yaml", &(service("a", "2") + "kind: [oops\n"));
    source.nothing().await;
    let error = source.watch.status().of(Kind::Service).error.unwrap();
    assert!(error.contains("/a.yaml:"), "{error}");
    folder.write("a.yaml", &service("a", "3"));
    assert_eq!([source.next().await, source.next().await], ["+default/a 3", "-default/b"]);
    source.nothing().await;
    assert_eq!(source.watch.status().of(Kind::Service).error, None);
}

/// Z5
#[tokio::test]
async fn an_object_that_breaks_a_rule_keeps_its_last_good_version_and_costs_no_other() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &(service("a", "1") + &service("b", "1")));
    let mut source = Source::start(&folder.manifests());
    source.services().await;
    folder.write("a.yaml", &(service("a", "70000") + &service("b", "2")));
    assert_eq!([source.next().await, source.next().await], ["+default/b 2", "?Service default/a"]);
    // Its file is gone: so is the object.
    fs::remove_file(folder.manifests().join("a.yaml")).unwrap();
    assert_eq!([source.next().await, source.next().await], ["-default/a", "-default/b"]);
}

/// Z5
#[tokio::test]
async fn a_broken_file_at_the_start_costs_no_other() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &(service("a", "1") + "---\nkind: [oops\n"));
    folder.write("b.yaml", &(service("b", "0") + &service("c", "1")));
    let mut source = Source::start(&folder.manifests());
    assert_eq!(source.services().await, "default/a,default/c");
    assert_eq!(source.next().await, "?Service default/b");
}

#[tokio::test]
async fn of_an_object_in_two_files_the_first_by_name_counts() {
    let folder = TempFolder::new();
    folder.write("b.yaml", &service("a", "2"));
    folder.write("c.yaml", &service("a", "3"));
    let mut source = Source::start(&folder.manifests());
    assert_eq!(source.services().await, "default/a");
    let error = source.watch.status().of(Kind::Service).error.unwrap();
    assert!(
        error.contains("/c.yaml:1: Service default/a is in ") && error.contains("/b.yaml:1 already"),
        "{error}"
    );
    folder.write("a.yaml", &service("a", "1"));
    assert_eq!(source.next().await, "+default/a 1");
    fs::remove_file(folder.manifests().join("a.yaml")).unwrap();
    assert_eq!(source.next().await, "+default/a 2");
    fs::remove_file(folder.manifests().join("c.yaml")).unwrap();
    fs::remove_file(folder.manifests().join("b.yaml")).unwrap();
    assert_eq!(source.next().await, "-default/a");
}

/// F2
#[tokio::test]
async fn services_of_another_proxy_are_not_told_and_the_label_may_come_and_go() {
    let folder = TempFolder::new();
    let labelled = |name: &str| {
        service("a", "1").replace(
            "{name: a}",
            &format!("{{name: a, labels: {{service.kubernetes.io/service-proxy-name: {name}}}}}"),
        )
    };
    folder.write("a.yaml", &(labelled("portolan") + &service("b", "1")));
    let mut ours = Source::start(&folder.manifests());
    let mut named = Source::with(&folder.manifests(), Some("portolan"));
    assert_eq!([ours.services().await, named.services().await], ["default/b", "default/a"]);
    folder.write("a.yaml", &(service("a", "1") + &service("b", "1")));
    assert_eq!([ours.next().await, named.next().await], ["+default/a 1", "-default/a"]);
    folder.write("a.yaml", &(labelled("portolan") + &service("b", "1")));
    assert_eq!([ours.next().await, named.next().await], ["-default/a", "+default/a 1"]);
}

#[tokio::test]
async fn a_config_map_volume_is_followed() {
    let folder = TempFolder::new();
    let version = |name: &str, port: &str| {
        let path = folder.manifests().join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("a.yaml"), service("a", port)).unwrap();
    };
    let link =
        |target: &str, name: &str| std::os::unix::fs::symlink(target, folder.manifests().join(name)).unwrap();
    version("..1", "1");
    link("..1", "..data");
    link("..data/a.yaml", "a.yaml");
    let mut source = Source::start(&folder.manifests());
    assert_eq!(source.services().await, "default/a");
    version("..2", "2");
    link("..2", "..data_tmp");
    fs::rename(folder.manifests().join("..data_tmp"), folder.manifests().join("..data")).unwrap();
    fs::remove_dir_all(folder.manifests().join("..1")).unwrap();
    assert_eq!(source.next().await, "+default/a 2");
    source.nothing().await;
}

#[tokio::test]
async fn a_folder_that_vanishes_takes_nothing_with_it_and_is_found_again() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &service("a", "1"));
    let mut source = Source::start(&folder.manifests());
    source.services().await;
    let away = folder.0.join("away");
    fs::rename(folder.manifests(), &away).unwrap();
    source.nothing().await;
    assert!(source.watch.status().of(Kind::Service).error.is_some());
    fs::create_dir(folder.0.join("next")).unwrap();
    fs::write(folder.0.join("next/a.yaml"), service("a", "2")).unwrap();
    fs::rename(folder.0.join("next"), folder.manifests()).unwrap();
    assert_eq!(source.next().await, "+default/a 2");
    folder.write("a.yaml", &service("a", "3"));
    assert_eq!(source.next().await, "+default/a 3");
}

#[tokio::test]
async fn a_folder_that_is_none_is_refused() {
    let folder = TempFolder::new();
    let (sender, _changes) = mpsc::channel(1);
    let options = Options { node_name: "n1".into(), service_proxy_name: None };
    let error = watch(folder.0.join("none"), options, sender).unwrap_err().to_string();
    assert!(error.contains("/none: is no folder that can be listed: "), "{error}");
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Z5
#[tokio::test]
async fn a_file_that_everybody_can_write_is_named_and_costs_no_other() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &service("a", "1"));
    folder.write("b.yaml", &service("b", "2"));
    let open = folder.manifests().join("b.yaml");
    set_mode(&open, 0o666);
    let mut source = Source::start(&folder.manifests());
    assert_eq!(source.services().await, "default/a");
    let error = source.watch.status().of(Kind::Service).error.unwrap();
    assert!(error.contains("b.yaml: is not trusted: everybody can write it"), "{error}");
    set_mode(&open, 0o644);
    assert_eq!(source.next().await, "+default/b 2");
    // What was known of it stays when it becomes so.
    set_mode(&open, 0o666);
    folder.write("a.yaml", &service("a", "3"));
    assert_eq!(source.next().await, "+default/a 3");
    source.nothing().await;
}

#[tokio::test]
async fn a_folder_that_everybody_can_write_is_not_read() {
    let folder = TempFolder::new();
    folder.write("a.yaml", &service("a", "1"));
    set_mode(&folder.manifests(), 0o777);
    let mut source = Source::start(&folder.manifests());
    source.nothing().await;
    let error = source.watch.status().of(Kind::Service).error.unwrap();
    assert!(error.contains("is not trusted: everybody can write it") && error.contains("chmod"), "{error}");
    set_mode(&folder.manifests(), 0o755);
    folder.write("b.yaml", &service("b", "1"));
    assert_eq!(source.services().await, "default/a,default/b");
}
