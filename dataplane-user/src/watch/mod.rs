//! Where the objects come from: the Kubernetes API, or a folder of manifests.
//!
//! The only place that names `kube`. A source tells [`crate::model::Change`]s over a channel, and nobody after it can
//! tell which source it was. A source never tells a deletion because of an error: what was known stays.

pub mod manifests;
pub mod names;
pub mod objects;
