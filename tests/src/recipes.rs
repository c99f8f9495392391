//! The commands of the documentation, read where they stand, so that tests run them as a reader would.

use std::fs;
use std::path::Path;

/// The lines of the first block of code of a page of `docs/` below a heading, or below a line that ends in a colon.
///
/// # Panics
/// If there is none: the page was changed, and its test was not.
pub fn commands(page: &str, below: &str) -> String {
    let text = page_of(page);
    let (_, rest) =
        text.split_once(&format!("\n{below}\n")).unwrap_or_else(|| panic!("{page} has no `{below}`"));
    block(rest).unwrap_or_else(|| panic!("{page} has no code below `{below}`"))
}

/// The lines of the block of code of a page that begins with these words.
///
/// # Panics
/// If there is none.
pub fn commands_from(page: &str, beginning: &str) -> String {
    let text = page_of(page);
    let at = text.find(&format!("```\n{beginning}")).unwrap_or_else(|| panic!("{page}: no `{beginning}`"));
    block(&text[at..]).unwrap_or_else(|| panic!("{page}: the code of `{beginning}` has no end"))
}

fn page_of(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    format!("\n{text}")
}

fn block(text: &str) -> Option<String> {
    let mut parts = text.split("```");
    let block = parts.nth(1)?;
    parts.next()?;
    Some(block.trim().lines().map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_code_is_found_by_what_stands_above_it_and_by_its_beginning() {
        assert_eq!(block("text\n```\na\n  b\n```\nmore\n```\nc\n```\n").unwrap(), "a\n  b\n");
        assert_eq!(block("```\nno end\n"), None);
        assert!(commands("take-over.md", "## One node first").starts_with("kubectl label node NODE"));
        let clean_up = "kubectl apply -f deploy/cleanup.yaml";
        assert!(commands_from("uninstall.md", clean_up).contains("kubectl delete -f deploy/cleanup.yaml"));
    }
}
