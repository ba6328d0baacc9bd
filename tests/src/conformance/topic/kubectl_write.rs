//! The real kubectl writes.

use anyhow::ensure;
use serde_json::json;

use crate::conformance::{check::checks, ground::Ground};

checks![
    kubectl_apply_makes_changes_and_prunes,
    kubectl_apply_tells_what_is_wrong,
    kubectl_apply_warns_when_asked,
    kubectl_server_side_apply_reports_conflicts_and_forces,
    kubectl_server_side_apply_takes_over_from_client_side,
    kubectl_apply_runs_dry_on_the_server,
    kubectl_diff_tells_by_its_exit_code,
    kubectl_create_and_replace,
    kubectl_create_has_short_ways,
    kubectl_patch_has_three_kinds,
    kubectl_scale_checks_the_present_size,
    kubectl_label_and_annotate,
    kubectl_edit_sends_what_was_edited,
    kubectl_edit_shows_what_was_wrong,
    kubectl_delete_waits_for_the_end,
    kubectl_delete_has_three_cascades,
    kubectl_wait_waits,
    kubectl_set_image_changes_a_pod,
    kubectl_applies_several_objects_in_order,
    kubectl_token_is_made differs "the sandbox has one token, which may do everything; accounts have none",
];

fn widget(at: &Ground, spec: &str) -> String {
    format!(
        "apiVersion: {}/v1\nkind: Widget\nmetadata: {{name: a}}\nspec: {{{spec}}}\n",
        at.server.group
    )
}

async fn kubectl_apply_makes_changes_and_prunes(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let apply = ["apply", "-f", "-"];
    let name = format!("widget.{}/a", at.server.group);
    let printed = kubectl.ok_with(&apply, &widget(at, "size: 2, mode: a")).await?;
    ensure!(printed == format!("{name} created\n"));
    let printed = kubectl.ok_with(&apply, &widget(at, "size: 2, mode: a")).await?;
    ensure!(printed == format!("{name} unchanged\n"));
    let printed = kubectl.ok_with(&apply, &widget(at, "size: 3")).await?;
    ensure!(printed == format!("{name} configured\n"));
    let after = at.get("widgets/a").await?.ok()?;
    ensure!(after["spec"]["size"] == 3 && after["spec"]["mode"].is_null());
    Ok(())
}

async fn kubectl_apply_tells_what_is_wrong(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let apply = ["apply", "-f", "-"];
    let rule = kubectl.refused(&apply, &widget(at, "size: 30")).await?;
    ensure!(
        rule.starts_with("The Widget \"a\" is invalid: spec: Invalid value: "),
        "{rule}"
    );
    ensure!(rule.contains("a widget has at most ten"), "{rule}");
    let unknown = kubectl.refused(&apply, &widget(at, "size: 3, odd: 1")).await?;
    ensure!(
        unknown.contains(
            "Error from server (BadRequest): error when creating \"STDIN\": Widget in version \"v1\" cannot be \
                          handled as a Widget: strict decoding error: unknown field \"spec.odd\""
        ),
        "{unknown}"
    );
    let missing = kubectl.refused(&apply, &widget(at, "mode: a")).await?;
    ensure!(missing.contains("spec.size: Required value"), "{missing}");
    let other = kubectl
        .refused(&apply, &widget(at, "size: 1").replace("Widget", "Nothing"))
        .await?;
    ensure!(other.contains("no matches for kind \"Nothing\" in version"), "{other}");
    Ok(())
}

async fn kubectl_apply_warns_when_asked(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let printed = kubectl
        .run(&["apply", "--validate=warn", "-f", "-"], &widget(at, "size: 3, odd: 1"))
        .await?;
    ensure!(
        printed.code == 0 && printed.err == "Warning: unknown field \"spec.odd\"\n",
        "{}",
        printed.err
    );
    Ok(())
}

async fn kubectl_server_side_apply_reports_conflicts_and_forces(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let printed = kubectl
        .ok_with(&["apply", "--server-side", "-f", "-"], &widget(at, "size: 2"))
        .await?;
    ensure!(printed.ends_with("serverside-applied\n"), "{printed}");
    let other = ["apply", "--server-side", "--field-manager=other", "-f", "-"];
    let conflict = kubectl.refused(&other, &widget(at, "size: 3")).await?;
    ensure!(
        conflict.starts_with("error: Apply failed with 1 conflict: conflict with \"kubectl\": .spec.size\n"),
        "{conflict}"
    );
    let force = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager=other",
        "-f",
        "-",
    ];
    kubectl.ok_with(&force, &widget(at, "size: 3")).await?;
    ensure!(at.get("widgets/a").await?.ok()?["spec"]["size"] == 3);
    Ok(())
}

async fn kubectl_server_side_apply_takes_over_from_client_side(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    kubectl
        .ok_with(&["apply", "-f", "-"], &widget(at, "size: 2, mode: a"))
        .await?;
    kubectl
        .ok_with(&["apply", "--server-side", "-f", "-"], &widget(at, "size: 3"))
        .await?;
    let after = at.get("widgets/a").await?.ok()?;
    ensure!(after["spec"]["size"] == 3 && after["spec"]["mode"].is_null(), "{after}");
    Ok(())
}

async fn kubectl_apply_runs_dry_on_the_server(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    let dry = ["apply", "--dry-run=server", "-f", "-"];
    let printed = kubectl.ok_with(&dry, &widget(at, "size: 2")).await?;
    ensure!(
        printed == format!("widget.{}/a created (server dry run)\n", at.server.group),
        "{printed}"
    );
    ensure!(at.get("widgets/a").await?.code == 404);
    kubectl.refused(&dry, &widget(at, "size: 20")).await?;
    Ok(())
}

async fn kubectl_diff_tells_by_its_exit_code(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    kubectl.ok_with(&["apply", "-f", "-"], &widget(at, "size: 2")).await?;
    let same = kubectl.run(&["diff", "-f", "-"], &widget(at, "size: 2")).await?;
    ensure!(same.code == 0 && same.out.is_empty(), "{}{}", same.out, same.err);
    let other = kubectl.run(&["diff", "-f", "-"], &widget(at, "size: 3")).await?;
    ensure!(
        other.code == 1 && other.out.contains("\n-  size: 2\n+  size: 3\n"),
        "{}{}",
        other.out,
        other.err
    );
    ensure!(at.get("widgets/a").await?.ok()?["spec"]["size"] == 2);
    Ok(())
}

async fn kubectl_create_and_replace(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    kubectl
        .ok_with(&["create", "-f", "-"], &widget(at, "size: 2, mode: a"))
        .await?;
    let again = kubectl.refused(&["create", "-f", "-"], &widget(at, "size: 2")).await?;
    ensure!(again.contains("(AlreadyExists)"), "{again}");
    let printed = kubectl.ok_with(&["replace", "-f", "-"], &widget(at, "size: 3")).await?;
    ensure!(printed.ends_with("replaced\n"), "{printed}");
    let after = at.get("widgets/a").await?.ok()?;
    ensure!(after["spec"]["mode"].is_null() && after["metadata"]["generation"] == 2);
    kubectl
        .ok_with(&["replace", "--force", "-f", "-"], &widget(at, "size: 1"))
        .await?;
    ensure!(at.get("widgets/a").await?.ok()?["metadata"]["generation"] == 1);
    Ok(())
}

async fn kubectl_create_has_short_ways(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    for arguments in [
        &["create", "configmap", "m", "--from-literal=k=v"][..],
        &["create", "secret", "generic", "s", "--from-literal=k=v"],
        &["create", "serviceaccount", "sa"],
        &["create", "role", "r", "--verb=get", "--resource=pods"],
        &["create", "rolebinding", "rb", "--role=r", "--serviceaccount=default:sa"],
        &["create", "service", "clusterip", "svc", "--tcp=80:8080"],
        &[
            "create",
            "poddisruptionbudget",
            "pdb",
            "--selector=app=a",
            "--min-available=1",
        ],
    ] {
        kubectl.ok(arguments).await?;
    }
    ensure!(kubectl.ok(&["get", "secret", "s", "-o", "jsonpath={.data.k}"]).await? == "dg==");
    ensure!(
        kubectl
            .ok(&["get", "role", "r", "-o", "jsonpath={.rules[0].verbs[0]}"])
            .await?
            == "get"
    );
    Ok(())
}

async fn kubectl_patch_has_three_kinds(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 2})).await?;
    let kubectl = at.kubectl();
    let merge = ["patch", "widget", "a", "--type=merge", "-p", r#"{"spec":{"size":3}}"#];
    ensure!(kubectl.ok(&merge).await?.ends_with("a patched\n"));
    ensure!(kubectl.ok(&merge).await?.ends_with("a patched (no change)\n"));
    let list = r#"[{"op":"replace","path":"/spec/size","value":4}]"#;
    kubectl.ok(&["patch", "widget", "a", "--type=json", "-p", list]).await?;
    ensure!(at.get("widgets/a").await?.ok()?["spec"]["size"] == 4);
    let strategic = kubectl.refused(&["patch", "widget", "a", "-p", "{}"], "").await?;
    ensure!(
        strategic.contains("application/strategic-merge-patch+json is not supported by"),
        "{strategic}"
    );
    let status = [
        "patch",
        "widget",
        "a",
        "--subresource=status",
        "--type=merge",
        "-p",
        r#"{"status":{"phase":"x"}}"#,
    ];
    kubectl.ok(&status).await?;
    at.map("m", &json!({"x": "1"})).await?;
    kubectl
        .ok(&["patch", "configmap", "m", "-p", r#"{"data":{"y":"2"}}"#])
        .await?;
    ensure!(at.get("configmaps/m").await?.ok()?["data"] == json!({"x": "1", "y": "2"}));
    Ok(())
}

async fn kubectl_scale_checks_the_present_size(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 9})).await?;
    let kubectl = at.kubectl();
    ensure!(
        kubectl
            .ok(&["scale", "widget/a", "--replicas=4"])
            .await?
            .ends_with("a scaled\n")
    );
    ensure!(at.get("widgets/a").await?.ok()?["spec"]["replicas"] == 4);
    let wrong = kubectl
        .refused(&["scale", "widget/a", "--replicas=5", "--current-replicas=3"], "")
        .await?;
    ensure!(wrong.contains("Expected replicas to be 3, was 4"), "{wrong}");
    Ok(())
}

async fn kubectl_label_and_annotate(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let kubectl = at.kubectl();
    ensure!(
        kubectl
            .ok(&["label", "widget", "a", "x=1"])
            .await?
            .ends_with("a labeled\n")
    );
    let again = kubectl.refused(&["label", "widget", "a", "x=2"], "").await?;
    ensure!(
        again.contains("'x' already has a value (1), and --overwrite is false"),
        "{again}"
    );
    kubectl.ok(&["label", "widget", "a", "x=2", "--overwrite"]).await?;
    kubectl.ok(&["annotate", "widget", "a", "note=a text"]).await?;
    let after = at.get("widgets/a").await?.ok()?;
    ensure!(after["metadata"]["labels"] == json!({"x": "2"}) && after["metadata"]["annotations"]["note"] == "a text");
    ensure!(
        kubectl
            .ok(&["label", "widget", "a", "x-"])
            .await?
            .ends_with("a unlabeled\n")
    );
    Ok(())
}

async fn kubectl_edit_sends_what_was_edited(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let kubectl = at.kubectl().with("KUBE_EDITOR", "sed -i 's/size: 1/size: 4/'");
    let printed = kubectl.ok(&["edit", "widget", "a"]).await?;
    ensure!(printed.ends_with("a edited\n"), "{printed}");
    ensure!(at.get("widgets/a").await?.ok()?["spec"]["size"] == 4);
    Ok(())
}

async fn kubectl_edit_shows_what_was_wrong(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let kubectl = at.kubectl().with("KUBE_EDITOR", "sed -i 's/size: 1/size: 40/'");
    let printed = kubectl.run(&["edit", "widget", "a"], "").await?;
    ensure!(
        printed.code != 0 && printed.err.contains("\"a\" is invalid"),
        "{}{}",
        printed.out,
        printed.err
    );
    // What was edited is kept, with what was wrong as a comment.
    let mut words = printed.err.split('"');
    let copy = words.find(|word| word.contains("kubectl-edit-")).unwrap_or_default();
    let kept = std::fs::read_to_string(copy)?;
    std::fs::remove_file(copy)?;
    ensure!(
        kept.contains("a widget has at most ten") && kept.contains("size: 40"),
        "{kept}"
    );
    Ok(())
}

async fn kubectl_delete_waits_for_the_end(at: &Ground) -> anyhow::Result<()> {
    for name in ["a", "b"] {
        let mut held = at.widget(name, &json!({"size": 1}));
        held["metadata"]["finalizers"] = json!(["example.dev/x"]);
        at.post("widgets", &held).await?.created()?;
    }
    let kubectl = at.kubectl();
    let waits = kubectl.refused(&["delete", "widget", "a", "--timeout=1s"], "").await?;
    ensure!(waits.contains("timed out waiting for the condition"), "{waits}");
    let (printed, ()) = tokio::try_join!(kubectl.ok(&["delete", "widget", "b", "--timeout=20s"]), async {
        at.until("widgets/b", |widget| {
            widget["metadata"]["deletionTimestamp"].is_string()
        })
        .await?;
        at.merge("widgets/b", &json!({"metadata": {"finalizers": null}}))
            .await?
            .ok()?;
        Ok(())
    })?;
    ensure!(printed.contains("\"b\" deleted"), "{printed}");
    at.merge("widgets/a", &json!({"metadata": {"finalizers": null}}))
        .await?
        .ok()?;
    let gone = kubectl.ok(&["delete", "widget", "a", "--ignore-not-found"]).await?;
    ensure!(gone.is_empty());
    Ok(())
}

async fn kubectl_delete_has_three_cascades(at: &Ground) -> anyhow::Result<()> {
    let kubectl = at.kubectl();
    for (cascade, stays) in [("background", false), ("foreground", false), ("orphan", true)] {
        let owner = at.new_widget(cascade, &json!({"size": 1})).await?;
        let mut map = crate::conformance::ground::config_map(cascade, &json!({}));
        map["metadata"]["ownerReferences"] = json!([{"apiVersion": owner["apiVersion"], "kind": "Widget",
            "name": cascade, "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true}]);
        at.post("configmaps", &map).await?.created()?;
        kubectl
            .ok(&[
                "delete",
                "widget",
                cascade,
                &format!("--cascade={cascade}"),
                "--timeout=40s",
            ])
            .await?;
        let path = format!("configmaps/{cascade}");
        if stays {
            ensure!(at.get(&path).await?.ok()?["metadata"]["ownerReferences"].is_null());
        } else {
            at.is_gone(&path).await?;
        }
    }
    Ok(())
}

async fn kubectl_wait_waits(at: &Ground) -> anyhow::Result<()> {
    at.new_widget("a", &json!({"size": 1})).await?;
    let kubectl = at.kubectl();
    let arguments = [
        "wait",
        "widget/a",
        "--for=jsonpath={.status.phase}=Ready",
        "--timeout=20s",
    ];
    let (printed, ()) = tokio::try_join!(kubectl.ok(&arguments), async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        at.merge("widgets/a/status", &json!({"status": {"phase": "Ready"}}))
            .await?
            .ok()?;
        Ok(())
    })?;
    ensure!(printed.ends_with("a condition met\n"), "{printed}");
    let arguments = ["wait", "widget/a", "--for=delete", "--timeout=20s"];
    tokio::try_join!(kubectl.ok(&arguments), async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        at.delete("widgets/a").await?.ok()?;
        Ok(())
    })?;
    Ok(())
}

async fn kubectl_set_image_changes_a_pod(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut gated = crate::conformance::ground::pod("a");
    gated["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    at.post("pods", &gated).await?.created()?;
    let printed = at.kubectl().ok(&["set", "image", "pod/a", "c=other:2"]).await?;
    ensure!(printed == "pod/a image updated\n", "{printed}");
    ensure!(at.get("pods/a").await?.ok()?["spec"]["containers"][0]["image"] == "other:2");
    Ok(())
}

async fn kubectl_applies_several_objects_in_order(at: &Ground) -> anyhow::Result<()> {
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {k: v}\n";
    let input = format!("{}---\n{map}", widget(at, "size: 2"));
    let printed = at.kubectl().ok_with(&["apply", "-f", "-"], &input).await?;
    ensure!(
        printed == format!("widget.{}/a created\nconfigmap/m created\n", at.server.group),
        "{printed}"
    );
    let printed = at.kubectl().ok_with(&["delete", "-f", "-"], &input).await?;
    ensure!(printed.lines().count() == 2, "{printed}");
    Ok(())
}

async fn kubectl_token_is_made(at: &Ground) -> anyhow::Result<()> {
    at.until("serviceaccounts/default", |_| true).await?;
    let token = at.kubectl().ok(&["create", "token", "default"]).await?;
    ensure!(token.trim().split('.').count() == 3);
    Ok(())
}
