//! Which tests cite which rule of the contract.
//!
//! A rule is a letter and a number (`T3`), defined in bold in `docs/contract.md`. A test cites it in the comment above it
//! or in its body; a golden case cites it in any of its files. Each rule must be cited by a test, and a test must cite no
//! rule that does not exist. All this goes by text: that a test fails when its rule is broken has to be seen by breaking it.

use crate::command::workspace;
use anyhow::{Context as _, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The letters of the contract's sections.
const SECTIONS: &str = "FTPSCHZDL";

/// A rule: its section's letter and its number in it.
type Rule = (char, u32);

/// Where tests are.
const PACKAGES: [&str; 5] =
    ["dataplane-common/src", "dataplane-ebpf/src", "dataplane-user/src", "tests", "xtask/src"];

/// Prints each rule with the tests that cite it, and what is wrong. Whether all is well.
pub(crate) fn check() -> Result<bool> {
    let rules = defined(&read(&workspace().join("docs/contract.md"))?);
    let mut files = Vec::new();
    for package in PACKAGES {
        files.extend(files_below(&workspace().join(package))?);
    }
    let mut tests: BTreeMap<Rule, BTreeSet<String>> = BTreeMap::new();
    let macros = macros_in(&files)?;
    for path in &files {
        for (name, rules) in citations_in(path, &macros)? {
            for rule in rules {
                tests.entry(rule).or_default().insert(name.clone());
            }
        }
    }
    for (rule, names) in tests.iter().filter(|(rule, _)| rules.contains(rule)) {
        let (letter, number) = rule;
        println!("{letter}{number:<3} {}", Vec::from_iter(names.iter().cloned()).join("\n     "));
    }
    let wrongs = wrongs(&rules, &tests);
    wrongs.iter().for_each(|wrong| println!("{wrong}"));
    println!("{} rules, each of which must be cited by a test; {} mistakes", rules.len(), wrongs.len());
    Ok(wrongs.is_empty())
}

/// Rules that no test cites, and tests that cite no rule that there is.
fn wrongs(rules: &BTreeSet<Rule>, tests: &BTreeMap<Rule, BTreeSet<String>>) -> Vec<String> {
    let bare = rules.iter().filter(|rule| !tests.contains_key(rule));
    let bare = bare.map(|(letter, number)| format!("{letter}{number} is cited by no test"));
    let unknown = tests.iter().filter(|(rule, _)| !rules.contains(rule));
    let unknown = unknown.map(|((letter, number), names)| {
        let names = Vec::from_iter(names.iter().cloned()).join(", ");
        format!("the contract has no rule {letter}{number}, which is cited by {names}")
    });
    bare.chain(unknown).collect()
}

/// The macros of these files that define tests.
fn macros_in(files: &[PathBuf]) -> Result<BTreeSet<String>> {
    let mut sources = Vec::new();
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")) {
        sources.push(read(path)?);
    }
    Ok(test_macros(&sources))
}

/// The rules that the contract defines: what stands in bold, alone or before a title.
fn defined(contract: &str) -> BTreeSet<Rule> {
    let bold = contract.split("**").skip(1).step_by(2);
    bold.filter_map(|text| text.split(' ').next().and_then(rule)).collect()
}

/// What the tests in a file cite, by the tests' names.
fn citations_in(path: &Path, macros: &BTreeSet<String>) -> Result<Vec<(String, BTreeSet<Rule>)>> {
    let place = path.strip_prefix(workspace()).unwrap_or(path);
    let kind = path.extension().and_then(|extension| extension.to_str());
    if kind == Some("rs") {
        let module = place.with_extension("").display().to_string();
        let tests = tests_of(&read(path)?, macros).into_iter();
        return Ok(tests.map(|(name, text)| (format!("{module} {name}"), cited(&text))).collect());
    }
    let is_case = place.starts_with("tests/golden") && matches!(kind, Some("yaml" | "yml" | "md" | "txt"));
    if !is_case {
        return Ok(Vec::new());
    }
    let case = place.parent().unwrap_or(place).display().to_string();
    Ok(vec![(case, cited(&read(path)?))])
}

/// The macros of Rust files whose expansion is a test, by themselves or by another of them.
fn test_macros(sources: &[String]) -> BTreeSet<String> {
    let mut all = Vec::new();
    for source in sources {
        let lines: Vec<&str> = source.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let name =
                line.trim_start().strip_prefix("macro_rules! ").and_then(|name| name.strip_suffix(" {"));
            all.extend(name.map(|name| (name.to_owned(), lines[at..=block_end(&lines, at)].to_vec())));
        }
    }
    let mut found = BTreeSet::new();
    loop {
        let calls_one = |line: &str| {
            let name = line.trim().strip_suffix("! {").and_then(|path| path.rsplit("::").next());
            name.is_some_and(|name| found.contains(name))
        };
        let defines = |lines: &[&str]| lines.iter().any(|line| is_test_attribute(line) || calls_one(line));
        let more: BTreeSet<_> =
            all.iter().filter(|(_, lines)| defines(lines)).map(|(name, _)| name.clone()).collect();
        if more == found {
            return found;
        }
        found = more;
    }
}

/// The tests of a Rust file: name, and text from the comment above to the closing brace. Functions with the attribute, and
/// those inside of these macros. Relies on rustfmt's layout.
fn tests_of(source: &str, macros: &BTreeSet<String>) -> Vec<(String, String)> {
    let lines: Vec<&str> = source.lines().collect();
    let mut tests = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let is_macro = line.trim().strip_suffix("! {").is_some_and(|name| macros.contains(name));
        if is_macro {
            let inside = at + 1..block_end(&lines, at);
            let functions =
                inside.filter(|at| indent(lines[*at]) == indent(line) + 4 && names_function(lines[*at]));
            tests.extend(functions.map(|at| test_at(&lines, at)));
        } else if is_test_attribute(line) {
            tests.push(test_at(&lines, at));
        }
    }
    tests
}

fn is_test_attribute(line: &str) -> bool {
    let attribute = line.trim_start();
    attribute.starts_with("#[") && attribute.split(['(', ']']).next().is_some_and(|a| a.ends_with("test"))
}

fn names_function(line: &str) -> bool {
    line.trim_start().starts_with("fn ") || line.trim_start().starts_with("async fn ")
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// The line that closes the block that is opened at or after a line.
fn block_end(lines: &[&str], at: usize) -> usize {
    let end = format!("{}}}", " ".repeat(indent(lines[at])));
    lines[at..].iter().position(|line| *line == end).map_or(lines.len() - 1, |n| at + n)
}

/// The test whose attribute or first line is at a line.
fn test_at(lines: &[&str], at: usize) -> (String, String) {
    let is_above = |line: &&str| line.trim_start().starts_with("//") || line.trim_start().starts_with("#[");
    let first = at - lines[..at].iter().rev().take_while(|line| is_above(line)).count();
    let last = block_end(lines, at);
    let name = lines[at..=last].iter().find_map(|line| line.split_once("fn ")?.1.split('(').next());
    (name.unwrap_or("?").to_owned(), lines[first..=last].join("\n"))
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
        let tests = tests_of(source, &BTreeSet::new());
        assert_eq!(tests.len(), 1);
        assert_eq!(tests[0].0, "a_name");
        assert_eq!(Vec::from_iter(cited(&tests[0].1)), [('P', 4), ('T', 1), ('T', 2)]);
    }

    #[test]
    fn a_test_that_a_macro_defines_is_one() {
        let definition = "macro_rules! both {\n    () => {\n        #[test]\n        fn f() {}\n    };\n}\nmacro_rules! other {\n    () => {};\n}\n";
        let macros = test_macros(&[definition.to_owned()]);
        assert_eq!(macros, BTreeSet::from(["both".to_owned()]));
        let source = "both! {\n    /// P4, P12: why\n    fn a_name(world) {\n        fn inner() {}\n        // T1\n    }\n}\n\nother! {\n    /// Z4\n    fn no_test(x) {\n    }\n}\n";
        let tests = tests_of(source, &macros);
        assert_eq!(tests.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a_name"]);
        assert_eq!(Vec::from_iter(cited(&tests[0].1)), [('P', 4), ('P', 12), ('T', 1)]);
    }

    /// What the laboratory's tests are written with must be seen, whatever becomes of its layout.
    #[test]
    fn no_test_of_the_laboratory_is_lost() {
        let files = files_below(&workspace().join("tests/netns")).unwrap();
        let macros = macros_in(&files).unwrap();
        assert!(macros.contains("everywhere"), "{macros:?}");
        let mut found = 0;
        for path in &files {
            let source = read(path).unwrap();
            let calls =
                macros.iter().map(|name| source.matches(&format!("\n{name}! {{")).count()).sum::<usize>();
            let attributes = source.matches("\n#[test]").count();
            let tests = tests_of(&source, &macros);
            let inside = tests.iter().filter(|(_, text)| !text.contains("#[test]")).count();
            assert!(inside >= calls && tests.len() >= calls + attributes, "{}: {tests:?}", path.display());
            found += inside;
        }
        assert!(found > 20, "{found} tests");
    }

    #[test]
    fn a_rule_without_a_test_and_a_test_without_a_rule_are_mistakes() {
        let rules = BTreeSet::from([('T', 1), ('T', 2)]);
        let citing = |rules: &[Rule]| {
            rules
                .iter()
                .map(|rule| (*rule, BTreeSet::from(["a_test".to_owned()])))
                .collect::<BTreeMap<_, _>>()
        };
        assert!(wrongs(&rules, &citing(&[('T', 1), ('T', 2)])).is_empty());
        assert_eq!(wrongs(&rules, &citing(&[('T', 1)])), ["T2 is cited by no test"]);
        let unknown = wrongs(&rules, &citing(&[('T', 1), ('T', 2), ('T', 9)]));
        // Not written out: this would be a citation of it.
        let name = format!("T{}", 9);
        assert_eq!(unknown, [format!("the contract has no rule {name}, which is cited by a_test")]);
    }

    #[test]
    fn a_range_of_rules_cites_each() {
        assert_eq!(Vec::from_iter(cited("(T1 to T3)")), [('T', 1), ('T', 2), ('T', 3)]);
        assert_eq!(Vec::from_iter(cited("C1 to T3")), [('C', 1), ('T', 3)]);
        assert_eq!(Vec::from_iter(cited("UTF8 HTTP2 P100 S_1")), []);
    }
}
