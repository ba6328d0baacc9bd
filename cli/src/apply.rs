//! Documents to the API server.

use std::time::Duration;

use anyhow::{Context, bail};
use kube::{
    Api, Client, Discovery,
    api::{Patch, PatchParams},
    discovery::Scope,
};

use crate::manifest::Manifest;

/// Field manager of what `flotilla` applies.
const FIELD_MANAGER: &str = "flotilla-cli";

/// The API through which `manifest` is read and written.
pub async fn api_of(client: &Client, manifest: &Manifest) -> anyhow::Result<Api<kube::core::DynamicObject>> {
    let discovery = Discovery::new(client.clone())
        .run()
        .await
        .context("cannot ask the API server for its kinds")?;
    let Some((resource, capabilities)) = discovery.resolve_gvk(&manifest.kind) else {
        bail!(
            "{}: the API server does not know kind {} of {}",
            manifest.path.display(),
            manifest.kind.kind,
            manifest.kind.api_version()
        );
    };
    Ok(match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), &resource),
        Scope::Namespaced => Api::namespaced_with(client.clone(), manifest.namespace(), &resource),
    })
}

/// Server-side applies every manifest in order; unknown fields are errors.
pub async fn apply(client: &Client, manifests: &[Manifest]) -> anyhow::Result<()> {
    let params = PatchParams::apply(FIELD_MANAGER).force().validation_strict();
    for manifest in manifests {
        let api = api_of(client, manifest).await?;
        let name = manifest.object.metadata.name.as_deref().unwrap_or_default();
        let mut attempts = 0;
        while let Err(error) = api.patch(name, &params, &Patch::Apply(&manifest.object)).await {
            attempts += 1;
            if !is_passing(&error) || attempts == 10 {
                return Err(refusal(manifest, &error));
            }
            tokio::time::sleep(Duration::from_millis(100 * attempts)).await;
        }
    }
    Ok(())
}

/// Faults that the same request may not meet again.
fn is_passing(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => matches!(status.code, 409 | 429 | 500..),
        kube::Error::HyperError(_) | kube::Error::Service(_) => true,
        _ => false,
    }
}

fn refusal(manifest: &Manifest, error: &kube::Error) -> anyhow::Error {
    let message = match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    };
    anyhow::anyhow!(
        "{}: {} was refused: {message}",
        manifest.path.display(),
        manifest.label()
    )
}
