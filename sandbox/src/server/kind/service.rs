//! Services: the address stays, and the ports have names where there are several.

use serde_json::{Value, json};

use crate::schema::Cause;

/// Fills in what the strategy of services sets.
pub fn complete(object: &mut Value, old: Option<&Value>) {
    let headless = object["spec"]["clusterIP"] == "None";
    match old {
        None => object["status"] = json!({"loadBalancer": {}}),
        Some(old) => keep_address(object, old),
    }
    if headless && object["spec"]["clusterIPs"].is_null() {
        object["spec"]["clusterIPs"] = json!(["None"]);
    }
}

/// The address of a service stays, unless the service stops having one.
fn keep_address(object: &mut Value, old: &Value) {
    if object["spec"]["type"] == "ExternalName" {
        return;
    }
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        if object["spec"][field].is_null() && !old["spec"][field].is_null() {
            object["spec"][field] = old["spec"][field].clone();
        }
    }
}

/// What is wrong with a service.
#[must_use]
pub fn check(new: &Value, old: Option<&Value>) -> Vec<Cause> {
    let spec = &new["spec"];
    let mut causes = Vec::new();
    let ports = spec["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    if ports.is_empty() && spec["type"] != "ExternalName" && spec["clusterIP"] != "None" {
        causes.push(Cause::required("spec.ports", ""));
    }
    for (index, port) in ports.iter().enumerate() {
        if ports.len() > 1 && port["name"].as_str().is_none_or(str::is_empty) {
            causes.push(Cause::required(&format!("spec.ports[{index}].name"), ""));
        }
    }
    if let Some(old) = old {
        check_address(spec, &old["spec"], &mut causes);
    }
    causes
}

/// An address that was given stays the service's as long as it has one.
fn check_address(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let had = old["clusterIP"].as_str().unwrap_or_default();
    let is_typed = |spec: &Value| spec["type"] != "ExternalName";
    if !had.is_empty() && is_typed(old) && is_typed(new) && new["clusterIP"] != old["clusterIP"] {
        let why = "may not change once set";
        causes.push(Cause::invalid("spec.clusterIPs[0]", &json!([new["clusterIP"]]), why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_given_once() {
        let service = |address: Value| json!({"spec": {"clusterIP": address, "ports": [{"port": 80}]}});
        let (none, one, two) = (
            service(Value::Null),
            service(json!("10.0.0.1")),
            service(json!("10.0.0.2")),
        );
        assert_eq!(check(&one, Some(&none)), []);
        assert_eq!(check(&one, Some(&one)), []);
        assert_eq!(check(&two, Some(&one)).len(), 1);
    }
}
