//! Subresources with a behaviour of their own: scale, log, binding, finalize.

use futures::StreamExt;
use serde_json::{Value, json};

use super::{
    call::Call,
    log::{LogError, LogOptions, LogTarget},
    reply::{self, Reply},
    status::ApiError,
    verb::update,
    view,
    write::{self, Ownership, metadata},
};
use crate::{
    patch,
    schema::Cause,
    store::object::{self, ResourceKey},
};

/// `GET …/scale`.
pub fn get_scale(call: &Call) -> Result<Reply, ApiError> {
    Ok(reply::json(200, &read_scale(call, call.stored()?.as_ref())?))
}

fn read_scale(call: &Call, stored: &Value) -> Result<Value, ApiError> {
    let paths = call.resource.scale.as_ref().ok_or_else(ApiError::no_such_path)?;
    paths.read(stored).ok_or_else(|| {
        let detail = format!("the spec replicas field \"{}\" does not exist", paths.spec_replicas);
        ApiError::internal(detail)
    })
}

/// `PUT` and `PATCH …/scale`.
pub fn write_scale(call: &Call, body: &[u8], patches: bool) -> Result<Reply, ApiError> {
    let given = if patches {
        serde_json::from_slice(body).map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?
    } else {
        reply::decode(call.content_type.as_deref(), body)?
    };
    let paths = call.resource.scale.as_ref().ok_or_else(ApiError::no_such_path)?;
    for attempt in 1.. {
        let stored = call.stored()?;
        let mut scale = read_scale(call, &stored)?;
        if !patches {
            scale = given.clone();
        } else if call
            .content_type
            .as_deref()
            .is_some_and(|media| media.starts_with("application/json-patch"))
        {
            patch::json::apply(&mut scale, &given).map_err(|error| ApiError::bad_request(error.to_string()))?;
        } else {
            patch::merge::apply(&mut scale, &given).map_err(|error| ApiError::bad_request(error.to_string()))?;
        }
        let wanted = scale["spec"]["replicas"].as_i64().unwrap_or(0);
        if wanted < 0 {
            let cause = Cause::invalid("spec.replicas", &json!(wanted), "should be a non-negative integer");
            return Err(ApiError::invalid("autoscaling", "Scale", call.name(), vec![cause]));
        }
        let version = update::version(&scale)?.filter(|_| !patches || given["metadata"]["resourceVersion"].is_string());
        if version.is_some_and(|version| version != object::revision(&stored)) {
            return Err(ApiError::modified(&call.resource.key(), call.name()));
        }
        let mut new = view::convert(&call.resource, &stored).into_owned();
        paths.write(&mut new, &scale);
        match write::update(call, &stored, new, Ownership::Update) {
            Err(error) if error.reason == "Conflict" && version.is_none() && attempt < update::ATTEMPTS => {}
            Err(error) => return Err(error),
            Ok(written) => return Ok(reply::json(200, &read_scale(call, &written)?)),
        }
    }
    Err(ApiError::internal("too many attempts"))
}

/// `POST …/pods/NAME/binding`.
pub fn bind(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let binding = reply::decode(call.content_type.as_deref(), body)?;
    let node = binding["target"]["name"]
        .as_str()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| {
            let cause = Cause::required("target.name", "");
            ApiError::invalid("", "Binding", call.name(), vec![cause])
        })?;
    for attempt in 1.. {
        let stored = call.stored()?;
        let binding = ResourceKey::new("", "pods/binding");
        let refuse = |why: String| ApiError::conflict(&binding, call.name(), &why);
        if stored["metadata"]["deletionTimestamp"].is_string() {
            return Err(refuse(format!(
                "pod {} is being deleted, cannot be assigned to a host",
                call.name()
            )));
        }
        if let Some(present) = stored["spec"]["nodeName"].as_str().filter(|name| !name.is_empty()) {
            return Err(refuse(format!(
                "pod {} is already assigned to node {present:?}",
                call.name()
            )));
        }
        let mut new = stored.as_ref().clone();
        new["spec"]["nodeName"] = json!(node);
        set_scheduled(&mut new);
        match write::store::replace(call, &stored, new) {
            Err(error) if error.reason == "Conflict" && attempt < update::ATTEMPTS => {}
            Err(error) => return Err(error),
            Ok(_) => break,
        }
    }
    Ok(reply::json(
        201,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}

fn set_scheduled(pod: &mut Value) {
    let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": metadata::now()});
    let mut conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.retain(|known| known["type"] != "PodScheduled");
    conditions.push(condition);
    pod["status"]["conditions"] = Value::Array(conditions);
}

/// `PUT /api/v1/namespaces/NAME/finalize`.
pub fn finalize(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let given = reply::decode(call.content_type.as_deref(), body)?;
    let stored = call.stored()?;
    update::check_preconditions(call, &given, &stored, update::version(&given)?)?;
    let mut new = stored.as_ref().clone();
    new["spec"]["finalizers"] = given["spec"]["finalizers"].clone();
    if new["spec"]["finalizers"].is_null() {
        new["spec"]["finalizers"] = json!([]);
    }
    let written = write::store::replace(call, &stored, new)?;
    Ok(super::verb::answer(call, 200, &written))
}

/// `GET …/pods/NAME/log`.
pub async fn log(call: &Call) -> Result<Reply, ApiError> {
    let pod = call.stored()?;
    let container = container(call, &pod)?;
    let source = call.server.pod_logs().ok_or_else(|| {
        ApiError::new(
            503,
            "ServiceUnavailable",
            "no node is attached that could read container logs",
        )
    })?;
    if pod["spec"]["nodeName"].as_str().is_none_or(str::is_empty) {
        return Ok(reply::text(200, ""));
    }
    let target = LogTarget {
        namespace: call.namespace().unwrap_or_default().to_owned(),
        pod: call.name().to_owned(),
        uid: pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned(),
        container,
    };
    let stream = source
        .open(target, log_options(call)?)
        .await
        .map_err(|error| match error {
            LogError::NotStarted(text) => ApiError::bad_request(text),
            LogError::NotFound(text) => ApiError::new(404, "NotFound", text),
            error @ LogError::Read { .. } => ApiError::internal(error),
        })?;
    // What was read before an error has been sent; all that can still be done is to end.
    let shutdown = call.server.shutdown.clone();
    let chunks = stream
        .take_while(|chunk| std::future::ready(chunk.is_ok()))
        .filter_map(|chunk| std::future::ready(chunk.ok()))
        .take_until(async move { shutdown.cancelled().await });
    Ok(reply::stream("text/plain", chunks))
}

fn container(call: &Call, pod: &Value) -> Result<String, ApiError> {
    let names = |list: &str| -> Vec<String> {
        let containers = pod["spec"][list].as_array().into_iter().flatten();
        containers
            .filter_map(|container| container["name"].as_str().map(str::to_owned))
            .collect()
    };
    let (main, init) = (names("containers"), names("initContainers"));
    let asked = call
        .query
        .pairs
        .iter()
        .find(|(key, _)| key == "container")
        .map(|(_, value)| value.as_str());
    match asked.filter(|name| !name.is_empty()) {
        Some(name) if main.iter().chain(&init).any(|known| known == name) => Ok(name.to_owned()),
        Some(name) => Err(ApiError::bad_request(format!(
            "container {name} is not valid for pod {}",
            call.name()
        ))),
        None => match main.as_slice() {
            [only] => Ok(only.clone()),
            _ => Err(ApiError::bad_request(format!(
                "a container name must be specified for pod {}, choose one of: [{}]",
                call.name(),
                main.join(" ")
            ))),
        },
    }
}

fn log_options(call: &Call) -> Result<LogOptions, ApiError> {
    LogOptions::from_pairs(call.query.pairs.clone()).map_err(ApiError::bad_request)
}
