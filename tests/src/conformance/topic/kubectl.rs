//! The real kubectl reads, and is told what a user has to know.

use anyhow::ensure;
use serde_json::json;

use crate::conformance::{check::checks, ground::Ground};

checks![
    kubectl_get_shows_the_columns,
    kubectl_get_wide_shows_all_columns,
    kubectl_get_reads_json_yaml_and_names,
    kubectl_get_reads_paths_and_columns,
    kubectl_get_watch_prints_changes,
    kubectl_get_of_nothing_says_so,
    kubectl_get_finds_short_names_and_categories,
    kubectl_describe_shows_the_object,
    kubectl_explain_reads_the_schema,
    kubectl_lists_api_resources,
    kubectl_lists_api_versions,
    kubectl_events_shows_events,
    kubectl_asks_what_it_may_do,
    kubectl_tells_who_it_is,
    kubectl_tells_the_version,
    kubectl_get_raw_passes_through,
    kubectl_get_sorts_and_selects,
];

async fn kubectl_get_shows_the_columns(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3, "mode": "b"})).await?;
    let table = at.kubectl().ok(&["get", "widgets"]).await?;
    ensure!(table.starts_with("NAME   SIZE   AGE\na      3      "), "{table}");
    Ok(())
}

async fn kubectl_get_wide_shows_all_columns(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3, "mode": "b"})).await?;
    let table = at.kubectl().ok(&["get", "widgets", "-o", "wide"]).await?;
    ensure!(
        table.starts_with("NAME   SIZE   MODE   AGE\na      3      b      "),
        "{table}"
    );
    Ok(())
}

async fn kubectl_get_reads_json_yaml_and_names(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3})).await?;
    let kubectl = at.kubectl();
    let json: serde_json::Value = serde_json::from_str(&kubectl.ok(&["get", "widgets", "a", "-o", "json"]).await?)?;
    ensure!(json["spec"]["size"] == 3 && json["metadata"]["managedFields"].is_null());
    let yaml = kubectl.ok(&["get", "widgets", "a", "-o", "yaml"]).await?;
    ensure!(
        yaml.contains("\nkind: Widget\n") && yaml.contains("\n  size: 3\n"),
        "{yaml}"
    );
    let names = kubectl.ok(&["get", "widgets", "-o", "name"]).await?;
    ensure!(names == format!("widget.{}/a\n", at.server.group));
    Ok(())
}

async fn kubectl_get_reads_paths_and_columns(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3, "labels": {"x.y": "z"}})).await?;
    let kubectl = at.kubectl();
    let path = "jsonpath={.spec.size} {.spec.labels.x\\.y}";
    ensure!(kubectl.ok(&["get", "widgets", "a", "-o", path]).await? == "3 z");
    let path = "jsonpath={.items[?(@.spec.size==3)].metadata.name}";
    ensure!(kubectl.ok(&["get", "widgets", "-o", path]).await? == "a");
    let columns = "custom-columns=SIZE:.spec.size,MODE:.spec.mode";
    ensure!(kubectl.ok(&["get", "widgets", "-o", columns]).await? == "SIZE   MODE\n3      <none>\n");
    let template = "go-template={{range .items}}{{.metadata.name}}={{.spec.size}}{{end}}";
    ensure!(kubectl.ok(&["get", "widgets", "-o", template]).await? == "a=3");
    Ok(())
}

async fn kubectl_get_watch_prints_changes(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3})).await?;
    let kubectl = at.kubectl();
    let mut lines = kubectl.lines(&["get", "widgets", "--watch", "--output-watch-events"])?;
    let (head, first) = (lines.next().await?, lines.next().await?);
    ensure!(
        head.starts_with("EVENT") && first.starts_with("ADDED      a      3"),
        "{head}\n{first}"
    );
    at.merge("widgets/a", &json!({"spec": {"size": 4}})).await?.ok()?;
    let second = lines.next().await?;
    ensure!(second.starts_with("MODIFIED   a      4"), "{second}");
    Ok(())
}

async fn kubectl_get_of_nothing_says_so(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let empty = kubectl.run(&["get", "widgets"], "").await?;
    ensure!(empty.code == 0 && empty.err == format!("No resources found in {} namespace.\n", at.namespace));
    let missing = kubectl.refused(&["get", "widgets", "a"], "").await?;
    let expected = format!(
        "Error from server (NotFound): widgets.{} \"a\" not found\n",
        at.server.group
    );
    ensure!(missing == expected, "{missing}");
    let unknown = kubectl.refused(&["get", "nothings"], "").await?;
    ensure!(
        unknown == "error: the server doesn't have a resource type \"nothings\"\n",
        "{unknown}"
    );
    Ok(())
}

async fn kubectl_get_finds_short_names_and_categories(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 3})).await?;
    let kubectl = at.kubectl();
    let kind = format!("widgets.v1.{}", at.server.group);
    for name in ["wdg", "widget", "widgets", "conformance", &kind] {
        let printed = kubectl.ok(&["get", name]).await?;
        ensure!(printed.contains("\na "), "{name}: {printed}");
    }
    Ok(())
}

async fn kubectl_describe_shows_the_object(at: &Ground) -> anyhow::Result<()> {
    let made = at.new_widget("a", &json!({"size": 3})).await?;
    let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "a"}, "type": "Warning",
        "message": "too small", "reason": "Checked", "source": {"component": "conformance"},
        "firstTimestamp": "2026-01-02T03:04:05Z", "lastTimestamp": "2026-01-02T03:04:05Z", "count": 1,
        "involvedObject": {"apiVersion": format!("{}/v1", at.server.group), "kind": "Widget", "name": "a",
            "namespace": at.namespace, "uid": made["metadata"]["uid"]}});
    at.post("events", &event).await?.created()?;
    let printed = at.kubectl().ok(&["describe", "widget", "a"]).await?;
    ensure!(
        printed.contains("Name:         a\n") && printed.contains("  Size:      3\n"),
        "{printed}"
    );
    ensure!(
        printed.contains("Warning  Checked") && printed.contains("too small"),
        "{printed}"
    );
    Ok(())
}

async fn kubectl_explain_reads_the_schema(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let version = format!("--api-version={}/v1", at.server.group);
    let printed = kubectl.ok(&["explain", "widgets.spec.size", &version]).await?;
    ensure!(
        printed.contains("FIELD: size <integer>") && printed.contains("How large it is."),
        "{printed}"
    );
    let printed = kubectl.ok(&["explain", "widgets", &version, "--recursive"]).await?;
    ensure!(
        printed.contains("size\t<integer> -required-") && printed.contains("tags\t<[]string>"),
        "{printed}"
    );
    let printed = kubectl.ok(&["explain", "pod.spec.containers.image"]).await?;
    ensure!(
        printed.contains("FIELD: image <string>") && printed.contains("Container image name"),
        "{printed}"
    );
    Ok(())
}

async fn kubectl_lists_api_resources(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let group = format!("--api-group={}", at.server.group);
    let printed = kubectl
        .ok(&["api-resources", &group, "--no-headers", "-o", "wide"])
        .await?;
    let line = printed
        .lines()
        .find(|line| line.starts_with("widgets "))
        .unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().collect();
    ensure!(
        words
            == [
                "widgets",
                "wdg",
                &format!("{}/v1", at.server.group),
                "true",
                "Widget",
                "delete,deletecollection,get,list,patch,create,update,watch",
                "conformance"
            ],
        "{words:?}"
    );
    Ok(())
}

async fn kubectl_lists_api_versions(at: &Ground) -> anyhow::Result<()> {
    let printed = at.kubectl().ok(&["api-versions"]).await?;
    for version in ["v1", "events.k8s.io/v1", &format!("{}/v1alpha1", at.server.group)] {
        ensure!(printed.lines().any(|line| line == version), "{version}");
    }
    Ok(())
}

async fn kubectl_events_shows_events(at: &Ground) -> anyhow::Result<()> {
    let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "a"}, "type": "Warning",
        "message": "too small", "reason": "Checked", "lastTimestamp": "2026-01-02T03:04:05Z",
        "involvedObject": {"apiVersion": "v1", "kind": "ConfigMap", "name": "m", "namespace": at.namespace}});
    at.post("events", &event).await?.created()?;
    let printed = at
        .kubectl()
        .ok(&["events", "--types=Warning", "--for", "configmap/m"])
        .await?;
    ensure!(
        printed.contains("Checked") && printed.contains("ConfigMap/m") && printed.contains("too small"),
        "{printed}"
    );
    let printed = at.kubectl().ok(&["get", "events"]).await?;
    ensure!(
        printed.contains("configmap/m") && printed.starts_with("LAST SEEN   TYPE"),
        "{printed}"
    );
    Ok(())
}

async fn kubectl_asks_what_it_may_do(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    ensure!(kubectl.ok(&["auth", "can-i", "create", "widgets"]).await? == "yes\n");
    let printed = kubectl.ok(&["auth", "can-i", "--list"]).await?;
    let all = printed
        .lines()
        .any(|line| line.split_whitespace().collect::<Vec<_>>() == ["*.*", "[]", "[]", "[*]"]);
    ensure!(all, "{printed}");
    Ok(())
}

async fn kubectl_tells_who_it_is(at: &Ground) -> anyhow::Result<()> {
    let printed = at.kubectl().ok(&["auth", "whoami"]).await?;
    ensure!(
        printed.contains("Username") && printed.contains("system:masters"),
        "{printed}"
    );
    Ok(())
}

async fn kubectl_tells_the_version(at: &Ground) -> anyhow::Result<()> {
    let printed = at.kubectl().ok(&["version"]).await?;
    ensure!(printed.contains("Server Version: v1."), "{printed}");
    Ok(())
}

async fn kubectl_get_raw_passes_through(at: &Ground) -> anyhow::Result<()> {
    at.map("a", &json!({"k": "v"})).await?;
    let path = format!("/api/v1/namespaces/{}/configmaps/a", at.namespace);
    let raw: serde_json::Value = serde_json::from_str(&at.kubectl().ok(&["get", "--raw", &path]).await?)?;
    ensure!(raw["data"]["k"] == "v");
    Ok(())
}

async fn kubectl_get_sorts_and_selects(at: &Ground) -> anyhow::Result<()> {
    for (name, size) in [("a", 3), ("b", 1), ("c", 2)] {
        let mut widget = at.widget(name, &json!({"size": size, "mode": if size > 1 { "a" } else { "b" }}));
        widget["metadata"]["labels"] = json!({"x": name});
        at.post("widgets", &widget).await?.created()?;
    }
    let kubectl = at.kubectl();
    let sorted = kubectl
        .ok(&[
            "get",
            "widgets",
            "--sort-by=.spec.size",
            "-o",
            "custom-columns=N:.metadata.name",
        ])
        .await?;
    ensure!(sorted == "N\nb\nc\na\n", "{sorted}");
    let names = "jsonpath={.items[*].metadata.name}";
    ensure!(kubectl.ok(&["get", "widgets", "-l", "x in (a,b)", "-o", names]).await? == "a b");
    ensure!(
        kubectl
            .ok(&["get", "widgets", "--field-selector=spec.mode=b", "-o", names])
            .await?
            == "b"
    );
    ensure!(kubectl.ok(&["get", "widgets", "--chunk-size=1", "-o", names]).await? == "a b c");
    let labels = kubectl.ok(&["get", "widgets", "-L", "x", "--show-kind"]).await?;
    ensure!(
        labels.lines().next().is_some_and(|line| line.ends_with("AGE   X")),
        "{labels}"
    );
    Ok(())
}
