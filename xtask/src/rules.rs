//! Which tests cite which rule of the contract.
//!
//! A rule is a letter and a number (`T3`), defined in bold in `docs/contract.md`. A test cites it in the comment above it
//! or in its body; a golden case cites it in any of its files. It is a listing by text, for people to read: that a test
//! fails when its rule is broken has to be seen by breaking it.

use crate::command::workspace;
use anyhow::{Context as _, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The letters of the contract's sections.
const SECTIONS: &str = "FTPSCHZD";

/// A rule: its section's letter and its number in it.
type Rule = (char, u32);

/// Prints each rule with the tests that cite it.
pub(crate) fn list() -> Result<()> {
    let contract = read(&workspace().join("docs/contract.md"))?;
    let mut tests: BTreeMap<Rule, BTreeSet<String>> = BTreeMap::new();
    for package in ["dataplane-common/src", "dataplane-ebpf/src", "dataplane-user/src", "tests"] {
        for path in files_below(&workspace().join(package))? {
            for (name, rules) in citations_in(&path)? {
                for rule in rules {
                    tests.entry(rule).or_default().insert(name.clone());
                }
            }
        }
    }
    let rules = defined(&contract);
    let mut bare = Vec::new();
    for (letter, number) in &rules {
        match tests.get(&(*letter, *number)) {
            Some(names) => {
                println!("{letter}{number:<3} {}", Vec::from_iter(names.iter().cloned()).join("\n     "))
            }
            None => bare.push(format!("{letter}{number}")),
        }
    }
    println!(
        "{} of {} rules are cited by a test; no test cites {}",
        rules.len() - bare.len(),
        rules.len(),
        bare.join(" ")
    );
    for (letter, number) in tests.keys().filter(|rule| !rules.contains(rule)) {
        println!("{letter}{number} is cited, and the contract has no such rule");
    }
    Ok(())
}

/// The rules that the contract defines: what stands in bold, alone or before a title.
fn defined(contract: &str) -> BTreeSet<Rule> {
    let bold = contract.split("**").skip(1).step_by(2);
    bold.filter_map(|text| text.split(' ').next().and_then(rule)).collect()
}

/// What the tests in a file cite, by the tests' names.
fn citations_in(path: &Path) -> Result<Vec<(String, BTreeSet<Rule>)>> {
    let place = path.strip_prefix(workspace()).unwrap_or(path);
    let kind = path.extension().and_then(|extension| extension.to_str());
    if kind == Some("rs") {
        let module = place.with_extension("").display().to_string();
        let tests = tests_of(&read(path)?).into_iter();
        return Ok(tests.map(|(name, text)| (format!("{module} {name}"), cited(&text))).collect());
    }
    let is_case = place.starts_with("tests/golden") && matches!(kind, Some("yaml" | "yml" | "md" | "txt"));
    if !is_case {
        return Ok(Vec::new());
    }
    let case = place.parent().unwrap_or(place).display().to_string();
    Ok(vec![(case, cited(&read(path)?))])
}

/// The tests of a Rust file: name, and text from the comment above to the closing brace. Relies on rustfmt's layout.
fn tests_of(source: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = source.lines().collect();
    let mut tests = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let attribute = line.trim_start();
        let is_test = attribute.starts_with("#[")
            && attribute.split(['(', ']']).next().is_some_and(|a| a.ends_with("test"));
        if !is_test {
            continue;
        }
        let is_above =
            |line: &&str| line.trim_start().starts_with("//") || line.trim_start().starts_with("#[");
        let first = at - lines[..at].iter().rev().take_while(|line| is_above(line)).count();
        let indent = &line[..line.len() - attribute.len()];
        let end = format!("{indent}}}");
        let last = lines[at..].iter().position(|line| *line == end).map_or(lines.len() - 1, |n| at + n);
        let name = lines[at..=last].iter().find_map(|line| line.split_once("fn ")?.1.split('(').next());
        tests.push((name.unwrap_or("?").to_owned(), lines[first..=last].join("\n")));
    }
    tests
}

/// The rules a text names; `T1 to T5` names five.
fn cited(text: &str) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    let mut before: [Option<&str>; 2] = [None, None];
    for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty()) {
        if let Some((letter, number)) = rule(word) {
            let from = match before {
                [Some(first), Some("to")] => rule(first).filter(|(l, n)| *l == letter && *n <= number),
                _ => None,
            };
            rules.extend((from.map_or(number, |(_, n)| n)..=number).map(|n| (letter, n)));
        }
        before = [before[1], Some(word)];
    }
    rules
}

/// A word that is the name of a rule.
fn rule(word: &str) -> Option<Rule> {
    let letter = word.chars().next().filter(|letter| SECTIONS.contains(*letter))?;
    let digits = &word[1..];
    let plain = (1..=2).contains(&digits.len()) && digits.chars().all(|c| c.is_ascii_digit());
    plain.then(|| digits.parse().ok().map(|number| (letter, number)))?
}

/// All files below a folder, in the order of their names.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    paths.sort();
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    // Some cases are files that are not well-formed on purpose.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_defines_its_rules_in_bold() {
        let contract = "- **F1** A Service\n| **P17** | x |\n- **S1 sessionAffinity ClientIP**: y\n**not** a rule, nor P3";
        assert_eq!(Vec::from_iter(defined(contract)), [('F', 1), ('P', 17), ('S', 1)]);
    }

    #[test]
    fn a_test_cites_what_stands_above_it_and_in_it() {
        let source = "/// P1\nfn other() {}\n\n    /// T1, T2\n    #[test]\n    fn a_name() {\n        // P4\n    }\n    // Z4\n";
        let tests = tests_of(source);
        assert_eq!(tests.len(), 1);
        assert_eq!(tests[0].0, "a_name");
        assert_eq!(Vec::from_iter(cited(&tests[0].1)), [('P', 4), ('T', 1), ('T', 2)]);
    }

    #[test]
    fn a_range_of_rules_cites_each() {
        assert_eq!(Vec::from_iter(cited("(T1 to T3)")), [('T', 1), ('T', 2), ('T', 3)]);
        assert_eq!(Vec::from_iter(cited("C1 to T3")), [('C', 1), ('T', 3)]);
        assert_eq!(Vec::from_iter(cited("UTF8 HTTP2 P100 S_1")), []);
    }
}
