//! What the tour says, and the score of what was as it should be.

use crate::lab::{Answer, Asked, Failure};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::IsTerminal;

/// Prints steps, what was seen in them, and whether it is right.
#[derive(Debug, Default)]
pub(crate) struct Narration {
    steps: usize,
    checks: usize,
    wrong: Vec<String>,
    title: String,
}

impl Narration {
    /// A line on what is being done.
    pub(crate) fn tell(&self, text: &str) {
        println!("  {text}");
    }

    /// The next step.
    pub(crate) fn step(&mut self, title: &str) {
        self.steps += 1;
        self.title = title.into();
        println!("\n{}", strong(&format!("{}. {title}", self.steps)));
    }

    /// What is asked, and what came back.
    pub(crate) fn seen(&self, asked: &str, answer: impl Display) {
        println!("  {asked:<44} → {answer}");
    }

    /// One request and its answer.
    pub(crate) fn asked(&self, asked: &str, answer: &Asked) {
        match answer {
            Ok(answer) => self.seen(asked, answer),
            Err(failure) => self.seen(asked, failure),
        }
    }

    /// A text of several lines.
    pub(crate) fn quote(&self, text: &str) {
        for line in text.trim_end().lines() {
            println!("    {line}");
        }
    }

    /// Says whether it is as it should be, and remembers if not.
    pub(crate) fn check(&mut self, right: bool, claim: &str) {
        self.checks += 1;
        if right {
            println!("  {} {claim}", green("✓"));
        } else {
            println!("  {} {}", red("✗"), red(&format!("should be: {claim}")));
            self.wrong.push(format!("{}. {}: {claim}", self.steps, self.title));
        }
    }

    /// A step that could not be finished.
    pub(crate) fn failed(&mut self, error: &anyhow::Error) {
        println!("  {} {error:#}", red("✗"));
        self.wrong.push(format!("{}. {}: {error:#}", self.steps, self.title));
    }

    /// Whether all was right so far.
    pub(crate) fn is_right(&self) -> bool {
        self.wrong.is_empty()
    }

    /// The score; whether all was right.
    pub(crate) fn finish(&self) -> bool {
        println!();
        if self.wrong.is_empty() {
            println!(
                "{}",
                green(&format!("{} steps, {} checks, all as it should be", self.steps, self.checks))
            );
            return true;
        }
        println!("{}", red(&format!("{} of {} checks failed:", self.wrong.len(), self.checks)));
        for line in &self.wrong {
            println!("  {line}");
        }
        false
    }
}

fn colour(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
}

fn strong(text: &str) -> String {
    colour("1", text)
}

fn green(text: &str) -> String {
    colour("32", text)
}

fn red(text: &str) -> String {
    colour("31", text)
}

/// So many failures are enough.
const FAILURES: usize = 3;

/// How often each pod answered, and the failures.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) answers: Vec<Answer>,
    pub(crate) failures: Vec<Failure>,
}

impl Tally {
    /// Asks so many times.
    pub(crate) fn of(count: usize, mut ask: impl FnMut() -> Asked) -> Self {
        let mut tally = Self::default();
        for _ in 0..count {
            // Where nothing answers, a few times are enough to know it.
            if tally.failures.len() >= FAILURES {
                break;
            }
            match ask() {
                Ok(answer) => tally.answers.push(answer),
                Err(failure) => tally.failures.push(failure),
            }
        }
        tally
    }

    /// Answers by pod.
    pub(crate) fn pods(&self) -> BTreeMap<&str, usize> {
        let mut pods = BTreeMap::new();
        for answer in &self.answers {
            *pods.entry(answer.pod.as_str()).or_default() += 1;
        }
        pods
    }
}

impl FromIterator<Asked> for Tally {
    fn from_iter<T: IntoIterator<Item = Asked>>(asked: T) -> Self {
        let mut tally = Self::default();
        for answer in asked {
            match answer {
                Ok(answer) => tally.answers.push(answer),
                Err(failure) => tally.failures.push(failure),
            }
        }
        tally
    }
}

impl Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts: Vec<_> = self.pods().iter().map(|(pod, count)| format!("{pod} ×{count}")).collect();
        if let Some(failure) = self.failures.first() {
            parts.push(format!("{} failed: {failure}", self.failures.len()));
        }
        f.write_str(&parts.join(", "))
    }
}
