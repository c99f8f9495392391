//! One copy of each name: thousands of endpoints name the same nodes, zones, namespaces and ports.

use std::collections::HashSet;
use std::sync::Arc;

/// How many names are kept before those that nobody uses are looked for.
const FIRST_SWEEP: usize = 1024;

/// The names that were seen, each kept once.
#[derive(Debug, Default)]
pub struct Names {
    known: HashSet<Arc<str>>,
    sweep_at: usize,
}

impl Names {
    /// The shared copy of `name`.
    pub fn get(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        if self.known.len() >= self.sweep_at.max(FIRST_SWEEP) {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.sweep_at = self.known.len() * 2;
        }
        let name: Arc<str> = name.into();
        self.known.insert(name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_name_is_kept_once() {
        let mut names = Names::default();
        assert!(Arc::ptr_eq(&names.get("node-1"), &names.get("node-1")));
    }

    #[test]
    fn names_that_nobody_uses_are_forgotten() {
        let mut names = Names::default();
        let used = names.get("used");
        for number in 0..10 * FIRST_SWEEP {
            names.get(&format!("name-{number}"));
        }
        assert!(names.known.len() <= FIRST_SWEEP + 1);
        assert!(Arc::ptr_eq(&used, &names.get("used")));
    }
}
