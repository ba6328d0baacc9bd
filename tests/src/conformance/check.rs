//! One fact about a Kubernetes API server, and what came of asking for it.

use std::time::Duration;

use futures::future::BoxFuture;

use super::ground::Ground;

/// Asks a server for one fact; an error says how it differs.
pub type Question = for<'a> fn(&'a Ground) -> BoxFuture<'a, anyhow::Result<()>>;

/// One fact about an API server.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// The fact, as an identifier.
    pub name: &'static str,
    /// Why the sandbox is known not to hold it. The check then has to fail on the sandbox.
    pub differs: Option<&'static str>,
    /// How the server is asked.
    pub ask: Question,
}

/// What came of a check.
#[derive(Debug)]
pub enum Outcome {
    /// The fact holds.
    Holds,
    /// It does not; why.
    Fails(String),
    /// It does not, and that is known; the reason in the list of differences.
    Differs(&'static str),
    /// It holds although it is listed as a difference.
    HoldsUnexpectedly(&'static str),
    /// It was not asked; why.
    Skipped(&'static str),
}

impl Outcome {
    /// Whether the suite may pass with it.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Holds | Self::Differs(_) | Self::Skipped(_))
    }
}

/// One check's row in the report.
#[derive(Debug)]
pub struct Finding {
    /// Group of the check.
    pub topic: &'static str,
    /// The fact.
    pub name: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// How long the check took.
    pub time: Duration,
}

/// The one text of a list, if there is one.
#[must_use]
pub const fn only(texts: &[&'static str]) -> Option<&'static str> {
    match texts {
        [text] => Some(text),
        _ => None,
    }
}

/// The checks of a topic, each by the name of its function; `differs` gives the reason of a known difference.
macro_rules! checks {
    ($($name:ident $(differs $reason:literal)?),* $(,)?) => {
        /// The checks of this topic.
        pub const CHECKS: &[$crate::conformance::check::Check] = &[$(
            $crate::conformance::check::Check {
                name: stringify!($name),
                differs: $crate::conformance::check::only(&[$($reason)?]),
                ask: |at| Box::pin($name(at)),
            }
        ),*];
    };
}

pub(crate) use checks;
