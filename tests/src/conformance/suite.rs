//! Runs the checks, some at a time, each in a namespace of its own.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, ObjectMeta, PostParams},
};

use super::{
    TOPICS, Topic,
    check::{Check, Finding, Outcome},
    ground::Ground,
    report::Report,
    server::{Kind, Server},
};

/// Label of the suite's namespaces; its value is the suite's API group.
const RUN: &str = "conformance.flotilla.dev/run";
/// Checks in flight: most of their time they wait for the server.
const AT_ONCE: usize = 12;
/// No check waits longer for anything.
const LIMIT: Duration = Duration::from_secs(120);

/// Asks the server for everything, and leaves nothing behind. `filter`: only checks whose name contains it.
pub async fn run(server: Server, filter: &str) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let server = Arc::new(server);
    let chosen: Vec<(usize, &Topic, &Check)> = TOPICS
        .iter()
        .flat_map(|topic| topic.checks.iter().map(move |check| (topic, check)))
        .filter(|(_, check)| check.name.contains(filter))
        .enumerate()
        .map(|(index, (topic, check))| (index, topic, check))
        .collect();
    let mut findings = stream::iter(chosen)
        .map(|(index, topic, check)| {
            let server = Arc::clone(&server);
            async move {
                let begun = Instant::now();
                let outcome = outcome(server, index, topic, check).await;
                let finding = Finding {
                    topic: topic.name,
                    name: check.name,
                    outcome,
                    time: begun.elapsed(),
                };
                (index, finding)
            }
        })
        .buffer_unordered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    findings.sort_by_key(|(index, _)| *index);
    let findings = findings.into_iter().map(|(_, finding)| finding).collect();
    let time = begun.elapsed();
    clean(&server).await?;
    Ok(Report { findings, time })
}

/// Takes namespaces and definitions away. Not before the end: a controller that empties hundreds of namespaces would keep
/// those checks waiting that look at how one ends.
async fn clean(server: &Server) -> anyhow::Result<()> {
    let namespaces: Api<Namespace> = Api::all(server.client.clone());
    let own = ListParams::default().labels(&format!("{RUN}={}", server.group));
    stream::iter(namespaces.list_metadata(&own).await?.items)
        .map(|namespace| {
            let namespaces = &namespaces;
            async move { namespaces.delete(&namespace.name_any(), &DeleteParams::default()).await }
        })
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| std::future::ready(Ok(())))
        .await?;
    server.clean().await
}

async fn outcome(server: Arc<Server>, index: usize, topic: &Topic, check: &Check) -> Outcome {
    if topic.needs_kubectl && server.kubectl.is_none() {
        return Outcome::Skipped("no kubectl on this machine");
    }
    let differs = check.differs.filter(|_| server.kind == Kind::Sandbox);
    match (ask(server, index, check).await, differs) {
        (Ok(()), None) => Outcome::Holds,
        (Ok(()), Some(reason)) => Outcome::HoldsUnexpectedly(reason),
        (Err(_), Some(reason)) => Outcome::Differs(reason),
        (Err(error), None) => Outcome::Fails(format!("{error:#}")),
    }
}

async fn ask(server: Arc<Server>, index: usize, check: &Check) -> anyhow::Result<()> {
    let run = server.group.split('.').next().unwrap_or_default();
    let namespace = format!("{run}-{index}");
    let namespaces: Api<Namespace> = Api::all(server.client.clone());
    let own = Namespace {
        metadata: ObjectMeta {
            name: Some(namespace.clone()),
            labels: Some([(RUN.to_owned(), server.group.clone())].into()),
            ..ObjectMeta::default()
        },
        ..Namespace::default()
    };
    namespaces.create(&PostParams::default(), &own).await?;
    let ground = Ground {
        server,
        namespace: namespace.clone(),
    };
    let answer = tokio::time::timeout(LIMIT, (check.ask)(&ground)).await;
    answer.unwrap_or_else(|_| Err(anyhow::anyhow!("no end within {LIMIT:?}")))
}
