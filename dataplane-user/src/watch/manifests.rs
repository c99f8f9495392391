//! Manifests: the YAML (or JSON) that one would give to `kubectl apply`.

mod documents;

pub use documents::{ManifestError, parse};
