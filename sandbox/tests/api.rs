//! The API server as `kube::Client` sees it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails the test")]

use std::{collections::BTreeMap, time::Duration};

use futures::StreamExt;
use k8s_openapi::{
    api::core::v1::{ConfigMap, Event, Namespace, Pod, Secret},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{
        ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, PropagationPolicy,
        WatchEvent, WatchParams,
    },
    core::{GroupVersionKind, Status},
};
use serde_json::{Value, json};

use flotilla_sandbox::{
    Sandbox, Settings,
    fault::{Failure, Rule},
};

struct Fixture {
    sandbox: Sandbox,
    client: Client,
    _directory: tempfile::TempDir,
}

async fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings {
        bookmark_period: Duration::from_millis(200),
        ..Settings::new(directory.path())
    };
    let sandbox = Sandbox::start(settings).await.unwrap();
    let client = sandbox.client().await.unwrap();
    Fixture {
        sandbox,
        client,
        _directory: directory,
    }
}

fn config_map(name: &str, data: &[(&str, &str)]) -> ConfigMap {
    let data: BTreeMap<String, String> = data.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    ConfigMap {
        metadata: kube::api::ObjectMeta {
            name: Some(name.into()),
            ..Default::default()
        },
        data: Some(data),
        ..Default::default()
    }
}

fn status(error: kube::Error) -> Box<Status> {
    match error {
        kube::Error::Api(status) => status,
        other => panic!("not an answer of the server: {other}"),
    }
}

fn widgets() -> CustomResourceDefinition {
    serde_json::from_value(json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.dev"},
        "spec": {
            "group": "example.dev", "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wd"]},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "subresources": {"status": {}, "scale": {
                    "specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"}},
                "additionalPrinterColumns": [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"}],
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object", "required": ["size"], "properties": {
                        "size": {"type": "integer", "minimum": 1},
                        "replicas": {"type": "integer", "default": 1},
                        "mode": {"type": "string", "enum": ["a", "b"]}},
                        "x-kubernetes-validations": [
                            {"rule": "self.size <= 10", "message": "a widget has at most ten"}]},
                    "status": {"type": "object", "properties": {
                        "replicas": {"type": "integer"}, "phase": {"type": "string"}}}}}}
            }]
        }
    }))
    .unwrap()
}

async fn widget_api(client: &Client) -> Api<DynamicObject> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    definitions.create(&PostParams::default(), &widgets()).await.unwrap();
    let kind = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("example.dev", "v1", "Widget"), "widgets");
    Api::default_namespaced_with(client.clone(), &kind)
}

fn widget(name: &str, spec: &Value) -> DynamicObject {
    serde_json::from_value(
        json!({"apiVersion": "example.dev/v1", "kind": "Widget", "metadata": {"name": name}, "spec": spec}),
    )
    .unwrap()
}

#[tokio::test]
async fn a_wrong_token_is_unauthorized() {
    let fixture = fixture().await;
    let mut config = fixture.sandbox.client_config().await.unwrap();
    config.auth_info.token = Some("no".to_owned().into());
    let client = Client::try_from(config).unwrap();
    let error = Api::<Namespace>::all(client)
        .list(&ListParams::default())
        .await
        .unwrap_err();
    assert_eq!(status(error).code, 401);
}

#[tokio::test]
async fn an_object_is_created_read_replaced_and_deleted() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let made = maps
        .create(&PostParams::default(), &config_map("a", &[("k", "1")]))
        .await
        .unwrap();
    assert!(made.uid().is_some() && made.creation_timestamp().is_some() && made.resource_version().is_some());
    let mut read = maps.get("a").await.unwrap();
    read.data = Some([("k".to_owned(), "2".to_owned())].into());
    let replaced = maps.replace("a", &PostParams::default(), &read).await.unwrap();
    assert_ne!(replaced.resource_version(), made.resource_version());
    let stale = maps.replace("a", &PostParams::default(), &made).await.unwrap_err();
    assert_eq!(status(stale).reason, "Conflict");
    let gone = maps.delete("a", &DeleteParams::default()).await.unwrap();
    assert!(gone.is_right());
    assert_eq!(
        status(maps.get("a").await.unwrap_err()).message,
        "configmaps \"a\" not found"
    );
}

#[tokio::test]
async fn a_second_object_of_a_name_already_exists_and_generated_names_differ() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    maps.create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap();
    let error = maps
        .create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap_err();
    assert_eq!(status(error).reason, "AlreadyExists");
    let mut generated = config_map("", &[]);
    generated.metadata.name = None;
    generated.metadata.generate_name = Some("g-".into());
    let first = maps.create(&PostParams::default(), &generated).await.unwrap();
    let second = maps.create(&PostParams::default(), &generated).await.unwrap();
    assert!(first.name_any().starts_with("g-") && first.name_any() != second.name_any());
}

#[tokio::test]
async fn an_update_that_changes_nothing_writes_nothing() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let made = maps
        .create(&PostParams::default(), &config_map("a", &[("k", "1")]))
        .await
        .unwrap();
    let same = maps.replace("a", &PostParams::default(), &made).await.unwrap();
    assert_eq!(same.resource_version(), made.resource_version());
}

#[tokio::test]
async fn a_dry_run_leaves_nothing_behind() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let before = fixture.sandbox.revision();
    let dry = PostParams {
        dry_run: true,
        ..Default::default()
    };
    maps.create(&dry, &config_map("a", &[])).await.unwrap();
    assert_eq!(maps.get_opt("a").await.unwrap(), None);
    assert_eq!(fixture.sandbox.revision(), before);
}

#[tokio::test]
async fn pages_show_one_revision() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    for index in 0..5 {
        maps.create(&PostParams::default(), &config_map(&format!("m{index}"), &[]))
            .await
            .unwrap();
    }
    let first = maps.list(&ListParams::default().limit(2)).await.unwrap();
    assert_eq!(first.metadata.remaining_item_count, Some(3));
    maps.delete("m4", &DeleteParams::default()).await.unwrap();
    let token = first.metadata.continue_.unwrap();
    let second = maps.list(&ListParams::default().continue_token(&token)).await.unwrap();
    assert_eq!(
        second.items.iter().map(ResourceExt::name_any).collect::<Vec<_>>(),
        ["m2", "m3", "m4"]
    );
    fixture.sandbox.compact();
    maps.create(&PostParams::default(), &config_map("n", &[]))
        .await
        .unwrap();
    let error = maps
        .list(&ListParams::default().continue_token(&token))
        .await
        .unwrap_err();
    assert_eq!(status(error).code, 410);
}

#[tokio::test]
async fn a_watch_shows_what_happens_after_its_version_and_bookmarks() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let version = maps
        .list(&ListParams::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    maps.create(&PostParams::default(), &config_map("a", &[("k", "1")]))
        .await
        .unwrap();
    let mut events = maps.watch(&WatchParams::default(), &version).await.unwrap().boxed();
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Added(map))) if map.name_any() == "a"));
    maps.patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"k": "2"}})))
        .await
        .unwrap();
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Modified(_)))));
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Deleted(_)))));
    let Some(Ok(WatchEvent::Bookmark(bookmark))) = events.next().await else {
        panic!("no bookmark")
    };
    assert_eq!(
        bookmark.metadata.resource_version,
        fixture.sandbox.revision().to_string()
    );
}

#[tokio::test]
async fn an_object_that_leaves_the_selection_of_a_watch_is_deleted_for_it() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let mut labelled = config_map("a", &[]);
    labelled.metadata.labels = Some([("x".to_owned(), "1".to_owned())].into());
    maps.create(&PostParams::default(), &labelled).await.unwrap();
    let mut events = maps
        .watch(&WatchParams::default().labels("x=1"), "0")
        .await
        .unwrap()
        .boxed();
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Added(_)))));
    let relabel = json!({"metadata": {"labels": {"x": "2"}}});
    maps.patch("a", &PatchParams::default(), &Patch::Merge(relabel))
        .await
        .unwrap();
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Deleted(_)))));
}

#[tokio::test]
async fn a_watch_from_a_forgotten_version_is_gone() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let version = maps
        .list(&ListParams::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    maps.create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap();
    fixture.sandbox.compact();
    let mut events = maps.watch(&WatchParams::default(), &version).await.unwrap().boxed();
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Error(error))) if error.code == 410));
}

#[tokio::test]
async fn a_watcher_survives_dropped_watches() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let config = kube::runtime::watcher::Config::default().streaming_lists();
    let mut events = kube::runtime::watcher(maps.clone(), config).boxed();
    let mut seen = Vec::new();
    let mut step = 0;
    let deadline = tokio::time::sleep(Duration::from_secs(20));
    tokio::pin!(deadline);
    while seen != ["a", "b"] {
        tokio::select! {
            () = &mut deadline => panic!("saw only {seen:?}"),
            event = events.next() => match event.unwrap() {
                Ok(kube::runtime::watcher::Event::InitDone) if step == 0 => {
                    step = 1;
                    maps.create(&PostParams::default(), &config_map("a", &[])).await.unwrap();
                }
                Ok(kube::runtime::watcher::Event::Apply(map)) => {
                    seen.push(map.name_any());
                    if step == 1 {
                        step = 2;
                        fixture.sandbox.drop_watches();
                        maps.create(&PostParams::default(), &config_map("b", &[])).await.unwrap();
                    }
                }
                _ => {}
            },
        }
    }
}

#[tokio::test]
async fn finalizers_keep_an_object_until_the_last_is_gone() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    let mut held = config_map("a", &[]);
    held.metadata.finalizers = Some(vec!["example.dev/x".into()]);
    maps.create(&PostParams::default(), &held).await.unwrap();
    let marked = maps
        .delete("a", &DeleteParams::default())
        .await
        .unwrap()
        .left()
        .unwrap();
    assert!(marked.metadata.deletion_timestamp.is_some());
    let more = json!({"metadata": {"finalizers": ["example.dev/x", "example.dev/y"]}});
    let error = maps
        .patch("a", &PatchParams::default(), &Patch::Merge(more))
        .await
        .unwrap_err();
    assert_eq!(status(error).code, 422);
    let none = json!({"metadata": {"finalizers": null}});
    maps.patch("a", &PatchParams::default(), &Patch::Merge(none))
        .await
        .unwrap();
    assert_eq!(maps.get_opt("a").await.unwrap(), None);
}

#[tokio::test]
async fn foreground_deletion_waits_for_the_garbage_collector() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    maps.create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap();
    let foreground = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Foreground),
        ..Default::default()
    };
    let marked = maps.delete("a", &foreground).await.unwrap().left().unwrap();
    assert_eq!(marked.finalizers(), ["foregroundDeletion"]);
}

#[tokio::test]
async fn a_pod_gets_its_defaults_and_a_bound_one_ends_gracefully() {
    let fixture = fixture().await;
    let pods: Api<Pod> = Api::default_namespaced(fixture.client.clone());
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n",
        "containers": [{"name": "c", "image": "i:1"}]}}))
    .unwrap();
    let made = pods.create(&PostParams::default(), &pod).await.unwrap();
    let spec = made.spec.unwrap();
    assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
    assert_eq!(spec.containers[0].image_pull_policy.as_deref(), Some("IfNotPresent"));
    assert_eq!(made.status.unwrap().phase.as_deref(), Some("Pending"));
    let marked = pods
        .delete("p", &DeleteParams::default())
        .await
        .unwrap()
        .left()
        .unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    let now = DeleteParams {
        grace_period_seconds: Some(0),
        ..Default::default()
    };
    pods.delete("p", &now).await.unwrap();
    assert_eq!(pods.get_opt("p").await.unwrap(), None);
}

#[tokio::test]
async fn string_data_of_a_secret_is_stored_encoded() {
    let fixture = fixture().await;
    let secrets: Api<Secret> = Api::default_namespaced(fixture.client.clone());
    let secret: Secret = serde_json::from_value(json!({"metadata": {"name": "s"}, "stringData": {"k": "v"}})).unwrap();
    let made = secrets.create(&PostParams::default(), &secret).await.unwrap();
    assert_eq!(made.data.unwrap()["k"].0, b"v");
    assert_eq!(made.type_.as_deref(), Some("Opaque"));
}

#[tokio::test]
async fn an_event_of_either_api_is_seen_in_both() {
    let fixture = fixture().await;
    let new: Api<k8s_openapi::api::events::v1::Event> = Api::default_namespaced(fixture.client.clone());
    let event = serde_json::from_value(
        json!({"metadata": {"name": "e"}, "note": "x", "reason": "R", "type": "Normal",
        "action": "A", "eventTime": "2024-01-01T00:00:00.000000Z", "reportingController": "c",
        "reportingInstance": "i", "regarding": {"kind": "Pod", "name": "p", "namespace": "default"}}),
    )
    .unwrap();
    new.create(&PostParams::default(), &event).await.unwrap();
    let old: Api<Event> = Api::default_namespaced(fixture.client.clone());
    let found = old
        .list(&ListParams::default().fields("involvedObject.name=p"))
        .await
        .unwrap();
    assert_eq!(found.items[0].message.as_deref(), Some("x"));
}

#[tokio::test]
async fn a_namespace_that_is_missing_or_ending_takes_nothing_new() {
    let fixture = fixture().await;
    let namespaces: Api<Namespace> = Api::all(fixture.client.clone());
    let maps: Api<ConfigMap> = Api::namespaced(fixture.client.clone(), "x");
    let error = maps
        .create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap_err();
    assert_eq!(status(error).message, "namespaces \"x\" not found");
    let namespace = serde_json::from_value(json!({"metadata": {"name": "x"}})).unwrap();
    namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    maps.create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap();
    namespaces.delete("x", &DeleteParams::default()).await.unwrap();
    let ending = namespaces.get("x").await.unwrap();
    assert_eq!(ending.status.unwrap().phase.as_deref(), Some("Terminating"));
    let error = maps
        .create(&PostParams::default(), &config_map("b", &[]))
        .await
        .unwrap_err();
    assert_eq!(status(error).code, 403);
}

#[tokio::test]
async fn a_custom_resource_is_pruned_defaulted_and_validated() {
    let fixture = fixture().await;
    let api = widget_api(&fixture.client).await;
    let made = api
        .create(&PostParams::default(), &widget("a", &json!({"size": 1, "odd": 2})))
        .await
        .unwrap();
    assert_eq!(made.data["spec"], json!({"size": 1, "replicas": 1}));
    assert_eq!(made.metadata.generation, Some(1));
    let error = status(
        api.create(&PostParams::default(), &widget("b", &json!({"size": 11})))
            .await
            .unwrap_err(),
    );
    assert_eq!((error.code, error.reason.as_str()), (422, "Invalid"));
    assert!(error.message.contains("a widget has at most ten"), "{}", error.message);
    let error = status(
        api.create(&PostParams::default(), &widget("b", &json!({"mode": "c"})))
            .await
            .unwrap_err(),
    );
    // The third says that rules were not checked.
    assert_eq!(error.details.unwrap().causes.len(), 3, "{}", error.message);
}

#[tokio::test]
async fn generation_counts_changes_of_the_spec_only() {
    let fixture = fixture().await;
    let api = widget_api(&fixture.client).await;
    api.create(&PostParams::default(), &widget("a", &json!({"size": 1})))
        .await
        .unwrap();
    let params = PatchParams::default();
    let status_change = json!({"status": {"phase": "x"}, "spec": {"size": 9}});
    let after = api
        .patch_status("a", &params, &Patch::Merge(status_change))
        .await
        .unwrap();
    assert_eq!(
        (after.metadata.generation, &after.data["spec"]["size"]),
        (Some(1), &json!(1))
    );
    assert_eq!(after.data["status"]["phase"], "x");
    let after = api
        .patch(
            "a",
            &params,
            &Patch::Merge(json!({"status": {"phase": "y"}, "spec": {"size": 2}})),
        )
        .await
        .unwrap();
    assert_eq!(after.metadata.generation, Some(2));
    assert_eq!(after.data["status"]["phase"], "x");
}

#[tokio::test]
async fn scale_reads_and_writes_the_replicas() {
    let fixture = fixture().await;
    let api = widget_api(&fixture.client).await;
    api.create(&PostParams::default(), &widget("a", &json!({"size": 1})))
        .await
        .unwrap();
    let scale = api.get_scale("a").await.unwrap();
    assert_eq!(scale.spec.unwrap().replicas, Some(1));
    let patch = Patch::Merge(json!({"spec": {"replicas": 3}}));
    api.patch_scale("a", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(api.get("a").await.unwrap().data["spec"]["replicas"], 3);
}

#[tokio::test]
async fn server_side_apply_has_owners_and_conflicts() {
    let fixture = fixture().await;
    let api = widget_api(&fixture.client).await;
    let config = |size: i64| json!({"apiVersion": "example.dev/v1", "kind": "Widget", "metadata": {"name": "a"}, "spec": {"size": size}});
    let one = PatchParams::apply("one");
    let made = api.patch("a", &one, &Patch::Apply(config(1))).await.unwrap();
    let again = api.patch("a", &one, &Patch::Apply(config(1))).await.unwrap();
    assert_eq!(made.resource_version(), again.resource_version());
    let error = status(
        api.patch("a", &PatchParams::apply("two"), &Patch::Apply(config(2)))
            .await
            .unwrap_err(),
    );
    assert_eq!(error.code, 409);
    assert_eq!(error.details.unwrap().causes[0].reason, "FieldManagerConflict");
    let forced = api
        .patch("a", &PatchParams::apply("two").force(), &Patch::Apply(config(2)))
        .await
        .unwrap();
    assert_eq!(forced.data["spec"]["size"], 2);
}

#[tokio::test]
async fn a_definition_takes_its_objects_with_it() {
    let fixture = fixture().await;
    let api = widget_api(&fixture.client).await;
    api.create(&PostParams::default(), &widget("a", &json!({"size": 1})))
        .await
        .unwrap();
    let definitions: Api<CustomResourceDefinition> = Api::all(fixture.client.clone());
    definitions
        .delete("widgets.example.dev", &DeleteParams::default())
        .await
        .unwrap();
    assert_eq!(definitions.get_opt("widgets.example.dev").await.unwrap(), None);
    assert_eq!(status(api.get("a").await.unwrap_err()).code, 404);
}

#[tokio::test]
async fn injected_failures_are_answered_and_end() {
    let fixture = fixture().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(fixture.client.clone());
    fixture.sandbox.faults().set(
        1,
        vec![Rule {
            verbs: vec!["create".into()],
            resources: vec![],
            failure: Failure::Conflict,
            probability: 1.0,
            remaining: Some(1),
        }],
    );
    let error = maps
        .create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap_err();
    assert_eq!(status(error).code, 409);
    maps.create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap();
}

#[tokio::test]
async fn state_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let sandbox = Sandbox::start(Settings::new(directory.path())).await.unwrap();
    let maps: Api<ConfigMap> = Api::default_namespaced(sandbox.client().await.unwrap());
    let made = maps
        .create(&PostParams::default(), &config_map("a", &[]))
        .await
        .unwrap();
    let revision = sandbox.revision();
    assert!(
        Sandbox::start(Settings::new(directory.path())).await.is_err(),
        "two servers in one directory"
    );
    sandbox.shutdown().await.unwrap();
    let sandbox = Sandbox::start(Settings::new(directory.path())).await.unwrap();
    assert_eq!(sandbox.revision(), revision);
    // The client of before the restart goes on: port, token and certificates are the same.
    assert_eq!(maps.get("a").await.unwrap(), made);
    sandbox.shutdown().await.unwrap();
}
