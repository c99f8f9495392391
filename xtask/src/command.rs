//! Commands as data: they can be shown to a person before, or instead of, being run.

use anyhow::{Context as _, Result, bail};
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program with its arguments and the variables it is given besides the inherited ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CommandLine {
    variables: Vec<(String, String)>,
    words: Vec<String>,
}

impl CommandLine {
    /// From words that are separated by single blanks and hold none themselves.
    pub(crate) fn new(words: &str) -> Self {
        Self { variables: Vec::new(), words: words.split(' ').map(str::to_owned).collect() }
    }

    /// A program by its path.
    pub(crate) fn of(program: &Path) -> Self {
        Self { variables: Vec::new(), words: vec![program.display().to_string()] }
    }

    /// With more arguments, whatever they hold.
    pub(crate) fn args(self, words: &[&str]) -> Self {
        words.iter().fold(self, |command, word| command.arg(*word))
    }

    /// With one more argument, whatever it holds.
    pub(crate) fn arg(mut self, word: impl Into<String>) -> Self {
        self.words.push(word.into());
        self
    }

    /// With a variable set; `$PATH` in the value means what it means in a shell.
    pub(crate) fn variable(mut self, name: &str, value: impl Into<String>) -> Self {
        self.variables.push((name.to_owned(), value.into()));
        self
    }

    /// With the revision of the workspace, which the agent then tells with its version.
    pub(crate) fn with_revision(self) -> Self {
        match revision() {
            Some(revision) => self.variable(REVISION, revision),
            None => self,
        }
    }

    /// The same command as the arguments of another.
    pub(crate) fn within(mut self, outer: impl IntoIterator<Item = String>) -> Self {
        self.words.splice(0..0, outer);
        self
    }

    /// The same command for a user who is not root; `sudo` drops variables, so they go behind it.
    pub(crate) fn with_sudo(&self) -> String {
        format!("sudo {self}")
    }

    /// As `std` runs it, in the workspace.
    pub(crate) fn command(&self) -> Command {
        let mut command = program(&self.words[0]);
        let path = search_path().to_string_lossy().into_owned();
        let variables = self.variables.iter().map(|(name, value)| (name, value.replace("$PATH", &path)));
        command.args(&self.words[1..]).envs(variables);
        command
    }

    /// Runs it with its output shown; another exit status than 0 is an error.
    pub(crate) fn run(&self) -> Result<()> {
        let status = self.command().status().with_context(|| format!("cannot run `{self}`"))?;
        if !status.success() {
            bail!("`{self}` ended with {status}");
        }
        Ok(())
    }
}

impl fmt::Display for CommandLine {
    /// As a person would type it into a shell.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for (name, value) in &self.variables {
            write!(f, "{gap}{name}={}", quoted(value))?;
            gap = " ";
        }
        for word in &self.words {
            write!(f, "{gap}{}", quoted(word))?;
            gap = " ";
        }
        Ok(())
    }
}

/// A word as the shell reads it back. `$` stays live, so that `$PATH` may stand in a variable's value.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%$".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

/// The root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// The variable by which whoever builds tells the revision.
pub(crate) const REVISION: &str = "PORTOLAN_REVISION";

/// Which commit the workspace is at, and whether it was changed since; none where there is no repository, as in an archive of the
/// source, unless the environment tells.
pub(crate) fn revision() -> Option<String> {
    if let Ok(told) = env::var(REVISION) {
        return Some(told).filter(|revision| !revision.is_empty());
    }
    let output = Command::new("git")
        .current_dir(workspace())
        .args(["describe", "--always", "--dirty", "--abbrev=12", "--tags"])
        .output()
        .ok()?;
    let revision = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !revision.is_empty()).then_some(revision)
}

/// The folder this program was built into: the others of the same profile are beside it.
pub(crate) fn target_folder() -> Result<PathBuf> {
    let own = env::current_exe().context("cannot tell where this program lies")?;
    Ok(own.parent().context("this program lies nowhere")?.to_owned())
}

/// The folder that the folders of all profiles and targets lie in.
pub(crate) fn all_targets() -> Result<PathBuf> {
    Ok(target_folder()?.parent().context("the target folder lies nowhere")?.to_owned())
}

/// A program to be run in the workspace, without what cargo told this package about itself.
pub(crate) fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command.current_dir(workspace()).env("PATH", search_path());
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// PATH with the folders where administrators' and cargo's programs lie, and with the Go that `setup` fetched.
///
/// PATH stays as it is where it names them already: a change of it makes cargo compile the eBPF programs again.
pub(crate) fn search_path() -> OsString {
    let inherited = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&inherited).collect();
    let before = folders.len();
    if let Some(go) = crate::setup::fetched_go() {
        folders.insert(0, go);
    }
    for folder in [cargo_home().join("bin"), "/usr/sbin".into(), "/sbin".into()] {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    if folders.len() == before {
        return inherited;
    }
    env::join_paths(folders).unwrap_or(inherited)
}

/// Where a program lies, if PATH leads to it.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    env::split_paths(&search_path()).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Cargo's own folder.
pub(crate) fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from)
}

/// The user's folder.
pub(crate) fn home() -> PathBuf {
    env::var_os("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_a_shell_would_read_it() {
        let command = CommandLine::new("cargo install thing").variable("PATH", "/a/b:$PATH").arg("two words");
        assert_eq!(command.to_string(), "PATH=/a/b:$PATH cargo install thing 'two words'");
        assert_eq!(command.with_sudo(), "sudo PATH=/a/b:$PATH cargo install thing 'two words'");
    }
}
