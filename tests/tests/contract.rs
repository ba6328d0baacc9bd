//! The walls between the rooms, and what is generated or shipped.

use std::{collections::BTreeSet, process::Command};

use anyhow::Context;
use flotilla_tests::root;

/// Lines of `cargo tree` for `package`, one crate each, the package itself first.
fn tree(package: &str, options: &[&str]) -> anyhow::Result<Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--locked",
            "--offline",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p}",
            "-p",
            package,
        ])
        .args(options)
        .current_dir(root())
        .output()
        .context("cargo tree")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "cargo tree -p {package}: {complaint}");
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect())
}

/// Names of every crate that `package` links.
fn links(package: &str) -> anyhow::Result<BTreeSet<String>> {
    Ok(tree(package, &[])?.into_iter().collect())
}

/// Workspace crates that the manifest of `package` names under `[dependencies]`.
fn neighbours(package: &str) -> anyhow::Result<BTreeSet<String>> {
    let names = tree(package, &["--depth", "1"])?;
    Ok(names
        .into_iter()
        .skip(1)
        .filter(|name| name.starts_with("flotilla-"))
        .collect())
}

#[test]
fn the_operator_links_no_tensor_library_and_the_worker_no_kubernetes_client() -> anyhow::Result<()> {
    let (operator, worker) = (links("flotilla-operator")?, links("flotilla-worker")?);
    assert!(
        operator.contains("kube-client") && worker.contains("candle-core"),
        "cargo tree sees what is linked"
    );
    for name in ["candle-core", "candle-nn", "tokenizers", "flotilla-model"] {
        assert!(!operator.contains(name), "the operator links {name}");
    }
    for name in ["kube-client", "kube-core", "k8s-openapi"] {
        assert!(!worker.contains(name), "the worker links {name}");
    }
    Ok(())
}

#[test]
fn rooms_depend_on_each_other_only_along_the_arrows() -> anyhow::Result<()> {
    let arrows: [(&str, &[&str]); 11] = [
        ("flotilla-api", &[]),
        ("flotilla-artifacts", &[]),
        ("flotilla-model", &[]),
        ("flotilla-engine", &["flotilla-model"]),
        ("flotilla-grpo", &[]),
        ("flotilla-kernels", &[]),
        (
            "flotilla-device",
            &["flotilla-engine", "flotilla-grpo", "flotilla-kernels", "flotilla-model"],
        ),
        (
            "flotilla-worker",
            &[
                "flotilla-api",
                "flotilla-artifacts",
                "flotilla-device",
                "flotilla-engine",
                "flotilla-grpo",
                "flotilla-kernels",
                "flotilla-model",
            ],
        ),
        ("flotilla-operator", &["flotilla-api"]),
        ("flotilla-sandbox", &[]),
        (
            "flotilla-cli",
            &["flotilla-api", "flotilla-operator", "flotilla-sandbox"],
        ),
    ];
    for (package, allowed) in arrows {
        let found = neighbours(package)?;
        let allowed: BTreeSet<String> = allowed.iter().map(|&name| name.to_owned()).collect();
        assert_eq!(found, allowed, "{package}: a new arrow is a decision, not an accident");
    }
    Ok(())
}

#[test]
fn committed_definitions_equal_the_types() -> anyhow::Result<()> {
    for (file, crd) in flotilla_api::crd::all() {
        let path = root().join("crds").join(&file);
        let committed: serde_json::Value =
            serde_yaml::from_str(&std::fs::read_to_string(&path).context(file.clone())?)?;
        assert_eq!(
            committed,
            serde_json::to_value(&crd)?,
            "crds/{file} is stale: run `make generate`"
        );
    }
    Ok(())
}
