//! Alert rules, dashboard and runbooks are held to the daemons and to each other.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use farbus_integration::cache::Cache;
use farbus_integration::error::Result;
use farbus_integration::process::run_tool;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::tools::packages::{BOOKWORM, with_apt};
use serde_json::Value;

use crate::site::{Site, get};

fn docs(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(path)
}

fn rules() -> std::io::Result<String> {
    fs::read_to_string(docs("monitoring/alerts.yml"))
}

/// Every word of a text that is named like a metric of ours.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words
        .filter(|word| word.starts_with("farbus_"))
        .map(Into::into)
        .collect()
}

/// The metrics that a daemon shows, as Prometheus names them.
fn shown_by(metrics: &str) -> BTreeSet<String> {
    let declared = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "));
    declared
        .filter_map(|line| {
            let (name, kind) = line.split_once(' ')?;
            let suffix = if kind == "counter" { "_total" } else { "" };
            Some(format!("{name}{suffix}"))
        })
        .collect()
}

/// The values of a key in the rules, which have one on each line.
fn values_of(rules: &str, key: &str) -> Vec<String> {
    let lines = rules
        .lines()
        .map(|line| line.trim().trim_start_matches("- "));
    lines
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
        .map(Into::into)
        .collect()
}

/// Prometheus' own tool, from Debian's package.
fn promtool() -> Result<PathBuf> {
    let cache = Cache::open()?;
    let recipe = format!("{BOOKWORM:?} prometheus v1");
    let tree = cache.entry("prometheus", &recipe, |dir| {
        with_apt(&cache, &BOOKWORM, |apt| {
            apt.unpack_alone(&["prometheus".into()], dir)
        })
    })?;
    Ok(tree.join("usr/bin/promtool"))
}

#[test]
fn metrics_of_alerts_and_dashboard_are_shown_by_the_daemons() -> TestResult {
    let site = Site::start()?;
    // Requests are counted from the first one on.
    get(&site.agent_socket(), "/healthz")?;
    get(&site.server_socket(), "/healthz")?;
    let agent = get(&site.agent_socket(), "/metrics")?;
    let server = get(&site.server_socket(), "/metrics")?;

    let mut shown = shown_by(&agent);
    shown.extend(shown_by(&server));

    assert!(agent.starts_with("HTTP/1.0 200") && server.starts_with("HTTP/1.0 200"));
    for file in ["monitoring/alerts.yml", "monitoring/dashboard.json"] {
        let asked = metrics_in(&fs::read_to_string(docs(file))?);
        assert!(asked.len() > 8, "{file}: {asked:?}");
        let unknown: Vec<_> = asked.difference(&shown).collect();
        assert!(
            unknown.is_empty(),
            "{file} asks for {unknown:?}; there are {shown:?}"
        );
    }
    site.end()?;
    Ok(())
}

#[test]
fn alert_rules_are_taken_by_prometheus() -> TestResult {
    let promtool = promtool()?;

    let said = run_tool(
        Command::new(&promtool)
            .args(["check", "rules"])
            .arg(docs("monitoring/alerts.yml")),
    )?;

    let count = values_of(&rules()?, "alert").len();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(
        said.contains(&format!("SUCCESS: {count} rules found")),
        "{said}"
    );
    Ok(())
}

#[test]
fn alerts_fire_when_they_should_and_not_before() -> TestResult {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/operators/alerts.yml");

    let done = run_tool(Command::new(promtool()?).args(["test", "rules"]).arg(tests));

    done.map(drop).map_err(Failure::from)
}

#[test]
fn every_alert_has_its_page_and_every_page_is_listed() -> TestResult {
    let rules = rules()?;
    let index = fs::read_to_string(docs("runbooks/README.md"))?;
    let alerts = values_of(&rules, "alert");
    let pages = values_of(&rules, "runbook");

    assert_eq!(alerts.len(), pages.len());
    for (alert, page) in alerts.iter().zip(&pages) {
        let name = page.strip_prefix("docs/runbooks/").unwrap_or_default();
        let text = fs::read_to_string(docs("runbooks").join(name))?;
        assert!(text.lines().count() > 10, "{page}");
        let row = index
            .lines()
            .find(|line| line.starts_with(&format!("| {alert} |")));
        assert!(
            row.is_some_and(|row| row.contains(&format!("({name})"))),
            "{alert}"
        );
    }
    for entry in fs::read_dir(docs("runbooks"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        assert!(
            name == "README.md" || index.contains(&format!("({name})")),
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn links_between_pages_lead_somewhere() -> TestResult {
    let mut pages: Vec<PathBuf> = vec![docs("operations.md")];
    for entry in fs::read_dir(docs("runbooks"))? {
        pages.push(entry?.path());
    }
    for page in pages {
        let text = fs::read_to_string(&page)?;
        let links = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let file = link.split('#').next().unwrap_or_default();
            let target = page.parent().unwrap_or(Path::new("/")).join(file);
            assert!(target.exists(), "{}: {link}", page.display());
        }
    }
    Ok(())
}

#[test]
fn dashboard_has_a_query_and_a_unit_in_each_panel() -> TestResult {
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(docs("monitoring/dashboard.json"))?)?;
    let panels = dashboard["panels"].as_array().cloned().unwrap_or_default();
    let mut places = BTreeSet::new();
    for panel in &panels {
        let place = (
            panel["gridPos"]["x"].as_u64(),
            panel["gridPos"]["y"].as_u64(),
        );
        assert!(places.insert(place), "two panels at {place:?}");
        if panel["type"] != "row" {
            assert!(panel["targets"][0]["expr"].is_string(), "{panel}");
            assert!(
                panel["fieldConfig"]["defaults"]["unit"].is_string(),
                "{panel}"
            );
            assert!(panel["description"].is_string(), "{panel}");
        }
    }
    assert!(panels.len() > 12);
    Ok(())
}
