//! The kubeconfig of a node. It is got as a kubelet gets its own: a CertificateSigningRequest that an administrator
//! approves, so that the Node authorizer and NodeRestriction hold for the agent as they hold for a kubelet.

use std::{path::Path, time::Duration};

use anyhow::Context;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use rcgen::{CertificateParams, DnType, KeyPair};
use serde_json::json;

use super::kubeconfig;
use crate::eventually;

/// Writes `to`: the kubeconfig of node `name` of the cluster that `admin` (with `client`) administers.
pub async fn node_kubeconfig(client: &Client, admin: &Path, name: &str, to: &Path) -> anyhow::Result<()> {
    let user = format!("system:node:{name}");
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name.push(DnType::CommonName, user.as_str());
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    let key = KeyPair::generate()?;
    let request = params.serialize_request(&key)?.pem()?;
    let certificate = sign(client, name, &request).await?;

    let credentials = json!({
        "client-certificate-data": STANDARD.encode(certificate),
        "client-key-data": STANDARD.encode(key.serialize_pem()),
    });
    kubeconfig::for_user(admin, &user, &credentials, "default", to)
}

/// Has the cluster sign `request` (PEM) for the API of nodes; the certificate, PEM.
async fn sign(client: &Client, name: &str, request: &str) -> anyhow::Result<Vec<u8>> {
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let object = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "request": STANDARD.encode(request),
            "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
            "usages": ["digital signature", "client auth"],
        },
    }))?;
    requests.create(&PostParams::default(), &object).await?;
    let approval = json!({"status": {"conditions": [{
        "type": "Approved", "status": "True", "reason": "FlotillaTest", "message": "a node of the cluster tier"}]}});
    requests
        .patch_approval(name, &PatchParams::default(), &Patch::Merge(&approval))
        .await
        .context("approve the certificate of a node")?;
    let signed = eventually(
        "the certificate of a node is signed",
        Duration::from_secs(30),
        || async {
            let status = requests.get(name).await?.status;
            Ok(status.and_then(|status| status.certificate))
        },
    )
    .await?;
    requests.delete(name, &DeleteParams::default()).await?;
    Ok(signed.0)
}
