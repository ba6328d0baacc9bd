//! The pods, their role and token, and the Service before them.

use std::collections::BTreeMap;

use flotilla_api::names::{HTTP_PORT, HTTP_PORT_NAME, label};
use k8s_openapi::{
    api::core::v1::{ConfigMap, Pod, Secret, Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{
    gather::{Observed, ROLE},
    rollout::Rollout,
    validate::Plan,
};
use crate::{
    error::{Error, Result},
    owner::Owner,
    worker_pod::{WorkerPod, config_map, token_secret},
};

/// Everything that one pass writes besides the status.
#[derive(Debug)]
pub struct Objects {
    /// The address of the deployment; it is there before the first pod is.
    pub service: Service,
    /// What new pods mount; None where no pod is made.
    pub mounts: Option<(ConfigMap, Secret)>,
    /// New pods.
    pub create: Vec<Pod>,
    /// Names and UIDs of pods to stop.
    pub remove: Vec<(String, String)>,
    /// What new pods run, if that is known.
    pub revision: Option<String>,
}

/// Builds what `rollout` asks for; there is a plan whenever pods are made.
pub fn build(observed: &Observed, rollout: &Rollout, plan: Option<&Plan>, image: &str) -> Result<Objects> {
    let mut objects = Objects {
        service: service(&observed.owner),
        mounts: None,
        create: Vec::new(),
        remove: rollout.remove.clone(),
        revision: plan.map(|plan| plan.revision.clone()),
    };
    let Some(plan) = plan.filter(|_| !rollout.create.is_empty()) else {
        return Ok(objects);
    };
    let (owner, token) = (&observed.owner, observed.token());
    let role = format!("{}-{}", observed.stem, plan.revision);
    for name in &rollout.create {
        let pod = WorkerPod {
            owner,
            name: name.clone(),
            config: &plan.config,
            config_map: &role,
            token: &token,
            settings: &observed.deployment.spec.serve,
            default_image: image,
            attempt: None,
            index: None,
            revision: Some(&plan.revision),
            grace_seconds: observed.deployment.spec.drain_timeout_seconds,
        };
        objects.create.push(pod.build()?);
    }
    let what = format!("the role of {role}");
    let mut config = config_map(owner, role, &plan.config).map_err(|source| Error::Serialize { what, source })?;
    let labels = config.metadata.labels.get_or_insert_default();
    labels.insert(label::REVISION.to_owned(), plan.revision.clone());
    objects.mounts = Some((config, token_secret(owner, token, ROLE)));
    Ok(objects)
}

/// Labels that select the serving pods of a deployment, of every revision.
pub fn selector(owner: &Owner) -> BTreeMap<String, String> {
    let mut labels = owner.selector();
    labels.insert(label::ROLE.to_owned(), ROLE.to_owned());
    labels
}

fn service(owner: &Owner) -> Service {
    Service {
        metadata: owner.child(owner.name.clone(), ROLE),
        spec: Some(ServiceSpec {
            selector: Some(selector(owner)),
            ports: Some(vec![ServicePort {
                name: Some(HTTP_PORT_NAME.to_owned()),
                port: i32::from(HTTP_PORT),
                protocol: Some("TCP".to_owned()),
                target_port: Some(IntOrString::String(HTTP_PORT_NAME.to_owned())),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
