//! Patterns of interface names: `*` stands for any characters, `?` for one.

use std::fmt;
use std::str::FromStr;

/// A pattern that a whole interface name must match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether `name` matches from its first to its last character.
    pub fn matches(&self, name: &str) -> bool {
        matches(self.0.as_bytes(), name.as_bytes())
    }
}

/// Greedy, going back to the last `*` only: no pattern costs more than the product of both lengths.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            Some(_) | None => {
                let Some((after, from)) = star else { return false };
                star = Some((after, from + 1));
                (p, n) = (after, from + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.contains(|c: char| c == '/' || c.is_whitespace()) {
            return Err(format!("`{text}` is no interface name or pattern such as eth*"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(name)
    }

    #[test]
    fn a_name_matches_itself_only() {
        assert!(matches("eth0", "eth0"));
        assert!(!matches("eth0", "eth01") && !matches("eth0", "eth") && !matches("eth0", "xeth0"));
    }

    #[test]
    fn a_star_stands_for_any_characters_and_a_question_mark_for_one() {
        assert!(matches("eth*", "eth0") && matches("eth*", "eth") && matches("*", "lo"));
        assert!(matches("en?s*f*", "enps3f0") && !matches("en?s*f*", "ens3f0"));
        assert!(matches("*0", "bond00") && matches("a*b*c", "axbxbc") && !matches("a*b*c", "axbxb"));
        assert!(matches("eth?", "eth1") && !matches("eth?", "eth") && !matches("eth?", "eth10"));
    }

    #[test]
    fn what_no_interface_can_be_called_is_refused() {
        assert!("".parse::<Pattern>().is_err() && "a b".parse::<Pattern>().is_err());
        assert!("a/b".parse::<Pattern>().is_err());
    }
}
