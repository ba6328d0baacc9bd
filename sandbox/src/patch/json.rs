//! JSON patch (RFC 6902).

use serde_json::Value;

use super::PatchError;

/// Most operations that one patch may have, as on the API server.
const MAX_OPERATIONS: usize = 10_000;

/// Applies the operations of `patch` in order; on failure `object` is unchanged.
///
/// # Errors
/// When the patch is not a list of operations (400), or an operation does not fit, `test` included (422).
pub fn apply(object: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let count = patch.as_array().map_or(0, Vec::len);
    if count > MAX_OPERATIONS {
        let message = format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {count}");
        return Err(PatchError::Malformed(message));
    }
    let operations: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|error| PatchError::Malformed(format!("error decoding patch: {error}")))?;
    // Which operation did not fit is not told there, either.
    json_patch::patch(object, &operations).map_err(|_| {
        PatchError::Unprocessable("the server rejected our request due to an error in our request".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn operations_apply_in_order() {
        let mut object = json!({"a": [1], "b": {"c/d": 1}});
        let patch = json!([{"op": "test", "path": "/a/0", "value": 1}, {"op": "add", "path": "/a/-", "value": 2},
            {"op": "replace", "path": "/b/c~1d", "value": 3}, {"op": "copy", "from": "/a", "path": "/e"}]);
        apply(&mut object, &patch).unwrap();
        assert_eq!(object, json!({"a": [1, 2], "b": {"c/d": 3}, "e": [1, 2]}));
    }

    #[test]
    fn a_failed_test_leaves_the_object_alone() {
        let before = json!({"a": 1});
        let mut object = before.clone();
        let patch = json!([{"op": "add", "path": "/b", "value": 1}, {"op": "test", "path": "/a", "value": 2}]);
        assert!(matches!(apply(&mut object, &patch), Err(PatchError::Unprocessable(_))));
        assert_eq!(object, before);
        assert!(matches!(
            apply(&mut object, &json!({"a": 1})),
            Err(PatchError::Malformed(_))
        ));
    }
}
