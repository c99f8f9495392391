//! Which version this is, and of which revision of the source, if whoever built it said so.

use std::sync::OnceLock;

static REVISION: OnceLock<&str> = OnceLock::new();

/// Notes the revision, once, at the start of the program.
pub fn set_revision(revision: Option<&'static str>) {
    if let Some(revision) = revision {
        let _ = REVISION.set(revision);
    }
}

/// The revision; empty if it is not known.
pub fn revision() -> &'static str {
    REVISION.get().copied().unwrap_or_default()
}

/// The version, and the revision in brackets if it is known.
pub fn text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| match revision() {
        "" => env!("CARGO_PKG_VERSION").to_owned(),
        revision => format!("{} ({revision})", env!("CARGO_PKG_VERSION")),
    })
}
