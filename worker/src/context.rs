//! What every role is given.

use flotilla_api::role::Owner;

use crate::{device::Wanted, progress::ProgressCell, uri::Volumes};

/// What every role is given. Cloning shares the progress.
#[derive(Clone, Debug)]
pub struct Context {
    /// The object the pod works for.
    pub owner: Owner,
    /// Where the role tells how far it is.
    pub progress: ProgressCell,
    /// Where the claims lie.
    pub volumes: Volumes,
    /// Guards role-internal endpoints; none means that they are open.
    pub token: Option<Token>,
    /// Where models run.
    pub device: Wanted,
}

/// A bearer token.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// A token as its file holds it; surrounding white space does not count. None if nothing is left.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// The token as a request presents it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether a presented token is this one, in a time that does not depend on where they differ.
    pub fn admits(&self, presented: &str) -> bool {
        let (own, presented) = (self.0.as_bytes(), presented.as_bytes());
        let difference = own
            .iter()
            .zip(presented)
            .fold(0u8, |difference, (a, b)| difference | (a ^ b));
        own.len() == presented.len() && difference == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_is_admitted() {
        let token = Token::parse("secret\n").expect("a token");
        assert!(token.admits("secret"));
        assert!(!token.admits("secre") && !token.admits("secrets") && !token.admits(""));
        assert!(Token::parse(" \n").is_none());
    }

    #[test]
    fn a_token_never_reaches_the_logs() {
        assert!(!format!("{:?}", Token::parse("secret")).contains("secret"));
    }
}
