//! What the documentation and the files for monitoring say of the code: held against it, so that neither names what is not there, and
//! nothing that an operator meets is left out.

#[cfg(test)]
mod tests {
    use crate::deploy::{file, objects_of};
    use dataplane_common::drop::Reason;
    use dataplane_user::compile::ComplaintReason;
    use dataplane_user::metrics::family::{self, Family, Kind};
    use dataplane_user::watch::events::reason;
    use serde_json::Value;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    fn page(name: &str) -> String {
        fs::read_to_string(root().join("docs").join(name)).unwrap()
    }

    /// Name and expression of each alert.
    fn alerts() -> Vec<(String, String)> {
        let rules = objects_of("monitoring/alerts.yaml").unwrap();
        let groups = rules[0]["spec"]["groups"].as_array().unwrap();
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        rules.map(|rule| (text(&rule["alert"]), text(&rule["expr"]))).collect()
    }

    fn headings(text: &str) -> BTreeSet<&str> {
        text.lines().filter_map(|line| line.strip_prefix("### ")).map(|name| name.trim_matches('`')).collect()
    }

    #[test]
    fn every_reason_event_and_alert_has_its_paragraph_and_no_other() {
        let text = page("troubleshooting.md");
        let alerts: Vec<_> = alerts().into_iter().map(|(name, _)| name).collect();
        let mut all: BTreeSet<&str> = Reason::ALL.iter().map(|reason| reason.label()).collect();
        all.extend(ComplaintReason::ALL.iter().map(|reason| reason.label()));
        all.extend(reason::ALL);
        all.extend(alerts.iter().map(String::as_str));
        assert_eq!(headings(&text), all);
        for reason in Reason::ALL {
            assert!(
                text.contains(reason.help().trim()),
                "{} is explained otherwise than by its help",
                reason.label()
            );
        }
    }

    /// The metrics that an expression names, each with the labels that it selects by.
    fn selectors(expression: &str) -> Vec<(String, Vec<String>)> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let mut found = Vec::new();
        let mut rest = expression;
        while let Some(at) = rest.find(is_name) {
            let tail = &rest[at..];
            let end = tail.find(|c| !is_name(c)).unwrap_or(tail.len());
            let (name, after) = tail.split_at(end);
            rest = after;
            if ["portolan_", "kubeproxy_", "process_"].iter().any(|prefix| name.starts_with(prefix)) {
                let labels = after.strip_prefix('{').and_then(|labels| labels.split_once('}'));
                let labels = labels.map_or(Vec::new(), |(labels, _)| {
                    labels
                        .split(',')
                        .map(|label| label.split(['=', '!']).next().unwrap().to_owned())
                        .collect()
                });
                found.push((name.to_owned(), labels));
            }
        }
        found
    }

    fn family(name: &str) -> Option<&'static Family> {
        let is_it = |family: &&Family| match family.kind {
            Kind::Histogram => {
                ["_bucket", "_sum", "_count"].iter().any(|end| *name == format!("{}{end}", family.name))
            }
            Kind::Counter | Kind::Gauge => family.name == name,
        };
        family::ALL.iter().find(is_it)
    }

    #[track_caller]
    fn assert_is_about_metrics_that_there_are(expression: &str) {
        let selectors = selectors(expression);
        assert!(!selectors.is_empty(), "{expression}");
        let pairs = [('(', ')'), ('[', ']'), ('{', '}')];
        for (open, close) in pairs {
            assert_eq!(expression.matches(open).count(), expression.matches(close).count(), "{expression}");
        }
        for (name, labels) in selectors {
            let family = family(&name).unwrap_or_else(|| panic!("there is no metric {name}: {expression}"));
            for label in labels {
                // What Prometheus adds, and what a histogram's buckets have.
                let known = family.labels.contains(&label.as_str())
                    || ["instance", "job", "le"].contains(&label.as_str());
                assert!(known, "{name} has no label {label}: {expression}");
            }
        }
    }

    /// H3
    #[test]
    fn alerts_and_dashboard_are_about_metrics_that_there_are() {
        let alerts = alerts();
        assert!(alerts.len() > 10);
        alerts.iter().for_each(|(_, expression)| assert_is_about_metrics_that_there_are(expression));
        let reasons = alerts
            .iter()
            .filter_map(|(_, it)| it.split_once("portolan_reasons_total{reason=\"")?.1.split('"').next());
        for reason in reasons {
            assert!(Reason::ALL.iter().any(|known| known.label() == reason), "{reason}");
        }
        let text = fs::read_to_string(file("monitoring/dashboard.json")).unwrap();
        let dashboard: Value = serde_json::from_str(&text).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        assert!(panels.len() > 10);
        for target in panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap()) {
            assert_is_about_metrics_that_there_are(target["expr"].as_str().unwrap());
        }
    }

    #[test]
    fn selectors_are_found_in_expressions() {
        let found =
            selectors("rate(portolan_reasons_total{reason=\"a\",instance=~\"b\"}[5m]) / portolan_healthy");
        let labels = ["reason", "instance"].map(str::to_owned).to_vec();
        let expected =
            [("portolan_reasons_total".to_owned(), labels), ("portolan_healthy".to_owned(), Vec::new())];
        assert_eq!(found, expected);
    }

    /// Links between the pages, and to files of the repository, lead somewhere.
    #[test]
    fn links_in_the_documentation_lead_somewhere() {
        let mut pages: Vec<_> =
            ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"].map(|name| root().join(name)).into();
        let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
        let mut links = 0;
        for page in pages {
            let text = fs::read_to_string(&page).unwrap();
            for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let target = link.split('#').next().unwrap();
                if target.is_empty() || target.starts_with("http") {
                    continue;
                }
                links += 1;
                assert!(page.parent().unwrap().join(target).exists(), "{}: {link}", page.display());
            }
        }
        assert!(links > 20, "{links} links");
    }

    /// Every verb and long flag of `portolan` that a page names is one.
    #[test]
    fn verbs_and_flags_in_the_documentation_are_those_of_the_program() {
        use clap::CommandFactory as _;
        let command = dataplane_user::config::Cli::command();
        let verbs: BTreeSet<String> =
            command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
        let mut named = 0;
        for name in [
            "install.md",
            "take-over.md",
            "upgrade.md",
            "uninstall.md",
            "operate.md",
            "troubleshooting.md",
            "../README.md",
        ] {
            let text = page(name);
            for code in text.split('`').skip(1).step_by(2).flat_map(str::lines) {
                let Some(verb) =
                    code.trim().strip_prefix("portolan ").and_then(|rest| rest.split_whitespace().next())
                else {
                    continue;
                };
                let verb = verb.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '-');
                if verb.starts_with('-') || verb.chars().any(|c| c.is_ascii_uppercase()) {
                    continue;
                }
                named += 1;
                assert!(verbs.contains(verb), "{name}: there is no verb `{verb}`: {code}");
            }
        }
        assert!(named > 20, "{named} verbs");
    }
}
