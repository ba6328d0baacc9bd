//! Columns and cells of the built-in kinds but pods (kubernetes `pkg/printers/internalversion`).

use serde_json::{Value, json};

use super::{
    Layout,
    cell::{self, count, joined, name, object_age, text},
    column,
};

type Cells = Vec<Value>;
type Headings = &'static [(&'static str, i64)];

/// The layout of a built-in resource; name and creation time where nothing better is known.
#[must_use]
pub fn layout(plural: &str) -> Layout {
    let (headings, row): (Headings, fn(&Value) -> Cells) = match plural {
        "namespaces" => (&[("Status", 0), ("Age", 0)], namespace),
        "nodes" => (NODE, node),
        "configmaps" => (&[("Data", 0), ("Age", 0)], config_map),
        "secrets" => (&[("Type", 0), ("Data", 0), ("Age", 0)], secret),
        "serviceaccounts" => (&[("Secrets", 0), ("Age", 0)], service_account),
        "services" => (SERVICE, service),
        "endpoints" => (&[("Endpoints", 0), ("Age", 0)], endpoints),
        "endpointslices" => (
            &[("AddressType", 0), ("Ports", 0), ("Endpoints", 0), ("Age", 0)],
            endpoint_slice,
        ),
        "events" => (EVENT, event),
        "persistentvolumeclaims" => (CLAIM, claim),
        "leases" => (&[("Holder", 0), ("Age", 0)], lease),
        "customresourcedefinitions" => (&[("Created At", 0)], definition),
        "roles" | "clusterroles" => (&[("Created At", 0)], definition),
        "rolebindings" | "clusterrolebindings" => (&[("Role", 0), ("Age", 0)], role_binding),
        "priorityclasses" => (&[("Value", 0), ("Global-Default", 0), ("Age", 0)], priority_class),
        "poddisruptionbudgets" => (
            &[
                ("Min Available", 0),
                ("Max Unavailable", 0),
                ("Allowed Disruptions", 0),
                ("Age", 0),
            ],
            disruption_budget,
        ),
        "networkpolicies" => (&[("Pod-Selector", 0), ("Age", 0)], network_policy),
        _ => (&[("Age", 0)], plain),
    };
    let mut columns = Vec::with_capacity(headings.len() + 1);
    // An event has no column for its name but under -o wide.
    if plural != "events" {
        columns.push(column("Name", "string", 0));
    }
    columns.extend(
        headings
            .iter()
            .map(|(heading, priority)| column(heading, "string", *priority)),
    );
    Layout { columns, row }
}

const NODE: Headings = &[
    ("Status", 0),
    ("Roles", 0),
    ("Age", 0),
    ("Version", 0),
    ("Internal-IP", 1),
    ("External-IP", 1),
    ("OS-Image", 1),
    ("Kernel-Version", 1),
    ("Container-Runtime", 1),
];

const SERVICE: Headings = &[
    ("Type", 0),
    ("Cluster-IP", 0),
    ("External-IP", 0),
    ("Port(s)", 0),
    ("Age", 0),
    ("Selector", 1),
];

const EVENT: Headings = &[
    ("Last Seen", 0),
    ("Type", 0),
    ("Reason", 0),
    ("Object", 0),
    ("Subobject", 1),
    ("Source", 1),
    ("Message", 0),
    ("First Seen", 1),
    ("Count", 1),
    ("Name", 1),
];

const CLAIM: Headings = &[
    ("Status", 0),
    ("Volume", 0),
    ("Capacity", 0),
    ("Access Modes", 0),
    ("StorageClass", 0),
    ("VolumeAttributesClass", 0),
    ("Age", 0),
    ("VolumeMode", 1),
];

fn plain(object: &Value) -> Cells {
    vec![name(object), object_age(object)]
}

fn namespace(object: &Value) -> Cells {
    vec![name(object), text(&object["status"]["phase"], ""), object_age(object)]
}

fn node(object: &Value) -> Cells {
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    let ready = conditions.into_iter().find(|condition| condition["type"] == "Ready");
    let mut state = match ready.map(|condition| condition["status"] == "True") {
        Some(true) => "Ready".to_owned(),
        Some(false) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if object["spec"]["unschedulable"] == true {
        state.push_str(",SchedulingDisabled");
    }
    let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
    let roles = labels.filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/"));
    let address = |kind: &str| {
        let addresses = object["status"]["addresses"].as_array().into_iter().flatten();
        let found = addresses.into_iter().find(|address| address["type"] == kind);
        found.map_or(json!("<none>"), |address| text(&address["address"], "<none>"))
    };
    let info = &object["status"]["nodeInfo"];
    vec![
        name(object),
        json!(state),
        joined(roles, "<none>"),
        object_age(object),
        text(&info["kubeletVersion"], ""),
        address("InternalIP"),
        address("ExternalIP"),
        text(&info["osImage"], "<unknown>"),
        text(&info["kernelVersion"], "<unknown>"),
        text(&info["containerRuntimeVersion"], "<unknown>"),
    ]
}

fn config_map(object: &Value) -> Cells {
    vec![
        name(object),
        json!(count(&object["data"]) + count(&object["binaryData"])),
        object_age(object),
    ]
}

fn secret(object: &Value) -> Cells {
    vec![
        name(object),
        text(&object["type"], ""),
        json!(count(&object["data"])),
        object_age(object),
    ]
}

fn service_account(object: &Value) -> Cells {
    vec![name(object), json!(count(&object["secrets"])), object_age(object)]
}

fn service(object: &Value) -> Cells {
    let spec = &object["spec"];
    let ports: Vec<String> = spec["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(service_port)
        .collect();
    vec![
        name(object),
        text(&spec["type"], "ClusterIP"),
        text(&spec["clusterIP"], "<none>"),
        text(&spec["externalName"], "<none>"),
        joined(ports.iter().map(String::as_str), "<none>"),
        object_age(object),
        selector(&spec["selector"]),
    ]
}

fn service_port(port: &Value) -> String {
    let protocol = port["protocol"].as_str().unwrap_or("TCP");
    match port["nodePort"].as_i64().filter(|number| *number != 0) {
        Some(node) => format!("{}:{node}/{protocol}", port["port"]),
        None => format!("{}/{protocol}", port["port"]),
    }
}

fn selector(value: &Value) -> Value {
    let pairs: Vec<String> = value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    joined(pairs.iter().map(String::as_str), "<none>")
}

fn endpoints(object: &Value) -> Cells {
    let mut found = Vec::new();
    for subset in object["subsets"].as_array().into_iter().flatten() {
        for address in subset["addresses"].as_array().into_iter().flatten() {
            for port in subset["ports"].as_array().into_iter().flatten() {
                found.push(format!(
                    "{}:{}",
                    address["ip"].as_str().unwrap_or_default(),
                    port["port"]
                ));
            }
        }
    }
    vec![name(object), shortened(&found), object_age(object)]
}

fn shortened(all: &[String]) -> Value {
    let first = joined(all.iter().take(3).map(String::as_str), "<none>");
    match all.len() {
        0..=3 => first,
        many => json!(format!("{} + {} more...", first.as_str().unwrap_or_default(), many - 3)),
    }
}

fn endpoint_slice(object: &Value) -> Cells {
    let ports: Vec<String> = object["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| port["port"].to_string())
        .collect();
    let mut addresses = Vec::new();
    for endpoint in object["endpoints"].as_array().into_iter().flatten() {
        addresses.extend(
            endpoint["addresses"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned),
        );
    }
    vec![
        name(object),
        text(&object["addressType"], ""),
        joined(ports.iter().map(String::as_str), "<unset>"),
        shortened(&addresses),
        object_age(object),
    ]
}

fn event(object: &Value) -> Cells {
    // Both views of an event come here; each has its own names.
    let either = |core: &str, new: &str| {
        if object[core].is_null() {
            object[new].clone()
        } else {
            object[core].clone()
        }
    };
    let first = either("firstTimestamp", "deprecatedFirstTimestamp");
    let first = if first.is_null() {
        object["eventTime"].clone()
    } else {
        first
    };
    let series = &object["series"]["lastObservedTime"];
    let last = either("lastTimestamp", "deprecatedLastTimestamp");
    let last = [series, &last, &first]
        .into_iter()
        .find(|time| time.is_string())
        .cloned()
        .unwrap_or_default();
    let about = either("involvedObject", "regarding");
    let kind = about["kind"].as_str().unwrap_or_default().to_lowercase();
    let source = either("source", "deprecatedSource");
    let component = text(
        &source["component"],
        either("reportingComponent", "reportingController")
            .as_str()
            .unwrap_or(""),
    );
    let message = either("message", "note");
    let times = object["series"]["count"]
        .as_i64()
        .or_else(|| either("count", "deprecatedCount").as_i64())
        .unwrap_or(1);
    vec![
        cell::age(&last),
        text(&object["type"], ""),
        text(&object["reason"], ""),
        json!(format!("{kind}/{}", about["name"].as_str().unwrap_or_default())),
        text(&about["fieldPath"], ""),
        component,
        json!(message.as_str().unwrap_or_default().trim()),
        cell::age(&first),
        json!(times),
        name(object),
    ]
}

fn claim(object: &Value) -> Cells {
    let deleting = object["metadata"]["deletionTimestamp"].is_string();
    let short = |mode: &str| match mode {
        "ReadWriteOnce" => "RWO",
        "ReadOnlyMany" => "ROX",
        "ReadWriteMany" => "RWX",
        "ReadWriteOncePod" => "RWOP",
        _ => "",
    };
    let modes = object["status"]["accessModes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(short);
    vec![
        name(object),
        if deleting {
            json!("Terminating")
        } else {
            text(&object["status"]["phase"], "")
        },
        text(&object["spec"]["volumeName"], ""),
        text(&object["status"]["capacity"]["storage"], ""),
        joined(modes, ""),
        text(&object["spec"]["storageClassName"], ""),
        text(&object["spec"]["volumeAttributesClassName"], "<unset>"),
        object_age(object),
        text(&object["spec"]["volumeMode"], "<unset>"),
    ]
}

fn lease(object: &Value) -> Cells {
    vec![
        name(object),
        text(&object["spec"]["holderIdentity"], ""),
        object_age(object),
    ]
}

fn definition(object: &Value) -> Cells {
    vec![name(object), text(&object["metadata"]["creationTimestamp"], "")]
}

fn role_binding(object: &Value) -> Cells {
    let role = &object["roleRef"];
    let role = format!(
        "{}/{}",
        role["kind"].as_str().unwrap_or_default(),
        role["name"].as_str().unwrap_or_default()
    );
    vec![name(object), json!(role), object_age(object)]
}

fn priority_class(object: &Value) -> Cells {
    let value = object["value"].as_i64().unwrap_or(0);
    vec![
        name(object),
        json!(value),
        json!(object["globalDefault"] == true),
        object_age(object),
    ]
}

fn disruption_budget(object: &Value) -> Cells {
    let shown = |value: &Value| match value {
        Value::Null => json!("N/A"),
        Value::String(text) => json!(text),
        other => json!(other.to_string()),
    };
    let spec = &object["spec"];
    vec![
        name(object),
        shown(&spec["minAvailable"]),
        shown(&spec["maxUnavailable"]),
        json!(object["status"]["disruptionsAllowed"].as_i64().unwrap_or(0)),
        object_age(object),
    ]
}

fn network_policy(object: &Value) -> Cells {
    vec![
        name(object),
        selector(&object["spec"]["podSelector"]["matchLabels"]),
        object_age(object),
    ]
}
