//! The map table of `ARCHITECTURE.md` is the one that the programs are built with.

use dataplane_common::tables::ALL;

const ARCHITECTURE: &str = include_str!("../../ARCHITECTURE.md");

#[test]
fn the_documented_tables_are_the_real_ones() {
    let section = ARCHITECTURE.split("\n## ").find(|section| section.starts_with("The tables")).unwrap();
    let documented: Vec<_> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[0].trim_end_matches('`').to_owned(), cells[1].to_owned(), cells[2].parse().unwrap())
        })
        .collect();
    let real: Vec<_> =
        ALL.iter().map(|(name, kind, entries)| ((*name).to_owned(), format!("{kind:?}"), *entries)).collect();
    assert_eq!(documented, real, "the table in ARCHITECTURE.md against dataplane-common/src/tables.rs");
}
