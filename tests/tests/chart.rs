//! What can be said about chart and images without a cluster, helm or Docker.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use flotilla_tests::{chart, root};
use serde_json::Value;

fn values() -> anyhow::Result<Value> {
    Ok(serde_yaml::from_str(&std::fs::read_to_string(
        chart::folder().join("values.yaml"),
    )?)?)
}

/// Dotted names of every value that is no map, or an empty one.
fn leaves(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value.as_object().filter(|map| !map.is_empty()) {
        Some(map) => {
            for (name, value) in map {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                leaves(value, &path, found);
            }
        }
        None => {
            found.insert(path.to_owned());
        }
    }
}

#[test]
fn the_definitions_of_the_chart_are_those_of_crds() -> anyhow::Result<()> {
    let (ours, chart) = (root().join("crds"), chart::folder().join("definitions"));
    let mut count = 0;
    for entry in std::fs::read_dir(&ours)? {
        let name = entry?.file_name();
        let copy = std::fs::read(chart.join(&name)).with_context(|| format!("the chart lacks {}", name.display()))?;
        ensure!(
            copy == std::fs::read(ours.join(&name))?,
            "{} is stale: run `make generate`",
            name.display()
        );
        count += 1;
    }
    ensure!(
        std::fs::read_dir(&chart)?.count() == count,
        "the chart has a definition that crds/ lacks"
    );
    Ok(())
}

#[test]
fn chart_and_operator_have_one_version() -> anyhow::Result<()> {
    let chart: Value = serde_yaml::from_str(&std::fs::read_to_string(chart::folder().join("Chart.yaml"))?)?;
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    Ok(())
}

/// A value that the schema lacks could not be set; one that only the schema has would do nothing.
#[test]
fn the_schema_knows_every_value_and_no_other_one() -> anyhow::Result<()> {
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(chart::folder().join("values.schema.json"))?)?;
    same_names(&schema, &values()?, "")
}

fn same_names(schema: &Value, values: &Value, path: &str) -> anyhow::Result<()> {
    let Some(properties) = schema["properties"].as_object() else {
        return Ok(());
    };
    // Only Helm itself sets `global`; `claims` of resources is optional in Kubernetes too.
    let optional = ["global", "claims"];
    let known: BTreeSet<_> = properties
        .keys()
        .map(String::as_str)
        .filter(|name| !optional.contains(name))
        .collect();
    let given: BTreeSet<_> = values
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, _)| name.as_str())
        .collect();
    ensure!(
        schema["additionalProperties"] == false,
        "{path}: unknown names are not refused"
    );
    if !schema["items"].is_null() || values.is_null() {
        return Ok(());
    }
    ensure!(
        known == given,
        "{path}: the schema knows {known:?}, values.yaml has {given:?}"
    );
    properties
        .iter()
        .try_for_each(|(name, schema)| same_names(schema, &values[name], &format!("{path}.{name}")))
}

#[test]
fn the_readme_of_the_chart_lists_every_value_with_its_default() -> anyhow::Result<()> {
    let readme = std::fs::read_to_string(chart::folder().join("README.md"))?;
    let mut names = BTreeSet::new();
    leaves(&values()?, "", &mut names);
    for name in names {
        // `resources` is documented as one value.
        let documented = name.split_once("resources.").map_or(name.as_str(), |_| "resources");
        let row = readme
            .lines()
            .find(|line| line.starts_with(&format!("| `{documented}` |")));
        let row = row.with_context(|| format!("README.md has no row for {documented}: run `make generate`"))?;
        let value = documented
            .split('.')
            .try_fold(&values()?, |value, name| value.get(name))
            .cloned();
        let default = match value.context("a value")? {
            Value::String(text) if text.is_empty() => "\"\"".to_owned(),
            Value::String(text) => text,
            Value::Array(items) if !items.is_empty() => {
                let items: Vec<_> = items.iter().map(ToString::to_string).collect();
                format!("[{}]", items.join(", "))
            }
            Value::Object(map) if !map.is_empty() => "see values.yaml".to_owned(),
            other => other.to_string(),
        };
        ensure!(
            row.contains(&format!("| `{default}` |")),
            "README.md says {row:?}, values.yaml {default:?}"
        );
    }
    Ok(())
}

/// A COPY of a path that is not there, or that .dockerignore keeps out, fails only where there is a Docker engine.
#[test]
fn what_the_images_copy_is_there_and_not_ignored() -> anyhow::Result<()> {
    let ignore = std::fs::read_to_string(root().join(".dockerignore"))?;
    let mut sources = 0;
    for file in ["operator.Dockerfile", "worker.Dockerfile"] {
        let text = std::fs::read_to_string(root().join("docker").join(file))?;
        for line in text
            .lines()
            .filter(|line| line.starts_with("COPY ") && !line.contains("--from"))
        {
            let words: Vec<_> = line.split_whitespace().skip(1).collect();
            for source in words.iter().take(words.len() - 1) {
                ensure!(
                    root().join(source).exists(),
                    "{file} copies {source}, which is not there"
                );
                ensure!(
                    ignore.lines().any(|line| line == format!("!{source}")),
                    "{source} is ignored"
                );
                sources += 1;
            }
        }
        ensure!(text.contains("\nUSER 65532:65532\n"), "{file} runs as root");
    }
    ensure!(sources > 0, "no COPY line was read");
    Ok(())
}
