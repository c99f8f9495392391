//! The text of a manifest file, turned into objects.
//!
//! Each document is read by itself, so that a mistake in one costs that one only (Z5) and is told with its line. Kinds
//! that the contract does not read are passed over. Pure: no file is opened here.

use crate::model::{Kind, Object, Reference};
use crate::watch::names::Names;
use crate::watch::objects::{Written, WrittenEndpointSlice, WrittenNode, WrittenService, WrittenServiceCidr};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_saphyr::Spanned;
use std::collections::HashMap;

/// What is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The file (or folder) cannot be read.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// A document is not YAML, or not a Kubernetes object.
    #[error("{file}:{line}: {reason}")]
    Document {
        /// The file.
        file: String,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// An object that cannot be used; the others of the file are (Z5).
    #[error("{file}:{line}: {object}: {reason}")]
    Object {
        /// The file.
        file: String,
        /// The line, counted from 1.
        line: usize,
        /// The object.
        object: Reference,
        /// Which field, and why.
        reason: String,
    },
    /// An object that is there twice: the first one counts.
    #[error("{file}:{line}: {object} is in {first} already, and that one counts: remove one of the two")]
    Duplicate {
        /// The file.
        file: String,
        /// The line, counted from 1.
        line: usize,
        /// The object.
        object: Reference,
        /// File and line of the one that counts.
        first: String,
    },
}

/// An object in a file, and the line where its document begins.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) line: usize,
    pub(super) object: Object,
}

/// The objects of a file, and what is wrong with it. `file` is its name in the errors.
///
/// Of an object that is there twice the first counts. Slices of headless Services are left out (F3); Services of
/// another proxy (F2) are not.
pub fn parse(text: &str, file: &str) -> (Vec<Object>, Vec<ManifestError>) {
    let (entries, mut errors) = read(text, file, &mut Names::default());
    let mut seen = HashMap::new();
    let mut objects = Vec::with_capacity(entries.len());
    for Entry { line, object } in entries {
        let reference = object.reference();
        if let Some(first) = seen.get(&reference) {
            let first = format!("{file}:{first}");
            errors.push(ManifestError::Duplicate { file: file.to_owned(), line, object: reference, first });
        } else {
            seen.insert(reference, line);
            objects.push(object);
        }
    }
    (objects, errors)
}

/// As [`parse`], with lines, and with objects that are there twice.
pub(super) fn read(text: &str, file: &str, names: &mut Names) -> (Vec<Entry>, Vec<ManifestError>) {
    let mut reader = Reader { file, names, entries: Vec::new(), errors: Vec::new() };
    for document in split(text.trim_start_matches('\u{feff}')) {
        reader.document(&document);
    }
    (reader.entries, reader.errors)
}

/// One document of a file.
struct Document<'a> {
    text: &'a str,
    /// Lines of the file before `text`.
    lines_before: usize,
    /// The first line with content, counted from 1 in the file.
    first_line: usize,
}

/// The documents that hold more than comments. `---` in the first column ends a document wherever it stands, even in
/// a block of text, so this needs no YAML parser; and after a mistake in one document the next is found.
fn split(text: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let (mut start, mut lines_before, mut first_line) = (0, 0, None);
    let (mut offset, mut number) = (0, 0);
    for line in text.split_inclusive('\n') {
        if is_marker(line, "---") || is_marker(line, "...") {
            if let Some(first_line) = first_line.take() {
                documents.push(Document { text: &text[start..offset], lines_before, first_line });
            }
            (start, lines_before) = (offset + 3, number);
        }
        let content = line.strip_prefix("---").unwrap_or(line).trim_start();
        let is_content = !(content.is_empty() || content.starts_with(['#', '%']) || is_marker(line, "..."));
        offset += line.len();
        number += 1;
        if is_content && first_line.is_none() {
            first_line = Some(number);
        }
    }
    if let Some(first_line) = first_line {
        documents.push(Document { text: &text[start..], lines_before, first_line });
    }
    documents
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    kind: Option<String>,
}

#[derive(Deserialize)]
struct List {
    items: Option<Vec<Spanned<Value>>>,
}

/// What a document says it is.
enum Meaning {
    Object(Kind),
    /// A list, with the kind of the items that do not say their own.
    List(Option<Kind>),
    Ignored,
}

impl Header {
    fn meaning(&self) -> Meaning {
        let (api_version, kind) =
            (self.api_version.as_deref().unwrap_or_default(), self.kind.as_deref().unwrap_or_default());
        if let Some(kind) = kind_of(api_version, kind) {
            return Meaning::Object(kind);
        }
        match kind.strip_suffix("List") {
            Some("") => Meaning::List(None),
            Some(item) => {
                kind_of(api_version, item).map_or(Meaning::Ignored, |kind| Meaning::List(Some(kind)))
            }
            None => Meaning::Ignored,
        }
    }
}

fn kind_of(api_version: &str, kind: &str) -> Option<Kind> {
    match (api_version, kind) {
        ("v1", "Service") => Some(Kind::Service),
        ("discovery.k8s.io/v1", "EndpointSlice") => Some(Kind::EndpointSlice),
        ("v1", "Node") => Some(Kind::Node),
        ("networking.k8s.io/v1" | "networking.k8s.io/v1beta1", "ServiceCIDR") => Some(Kind::ServiceCidr),
        _ => None,
    }
}

/// Why something of a document cannot be used.
struct Mistake {
    line: usize,
    object: Option<Reference>,
    reason: String,
}

struct Reader<'a> {
    file: &'a str,
    names: &'a mut Names,
    entries: Vec<Entry>,
    errors: Vec<ManifestError>,
}

impl Reader<'_> {
    fn document(&mut self, document: &Document<'_>) {
        let header: Header = match document.read() {
            Ok(header) => header,
            Err(mistake) => return self.complain(mistake),
        };
        if header.kind.is_none() || header.api_version.is_none() {
            let missing = if header.kind.is_none() { "kind" } else { "apiVersion" };
            return self.complain(Mistake {
                line: document.first_line,
                object: None,
                reason: format!("{missing} is missing: this is not a Kubernetes object"),
            });
        }
        match header.meaning() {
            Meaning::Object(kind) => self.object(kind, document.first_line, document),
            Meaning::List(kind) => match document.read::<List>() {
                Ok(list) => self.list(kind, document, list),
                Err(mistake) => self.complain(mistake),
            },
            Meaning::Ignored => {
                let kind = header.kind.unwrap_or_default();
                tracing::debug!(
                    file = self.file,
                    line = document.first_line,
                    kind,
                    "not a kind for the dataplane"
                );
            }
        }
    }

    fn list(&mut self, kind: Option<Kind>, document: &Document<'_>, list: List) {
        for item in list.items.unwrap_or_default() {
            let line = document.lines_before + usize::try_from(item.defined.line()).unwrap_or_default();
            let own = |name: &str| item.value.get(name).and_then(Value::as_str).map(str::to_owned);
            let header = Header { api_version: own("apiVersion"), kind: own("kind") };
            match (header.meaning(), kind) {
                (Meaning::Object(kind), _) => self.object(kind, line, &item.value),
                (Meaning::List(_) | Meaning::Ignored, Some(kind)) if header.kind.is_none() => {
                    self.object(kind, line, &item.value);
                }
                (Meaning::List(_) | Meaning::Ignored, _) => {
                    tracing::debug!(
                        file = self.file,
                        line,
                        kind = header.kind,
                        "not a kind for the dataplane"
                    );
                }
            }
        }
    }

    fn object(&mut self, kind: Kind, line: usize, source: &impl Source) {
        let converted = match kind {
            Kind::Service => source.convert::<WrittenService>(line, self.names),
            Kind::EndpointSlice => source.convert::<WrittenEndpointSlice>(line, self.names),
            Kind::Node => source.convert::<WrittenNode>(line, self.names),
            Kind::ServiceCidr => source.convert::<WrittenServiceCidr>(line, self.names),
        };
        match converted {
            Ok(Some(object)) => self.entries.push(Entry { line, object }),
            Ok(None) => {}
            Err(mistake) => self.complain(mistake),
        }
    }

    fn complain(&mut self, mistake: Mistake) {
        let (file, Mistake { line, object, reason }) = (self.file.to_owned(), mistake);
        self.errors.push(match object {
            Some(object) => ManifestError::Object { file, line, object, reason },
            None => ManifestError::Document { file, line, reason },
        });
    }
}

/// Something that an object can be read from: a document, or an item of a list.
trait Source {
    /// Reads it as a `T`. `line` is where it begins, for errors that have no line of their own.
    fn read_as<T: DeserializeOwned>(&self, line: usize) -> Result<T, Mistake>;

    /// The object, or nothing if it is a slice that does not count (F3).
    fn convert<W: Written>(&self, line: usize, names: &mut Names) -> Result<Option<Object>, Mistake> {
        let written: W = self.read_as(line).map_err(|mistake| {
            let object = self.read_as::<Named>(line).ok();
            let name = object.and_then(|named| named.metadata.object_name(W::NAMESPACED, names).ok());
            Mistake { object: name.map(|name| Reference { kind: W::KIND, name }), ..mistake }
        })?;
        if W::KIND == Kind::EndpointSlice && written.metadata().is_headless() {
            return Ok(None);
        }
        let object = written.reference(names).ok();
        written.convert(names).map(Some).map_err(|error| Mistake { line, object, reason: error.to_string() })
    }
}

/// An object of which only the name is read, to name it in an error.
#[derive(Deserialize)]
struct Named {
    metadata: crate::watch::objects::Metadata,
}

impl Document<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Mistake> {
        // The file is the operator's own, and may be large: no limits against hostile input.
        let options = serde_saphyr::options! { budget: None, with_snippet: false };
        serde_saphyr::from_str_with_options(self.text, options).map_err(|error| {
            let line = error.location().map_or(1, |location| location.line());
            let off = serde_saphyr::render_options! { snippets: serde_saphyr::SnippetMode::Off };
            Mistake {
                line: self.lines_before + usize::try_from(line).unwrap_or_default(),
                object: None,
                reason: error.render_with_options(off),
            }
        })
    }
}

impl Source for Document<'_> {
    fn read_as<T: DeserializeOwned>(&self, _line: usize) -> Result<T, Mistake> {
        self.read()
    }
}

impl Source for Value {
    fn read_as<T: DeserializeOwned>(&self, line: usize) -> Result<T, Mistake> {
        T::deserialize(self).map_err(|error| Mistake { line, object: None, reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Node, Service};

    fn only_error(text: &str) -> String {
        let (_, errors) = parse(text, "web.yaml");
        assert_eq!(errors.len(), 1, "{errors:?}");
        errors[0].to_string()
    }

    fn names(objects: &[Object]) -> Vec<String> {
        objects.iter().map(|object| object.reference().to_string()).collect()
    }

    fn service(object: &Object) -> &Service {
        match object {
            Object::Service(service) => service,
            Object::EndpointSlice(_) | Object::Node(_) | Object::ServiceCidr { .. } => panic!("{object:?}"),
        }
    }

    const SERVICE: &str =
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1}\n";

    #[test]
    fn a_file_holds_any_number_of_documents_of_any_kind() {
        let text = format!(
            "# a comment\n---\n{SERVICE}--- # another\n\n---\napiVersion: apps/v1\nkind: StatefulSet\nmetadata: {{name: web}}\nspec: {{replicas: 3}}\n\
             ---\napiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {{name: other}}\n\
             ---\napiVersion: v1\nkind: Node\nmetadata: {{name: n1, labels: {{topology.kubernetes.io/zone: z1}}}}\n...\n---\n{{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {{name: k}}, spec: {{cidrs: [10.96.0.0/16]}}}}"
        );
        let (objects, errors) = parse(&text, "web.yaml");
        assert_eq!(errors, []);
        assert_eq!(names(&objects), ["Service default/web", "Node n1", "ServiceCIDR k"]);
        let zone = Node { name: "n1".into(), zone: Some("z1".into()), ..Node::default() };
        assert_eq!(objects[1], Object::Node(zone));
    }

    #[test]
    fn json_is_read_as_well() {
        let text =
            r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"}}"#;
        let (objects, errors) = parse(text, "web.json");
        assert_eq!(errors, []);
        assert_eq!(names(&objects), ["Service shop/web"]);
    }

    #[test]
    fn lists_are_unpacked() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: a}\n\
                    - apiVersion: v1\n  kind: Service\n  metadata: {name: b}\n  spec: {ports: [{port: x}]}\n\
                    - {apiVersion: v1, kind: Pod, metadata: {name: c}}\n";
        let (objects, errors) = parse(text, "list.yaml");
        assert_eq!(names(&objects), ["Service default/a"]);
        assert_eq!(errors.len(), 1);
        assert!(errors[0].to_string().starts_with("list.yaml:7: Service default/b: "), "{}", errors[0]);

        let typed = r#"{"apiVersion": "v1", "kind": "ServiceList", "items": [{"metadata": {"name": "a"}}]}"#;
        let (objects, errors) = parse(typed, "list.json");
        assert_eq!(errors, []);
        assert_eq!(names(&objects), ["Service default/a"]);
    }

    /// Z5
    #[test]
    fn an_object_that_breaks_a_rule_costs_that_object_only_and_is_named_with_file_and_line() {
        let broken = "\n# broken\napiVersion: v1\nkind: Service\nmetadata: {name: broken}\nspec:\n  ports:\n  - port: 70000\n";
        let (objects, errors) = parse(&format!("{broken}---\n{SERVICE}"), "web.yaml");
        assert_eq!(names(&objects), ["Service default/web"]);
        let expected = "web.yaml:3: Service default/broken: spec.ports[0].port is 70000, which is not a port (1 to 65535)";
        assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), [expected]);
    }

    /// Z5
    #[test]
    fn a_field_of_the_wrong_type_is_named_with_its_line() {
        let text =
            format!("{SERVICE}---\n{}", SERVICE.replace("clusterIP: 10.96.0.1", "ports: [\n  {port: http}]"));
        let text = text.replacen("web", "good", 1);
        let (objects, _) = parse(&text, "web.yaml");
        assert_eq!(names(&objects), ["Service default/good"]);
        let error = only_error(&text);
        assert!(error.starts_with("web.yaml:10: Service default/web: "), "{error}");
    }

    #[test]
    fn a_document_that_is_not_yaml_is_told_with_its_line_and_the_others_are_read() {
        let text = format!(
            "{SERVICE}---\napiVersion: v1\nkind: Service\nmetadata: {{name: b\n---\n{}",
            SERVICE.replace("web", "c")
        );
        let (objects, errors) = parse(&text, "web.yaml");
        assert_eq!(names(&objects), ["Service default/web", "Service default/c"]);
        assert_eq!(errors.len(), 1);
        assert!(matches!(&errors[0], ManifestError::Document { line: 8..=9, .. }), "{:?}", errors[0]);
        assert_eq!(
            only_error("\n\nhello: world\n"),
            "web.yaml:3: kind is missing: this is not a Kubernetes object"
        );
        assert!(only_error("- a\n- b\n").starts_with("web.yaml:1: "));
    }

    #[test]
    fn of_an_object_that_is_there_twice_the_first_counts() {
        let text = format!("{SERVICE}---\n{}", SERVICE.replace("10.96.0.1", "10.96.0.2"));
        let (objects, errors) = parse(&text, "web.yaml");
        assert_eq!(service(&objects[0]).cluster_ips, ["10.96.0.1".parse::<std::net::IpAddr>().unwrap()]);
        let expected = "web.yaml:6: Service default/web is in web.yaml:1 already, and that one counts: remove one of the two";
        assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), [expected]);
    }

    /// F3
    #[test]
    fn slices_of_headless_services_are_left_out() {
        let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                    metadata: {name: s, labels: {service.kubernetes.io/headless: ''}}\n";
        assert_eq!(parse(text, "s.yaml"), (vec![], vec![]));
        // On a Service that label changes nothing.
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s, labels: {service.kubernetes.io/headless: ''}}\n";
        assert_eq!(parse(service, "s.yaml").0.len(), 1);
    }

    #[test]
    fn text_with_dashes_in_it_is_not_cut() {
        let text = format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c}}\ndata:\n  a: |\n    ---\n    kind: x\n---\n{SERVICE}"
        );
        let (objects, errors) = parse(&text.replace('\n', "\r\n"), "c.yaml");
        assert_eq!(errors, []);
        assert_eq!(names(&objects), ["Service default/web"]);
    }
}
