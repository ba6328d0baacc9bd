//! The kubeconfig of a service account, as its pods would have it: with a token and nothing else.

use std::path::Path;

use anyhow::Context;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{Api, Client, api::PostParams};
use serde_json::json;

use super::kubeconfig;

/// Writes `to`: the kubeconfig of service account `name` of the cluster that `admin` (with `client`) administers.
pub async fn service_account_kubeconfig(
    client: &Client,
    admin: &Path,
    (namespace, name): (&str, &str),
    to: &Path,
) -> anyhow::Result<()> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            expiration_seconds: Some(3600),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let answer = accounts
        .create_token_request(name, &PostParams::default(), &request)
        .await?;
    let token = answer.status.context("a token")?.token;

    kubeconfig::for_user(admin, name, &json!({"token": token}), namespace, to)
}
