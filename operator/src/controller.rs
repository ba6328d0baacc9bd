//! Drives one kind: takes names from its queue, runs its passes with bounded concurrency, counts and times them.

use std::{fmt::Debug, future::Future, sync::Arc, time::Instant};

use futures::{StreamExt as _, channel::mpsc::UnboundedReceiver, future::BoxFuture};
use kube::{
    Resource,
    runtime::{
        applier,
        controller::{Action, Config, Error as ControllerError},
        reflector::{ObjectRef, Store},
    },
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    calm::calm,
    compute::measured,
    context::Context,
    error::{Error, Result},
};

/// Runs passes of one kind until `shutdown`, then waits for those that run.
pub async fn drive<K, R, F>(
    reconcile: R,
    store: Store<K>,
    queue: UnboundedReceiver<ObjectRef<K>>,
    context: Arc<Context>,
    shutdown: CancellationToken,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
    R: Fn(Arc<K>, Arc<Context>) -> F + Copy + Send + 'static,
    F: Future<Output = Result<Action>> + Send + 'static,
{
    let config = Config::default().concurrency(context.config.concurrency);
    let queue = calm(queue).map(Ok::<_, std::convert::Infallible>);
    let queue = queue.take_until(async move { shutdown.cancelled().await });
    let passes = applier(
        move |object, context| pass(reconcile, object, context),
        |object, error, context| context.failed(&key(object.as_ref()), error),
        context,
        store,
        queue,
        config,
    );
    let mut passes = std::pin::pin!(passes);
    while let Some(outcome) = passes.next().await {
        match outcome {
            Ok(_) | Err(ControllerError::ObjectNotFound(_)) => {}
            Err(ControllerError::ReconcilerFailed(error, object)) => {
                tracing::warn!(%object, %error, "pass failed, trying again");
            }
            Err(error) => tracing::error!(kind = %K::kind(&()), %error, "controller queue"),
        }
    }
}

fn pass<K, R, F>(reconcile: R, object: Arc<K>, context: Arc<Context>) -> BoxFuture<'static, Result<Action>>
where
    K: Resource<DynamicType = ()> + Send + Sync + 'static,
    R: Fn(Arc<K>, Arc<Context>) -> F + Send + 'static,
    F: Future<Output = Result<Action>> + Send + 'static,
{
    let span = tracing::info_span!("reconcile", kind = %K::kind(&()), object = key(object.as_ref()));
    let body = async move {
        let begun = Instant::now();
        let key = key(object.as_ref());
        let (result, computed) = measured(reconcile(object, Arc::clone(&context))).await;
        let error = result.as_ref().err().map(Error::class);
        context.metrics.passed(&K::kind(&()), begun.elapsed(), computed, error);
        if result.is_ok() {
            context.succeeded(&key);
        }
        result
    };
    Box::pin(body.instrument(span))
}

fn key<K: Resource<DynamicType = ()>>(object: &K) -> String {
    let meta = object.meta();
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    format!("{}/{}/{}", K::kind(&()), part(&meta.namespace), part(&meta.name))
}
