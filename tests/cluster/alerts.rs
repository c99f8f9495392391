//! The alert rules in `deploy/monitoring`, by Prometheus' own promtool: each fires when it should, and only then; and the dashboard's
//! expressions, by the same parser.

use dataplane_tests::controlplane::Binaries;
use dataplane_tests::deploy::{file, objects_of};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("promtool-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    /// Writes an object, as YAML that is JSON.
    fn write(&self, name: &str, object: &Value) -> String {
        let path = self.0.join(name);
        fs::write(&path, object.to_string()).unwrap();
        path.display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What is below `spec` is a file of rules.
fn rules() -> Value {
    objects_of("monitoring/alerts.yaml").unwrap()[0]["spec"].clone()
}

fn names(rules: &Value) -> BTreeSet<String> {
    let groups = rules["groups"].as_array().unwrap().iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().unwrap());
    rules.map(|rule| rule["alert"].as_str().unwrap().to_owned()).collect()
}

/// What promtool says; an error if it is not content.
fn promtool(arguments: &[&str]) -> Result<String, String> {
    let program = Binaries::find_or_build().unwrap().promtool_program().unwrap();
    let output = Command::new(program).args(arguments).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    if output.status.success() { Ok(out + &err) } else { Err(out + &err) }
}

/// H3: each alert fires for the node that has what it tells of, after its time, and for no other.
#[test]
fn alerts_fire_when_they_should_and_only_then() {
    let folder = Folder::new("alerts");
    let rules = rules();
    let checked = promtool(&["check", "rules", "--lint=all", &folder.write("rules.yaml", &rules)]).unwrap();
    assert!(checked.contains(&format!("{} rules found", names(&rules).len())), "{checked}");

    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/alerts.yaml");
    let cases: Value = serde_saphyr::from_str(&fs::read_to_string(cases).unwrap()).unwrap();
    let (mut fired, mut quiet) = (BTreeSet::new(), BTreeSet::new());
    for case in cases["tests"].as_array().unwrap() {
        let series = case["input_series"].to_string();
        assert!(series.contains(r#"instance=\"good\""#), "{series}");
        for moment in case["alert_rule_test"].as_array().unwrap() {
            let name = moment["alertname"].as_str().unwrap().to_owned();
            let fires = moment["exp_alerts"].as_array().is_some_and(|alerts| !alerts.is_empty());
            if fires {
                fired.insert(name)
            } else {
                quiet.insert(name)
            };
        }
    }
    assert_eq!([&fired, &quiet], [&names(&rules); 2], "an alert without a case");
    let cases = folder.write("cases.yaml", &cases);
    promtool(&["test", "rules", &cases]).unwrap_or_else(|said| panic!("{said}"));

    // And the cases notice rules that are wrong.
    for (right, wrong) in [("portolan_healthy == 0", "portolan_healthy >= 0"), ("\"24h\"", "\"1h\"")] {
        let text = rules.to_string();
        assert!(text.contains(right), "{right}");
        folder.write("rules.yaml", &serde_json::from_str(&text.replace(right, wrong)).unwrap());
        let said = promtool(&["test", "rules", &cases]).unwrap_err();
        assert!(said.contains("FAILED"), "{wrong}: {said}");
    }
}

/// H3: every panel asks what Prometheus understands.
#[test]
fn the_dashboards_expressions_are_promql() {
    let text = fs::read_to_string(file("monitoring/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    // Grafana puts in what begins with a dollar sign.
    let expressions = targets.map(|target| {
        let asked = target["expr"].as_str().unwrap().replace("$__rate_interval", "5m");
        asked.replace('$', "")
    });
    let rules: Vec<_> = expressions
        .enumerate()
        .map(|(number, asked)| json!({ "record": format!("panel:{number}"), "expr": asked }))
        .collect();
    assert!(rules.len() > 10);
    let count = rules.len();
    let groups = |rules: Vec<Value>| json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    let folder = Folder::new("dashboard");
    let checked = promtool(&["check", "rules", &folder.write("rules.yaml", &groups(rules.clone()))]).unwrap();
    assert!(checked.contains(&format!("{count} rules found")), "{checked}");
    let cut = json!({ "record": "panel:cut", "expr": "sum(portolan_healthy" });
    promtool(&["check", "rules", &folder.write("rules.yaml", &groups(vec![cut]))]).unwrap_err();
}
