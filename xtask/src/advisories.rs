//! Whether a dependency is known to be unsafe: `cargo deny` against the database of advisories (RustSec).
//!
//! The database is a Git repository and no package, so a machine that reaches package registries alone cannot fetch it. Such a
//! machine is given a copy: `PORTOLAN_ADVISORY_DB` names a clone. Nothing is passed in silence: without either it is said that
//! nothing was checked.

use crate::command::{CommandLine, workspace};
use anyhow::{Context as _, Result, bail};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// Names the folder of a clone of the database.
const DATABASE: &str = "PORTOLAN_ADVISORY_DB";
/// What `cargo deny` calls its own copy of the database, by the address of that on GitHub.
const COPY: &str = "advisory-db-3157b0e258782691";

/// The verb: with the clone that is named, else with the database of the internet.
pub(crate) fn check() -> Result<()> {
    command()?.run()
}

/// How `cargo deny` is called.
fn command() -> Result<CommandLine> {
    let command = CommandLine::new("cargo deny --workspace --locked");
    Ok(match database()? {
        Some(clone) => {
            let settings = settings(&clone)?.display().to_string();
            command.arg("--offline").arg("--config").arg(settings).arg("check").arg("advisories")
        }
        None => command.arg("check").arg("advisories"),
    })
}

/// As one of the checks, where a clone is named; else a line that says that it is not done.
pub(crate) fn as_check() -> Result<Option<CommandLine>> {
    if database()?.is_some() {
        return command().map(Some);
    }
    println!(
        "=== advisories ===\nNOT CHECKED: {DATABASE} names no clone of https://github.com/rustsec/advisory-db; \
         `cargo xtask advisories` fetches it where GitHub can be reached"
    );
    Ok(None)
}

fn database() -> Result<Option<PathBuf>> {
    let Some(folder) = env::var_os(DATABASE).filter(|folder| !folder.is_empty()) else { return Ok(None) };
    let folder = PathBuf::from(folder);
    if !folder.join("crates").is_dir() {
        bail!(
            "{DATABASE} is {}, which is no clone of the database: it has no folder `crates`",
            folder.display()
        );
    }
    let folder = fs::canonicalize(&folder).with_context(|| folder.display().to_string())?;
    Ok(Some(folder))
}

/// `deny.toml` with the clone in the place of the copy that would be fetched, below `target`.
fn settings(clone: &Path) -> Result<PathBuf> {
    let written = workspace().join("deny.toml");
    let text = fs::read_to_string(&written).with_context(|| written.display().to_string())?;
    let folder = workspace().join("target/advisories");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let copy = folder.join(COPY);
    // Left from the last time, and perhaps another one.
    let _ = fs::remove_file(&copy);
    std::os::unix::fs::symlink(clone, &copy).with_context(|| copy.display().to_string())?;
    let file = folder.join("deny.toml");
    fs::write(&file, with_copies(&text, &folder)).with_context(|| file.display().to_string())?;
    Ok(file)
}

fn with_copies(settings: &str, folder: &Path) -> String {
    settings.replacen("[advisories]\n", &format!("[advisories]\ndb-path = \"{}\"\n", folder.display()), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_lead_to_the_clone_and_keep_the_rest() {
        let written = include_str!("../../deny.toml");
        let settings = with_copies(written, Path::new("/copies"));
        assert!(settings.contains("[advisories]\ndb-path = \"/copies\"\n"), "{settings}");
        assert_eq!(settings.lines().count(), written.lines().count() + 1);
    }
}
