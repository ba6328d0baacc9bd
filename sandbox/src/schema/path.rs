//! Paths of fields as error messages write them: `spec.items[0].name`.

/// `parent.name`, or `name` at the root.
#[must_use]
pub fn child(parent: &str, name: &str) -> String {
    if parent.is_empty() {
        name.to_owned()
    } else {
        format!("{parent}.{name}")
    }
}

/// `parent[index]`.
#[must_use]
pub fn index(parent: &str, index: usize) -> String {
    format!("{parent}[{index}]")
}

/// `parent[key]`, for an entry of a map with free keys.
#[must_use]
pub fn key(parent: &str, key: &str) -> String {
    format!("{parent}[{key}]")
}
