//! Who asks: one bearer token, one user who may do everything.

use http::{HeaderMap, header};

use super::status::ApiError;

/// The user of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Name.
    pub name: String,
    /// Groups.
    pub groups: Vec<String>,
}

impl User {
    /// The only user.
    #[must_use]
    pub fn admin() -> Self {
        Self {
            name: "sandbox-admin".into(),
            groups: vec!["system:masters".into(), "system:authenticated".into()],
        }
    }
}

/// Checks the `Authorization` header against the token.
pub fn authenticate(headers: &HeaderMap, token: &str) -> Result<User, ApiError> {
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    if !token.is_empty() && same(given.trim().as_bytes(), token.as_bytes()) {
        return Ok(User::admin());
    }
    Err(ApiError::unauthorized())
}

/// Compares in a time that depends on the lengths only.
fn same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len()
        && left
            .iter()
            .zip(right)
            .fold(0, |difference, (a, b)| difference | (a ^ b))
            == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_is_let_in() {
        let mut headers = HeaderMap::new();
        assert_eq!(authenticate(&headers, "t").unwrap_err().code, 401);
        headers.insert(header::AUTHORIZATION, "Bearer u".parse().unwrap());
        assert!(authenticate(&headers, "t").is_err());
        headers.insert(header::AUTHORIZATION, "Bearer t".parse().unwrap());
        assert_eq!(authenticate(&headers, "t").unwrap().name, "sandbox-admin");
    }
}
