//! The recorded numbers: `benches/exact.json`, by what each depends on.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// What `cargo xtask bless exact` sets.
const BLESS: &str = "PORTOLAN_BLESS";

/// Numbers by name.
pub(crate) type Numbers = BTreeMap<String, u64>;

/// Section, then what the numbers of a section depend on, then name.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
struct Record(BTreeMap<String, BTreeMap<String, Numbers>>);

fn file() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/exact.json"))
}

fn read() -> Record {
    let text = fs::read_to_string(file()).expect("benches/exact.json");
    serde_json::from_str(&text).expect("benches/exact.json: resolve conflicts by `cargo xtask bless exact`")
}

/// Writes past the test harness, which shows what a test prints only if it fails.
pub(crate) fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Holds numbers to the recorded ones: none may have grown. Under `cargo xtask bless exact`, records them.
///
/// Where nothing is recorded for `on`, they are held to `limit` alone, and that is said.
pub(crate) fn hold(section: &str, on: &str, numbers: &Numbers, limit: Option<u64>) {
    assert!(!numbers.is_empty(), "{section}: nothing was counted");
    if let Some(limit) = limit {
        for (name, is) in numbers {
            assert!(*is <= limit, "{section}, {name}: {is}, above the target of {limit}");
        }
    }
    if std::env::var_os(BLESS).is_some() {
        record(section, on, numbers);
        return;
    }
    let Some(recorded) = read().0.get(section).and_then(|section| section.get(on)).cloned() else {
        let limit = limit.map_or("nothing".to_owned(), |limit| format!("the target of {limit}"));
        tell(&format!(
            "NOT RECORDED: {section} on {on}. They are held to {limit} only; `cargo xtask bless exact` records them."
        ));
        return;
    };
    let (grown, shrunk) = compare(&recorded, numbers);
    if !shrunk.is_empty() {
        tell(&format!(
            "{section} on {on} are fewer than recorded: record them by `cargo xtask bless exact`\n{shrunk}"
        ));
    }
    assert!(
        grown.is_empty(),
        "{section} on {on} have grown:\n{grown}\
         If it is worth it, record the new numbers by `cargo xtask bless exact` in the same commit."
    );
}

fn record(section: &str, on: &str, numbers: &Numbers) {
    static LOCK: Mutex<()> = Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    // What cannot be read any more, such as the two sides of a conflict, is replaced.
    let text = fs::read_to_string(file()).unwrap_or_default();
    let mut record: Record = serde_json::from_str(&text).unwrap_or_default();
    record.0.entry(section.into()).or_default().insert(on.into(), numbers.clone());
    let text = serde_json::to_string_pretty(&record).expect("numbers can be written") + "\n";
    fs::write(file(), text).expect("benches/exact.json");
}

/// What is more than recorded or new, and what is less or gone; a line each.
fn compare(recorded: &Numbers, numbers: &Numbers) -> (String, String) {
    let (mut grown, mut shrunk) = (String::new(), String::new());
    for (name, is) in numbers {
        match recorded.get(name) {
            Some(was) if is > was => drop(writeln!(grown, "  {name}: {was} -> {is}")),
            Some(was) if is < was => drop(writeln!(shrunk, "  {name}: {was} -> {is}")),
            Some(_) => {}
            None => drop(writeln!(grown, "  {name}: new, {is}")),
        }
    }
    for (name, was) in recorded.iter().filter(|(name, _)| !numbers.contains_key(*name)) {
        let _ = writeln!(shrunk, "  {name}: {was} -> gone");
    }
    (grown, shrunk)
}

#[test]
fn growth_and_shrinking_are_told_apart() {
    let of = |numbers: &[(&str, u64)]| -> Numbers {
        numbers.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect()
    };
    let recorded = of(&[("same", 1), ("more", 2), ("less", 3), ("gone", 4)]);
    let (grown, shrunk) = compare(&recorded, &of(&[("same", 1), ("more", 3), ("less", 2), ("new", 5)]));
    assert_eq!(grown, "  more: 2 -> 3\n  new: new, 5\n");
    assert_eq!(shrunk, "  less: 3 -> 2\n  gone: 4 -> gone\n");
}
