//! The API server as the real kubectl sees it. Where there is no kubectl the tests say so and pass.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails the test")]

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use flotilla_sandbox::{Sandbox, Settings};

const WIDGETS: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.dev}
spec:
  group: example.dev
  scope: Namespaced
  names: {plural: widgets, singular: widget, kind: Widget, shortNames: [wd], categories: [all]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}, scale: {specReplicasPath: .spec.replicas, statusReplicasPath: .status.replicas}}
    additionalPrinterColumns:
    - {name: Size, type: integer, jsonPath: .spec.size}
    - {name: Age, type: date, jsonPath: .metadata.creationTimestamp}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            description: What the widget shall be.
            required: [size]
            properties:
              size: {type: integer, minimum: 1}
              replicas: {type: integer, default: 1}
            x-kubernetes-validations:
            - {rule: "self.size <= 10", message: "a widget has at most ten"}
          status:
            type: object
            properties:
              replicas: {type: integer}
              conditions:
                type: array
                items: {type: object, properties: {type: {type: string}, status: {type: string}}}
"#;

fn widget(size: &str) -> String {
    format!("apiVersion: example.dev/v1\nkind: Widget\nmetadata: {{name: a}}\nspec: {{{size}}}\n")
}

struct Fixture {
    sandbox: Sandbox,
    kubeconfig: PathBuf,
    directory: tempfile::TempDir,
}

/// None where the machine has no kubectl.
async fn fixture() -> Option<Fixture> {
    let present = Command::new("kubectl")
        .args(["version", "--client"])
        .output()
        .is_ok_and(|out| out.status.success());
    if !present {
        println!("skipped: no kubectl on this machine");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let sandbox = Sandbox::start(Settings::new(directory.path())).await.unwrap();
    let kubeconfig = sandbox.kubeconfig_path();
    Some(Fixture {
        sandbox,
        kubeconfig,
        directory,
    })
}

impl Fixture {
    /// Runs kubectl; everything after `--stdin` of the tuple goes to its standard input.
    async fn run(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = Command::new("kubectl");
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", self.directory.path())
            .args(arguments);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let input = input.to_owned();
        tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        })
        .await
        .unwrap()
    }

    async fn ok(&self, arguments: &[&str], input: &str) -> String {
        let output = self.run(arguments, input).await;
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(output.status.success(), "kubectl {}: {out}{err}", arguments.join(" "));
        out.into_owned()
    }

    async fn refused(&self, arguments: &[&str], input: &str) -> String {
        let output = self.run(arguments, input).await;
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success(),
            "kubectl {} should fail: {err}",
            arguments.join(" ")
        );
        err
    }

    async fn stop(self) {
        self.sandbox.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_and_its_objects_are_applied_read_changed_and_deleted() {
    let Some(kubectl) = fixture().await else { return };
    kubectl.ok(&["apply", "-f", "-"], WIDGETS).await;
    kubectl
        .ok(
            &[
                "wait",
                "--for=condition=Established",
                "crd/widgets.example.dev",
                "--timeout=10s",
            ],
            "",
        )
        .await;
    assert!(
        kubectl
            .ok(&["apply", "-f", "-"], &widget("size: 2"))
            .await
            .contains("created")
    );
    assert!(
        kubectl
            .ok(&["apply", "-f", "-"], &widget("size: 2"))
            .await
            .contains("unchanged")
    );
    assert!(
        kubectl
            .ok(&["apply", "-f", "-"], &widget("size: 3"))
            .await
            .contains("configured")
    );
    let table = kubectl.ok(&["get", "wd"], "").await;
    assert!(table.starts_with("NAME   SIZE   AGE\na      3 "), "{table}");
    assert!(kubectl.ok(&["get", "all"], "").await.contains("widget.example.dev/a"));
    kubectl.ok(&["scale", "widget/a", "--replicas=4"], "").await;
    assert_eq!(
        kubectl
            .ok(&["get", "wd", "a", "-o", "jsonpath={.spec.replicas}"], "")
            .await,
        "4"
    );
    kubectl
        .ok(
            &["patch", "wd", "a", "--type=merge", "-p", r#"{"spec":{"size":5}}"#],
            "",
        )
        .await;
    let json_patch = r#"[{"op":"replace","path":"/spec/size","value":6}]"#;
    kubectl
        .ok(&["patch", "wd", "a", "--type=json", "-p", json_patch], "")
        .await;
    let columns = kubectl
        .ok(&["get", "wd", "-o", "custom-columns=S:.spec.size"], "")
        .await;
    assert_eq!(columns, "S\n6\n");
    assert!(
        kubectl
            .ok(&["explain", "widget.spec"], "")
            .await
            .contains("What the widget shall be.")
    );
    assert!(kubectl.ok(&["api-resources"], "").await.contains("widgets"));
    assert!(kubectl.ok(&["describe", "wd", "a"], "").await.contains("Size:"));
    kubectl.ok(&["delete", "wd", "a"], "").await;
    kubectl.ok(&["delete", "crd", "widgets.example.dev"], "").await;
    kubectl.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_objects_are_refused_as_kubernetes_refuses_them() {
    let Some(kubectl) = fixture().await else { return };
    kubectl.ok(&["apply", "-f", "-"], WIDGETS).await;
    let rule = kubectl.refused(&["apply", "-f", "-"], &widget("size: 30")).await;
    assert!(
        rule.contains("is invalid") && rule.contains("a widget has at most ten"),
        "{rule}"
    );
    let unknown = kubectl.refused(&["apply", "-f", "-"], &widget("size: 3, odd: 1")).await;
    assert!(
        unknown.contains(r#"strict decoding error: unknown field "spec.odd""#),
        "{unknown}"
    );
    let missing = kubectl.refused(&["apply", "-f", "-"], &widget("")).await;
    assert!(missing.contains("spec.size: Required value"), "{missing}");
    let warned = kubectl
        .run(&["apply", "--validate=warn", "-f", "-"], &widget("size: 3, odd: 1"))
        .await;
    assert!(warned.status.success());
    assert!(String::from_utf8_lossy(&warned.stderr).contains(r#"Warning: unknown field "spec.odd""#));
    kubectl.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_side_apply_reports_conflicts_and_forces() {
    let Some(kubectl) = fixture().await else { return };
    kubectl.ok(&["apply", "-f", "-"], WIDGETS).await;
    kubectl
        .ok(&["apply", "--server-side", "-f", "-"], &widget("size: 2"))
        .await;
    let other = ["apply", "--server-side", "--field-manager=other", "-f", "-"];
    let conflict = kubectl.refused(&other, &widget("size: 3")).await;
    assert!(
        conflict.contains("Apply failed with 1 conflict") && conflict.contains(".spec.size"),
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
    kubectl.ok(&force, &widget("size: 3")).await;
    let dry = [
        "apply",
        "--dry-run=server",
        "--server-side",
        "--field-manager=other",
        "-f",
        "-",
    ];
    assert!(kubectl.ok(&dry, &widget("size: 4")).await.contains("server dry run"));
    assert_eq!(
        kubectl.ok(&["get", "wd", "a", "-o", "jsonpath={.spec.size}"], "").await,
        "3"
    );
    kubectl.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn built_in_kinds_are_created_and_shown() {
    let Some(kubectl) = fixture().await else { return };
    kubectl
        .ok(&["create", "configmap", "m", "--from-literal=k=v"], "")
        .await;
    kubectl
        .ok(&["create", "secret", "generic", "s", "--from-literal=k=v"], "")
        .await;
    assert_eq!(
        kubectl
            .ok(&["get", "secret", "s", "-o", "jsonpath={.data.k}"], "")
            .await,
        "dg=="
    );
    kubectl.ok(&["create", "namespace", "extra"], "").await;
    kubectl.ok(&["label", "cm", "m", "a=b"], "").await;
    kubectl.ok(&["annotate", "cm", "m", "note=x"], "").await;
    assert!(kubectl.ok(&["get", "cm", "-l", "a=b"], "").await.contains("m      1"));
    kubectl
        .ok(&["patch", "cm", "m", "-p", r#"{"data":{"z":"1"}}"#], "")
        .await;
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers: [{name: c, image: 'i:1'}]\n";
    kubectl.ok(&["apply", "-f", "-"], pod).await;
    let table = kubectl.ok(&["get", "pods"], "").await;
    assert!(table.contains("p      0/1     Pending   0"), "{table}");
    assert!(kubectl.ok(&["describe", "pod", "p"], "").await.contains("Image:"));
    assert!(
        kubectl
            .ok(&["get", "pods", "--field-selector=status.phase=Pending"], "")
            .await
            .contains('p')
    );
    assert_eq!(kubectl.ok(&["auth", "can-i", "create", "pods"], "").await, "yes\n");
    assert!(kubectl.ok(&["auth", "whoami"], "").await.contains("sandbox-admin"));
    assert!(
        kubectl
            .ok(&["explain", "pod.spec.containers.image"], "")
            .await
            .contains("Container image name")
    );
    kubectl.ok(&["events"], "").await;
    kubectl.ok(&["delete", "pod", "p"], "").await;
    kubectl.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_prints_changes_as_they_come() {
    let Some(kubectl) = fixture().await else { return };
    let mut watch = Command::new("kubectl")
        .env("KUBECONFIG", &kubectl.kubeconfig)
        .env("HOME", kubectl.directory.path())
        .args(["get", "cm", "-w", "--request-timeout=8s"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    kubectl.ok(&["create", "configmap", "first"], "").await;
    kubectl.ok(&["create", "configmap", "second"], "").await;
    let out = tokio::task::spawn_blocking(move || {
        use std::io::{BufRead, BufReader};
        let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
        let mut seen = Vec::new();
        for line in lines.map_while(Result::ok) {
            seen.push(line);
            if seen.len() == 3 {
                break;
            }
        }
        watch.kill().ok();
        watch.wait().ok();
        seen
    })
    .await
    .unwrap();
    assert!(out[0].starts_with("NAME"), "{out:?}");
    assert!(out[1].starts_with("first") && out[2].starts_with("second"), "{out:?}");
    kubectl.stop().await;
}
