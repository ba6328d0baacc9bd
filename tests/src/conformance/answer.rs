//! Answers of the server, and what a client relies on in them.

use anyhow::{Context, bail, ensure};
use serde_json::Value;

/// What the server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What was asked, for messages.
    pub request: String,
    /// HTTP status.
    pub code: u16,
    /// `Content-Type`.
    pub media: String,
    /// The sentences of `Warning` headers.
    pub warnings: Vec<String>,
    /// The body; null where it is not JSON.
    pub body: Value,
    /// The body as text.
    pub text: String,
}

impl Answer {
    /// The object of an answer in the 200s.
    pub fn ok(self) -> anyhow::Result<Value> {
        ensure!(
            (200..300).contains(&self.code),
            "{}: {} {}",
            self.request,
            self.code,
            self.text
        );
        Ok(self.body)
    }

    /// The object, which has to be new (201).
    pub fn created(self) -> anyhow::Result<Value> {
        ensure!(self.code == 201, "{}: {} {}", self.request, self.code, self.text);
        Ok(self.body)
    }

    /// The `Status` of a refusal with this code and reason.
    pub fn refused(self, code: u16, reason: &str) -> anyhow::Result<Refusal> {
        let found = self.body["reason"].as_str().unwrap_or_default();
        ensure!(
            self.code == code && found == reason,
            "{}: expected {code} {reason}, got {} {}",
            self.request,
            self.code,
            self.text
        );
        ensure!(
            self.body["kind"] == "Status" && self.body["status"] == "Failure" && self.body["code"] == code,
            "{}: no complete Status: {}",
            self.request,
            self.text
        );
        Ok(Refusal { status: self.body })
    }
}

/// The `Status` of a refused request.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// `kind: Status`.
    pub status: Value,
}

impl Refusal {
    /// The message.
    #[must_use]
    pub fn message(&self) -> &str {
        self.status["message"].as_str().unwrap_or_default()
    }

    /// The message is exactly this.
    pub fn says(self, message: &str) -> anyhow::Result<Self> {
        ensure!(
            self.message() == message,
            "message\n    is      {}\n    and not {message}",
            self.message()
        );
        Ok(self)
    }

    /// The message contains this.
    pub fn mentions(self, part: &str) -> anyhow::Result<Self> {
        ensure!(
            self.message().contains(part),
            "message {:?} does not contain {part:?}",
            self.message()
        );
        Ok(self)
    }

    /// There is a cause with this field, reason and message.
    pub fn cause(self, field: &str, reason: &str, message: &str) -> anyhow::Result<Self> {
        let causes = self.status["details"]["causes"].as_array().context("no causes")?;
        let found = causes
            .iter()
            .any(|cause| cause["field"] == field && cause["reason"] == reason && cause["message"] == message);
        ensure!(found, "no cause {field} {reason} {message:?} among {causes:#?}");
        Ok(self)
    }

    /// The details name this object.
    pub fn about(self, group: &str, kind: &str, name: &str) -> anyhow::Result<Self> {
        let details = &self.status["details"];
        let text = |key: &str| details[key].as_str().unwrap_or_default();
        if (text("group"), text("kind"), text("name")) != (group, kind, name) {
            bail!("the details are of {details} and not of {group:?} {kind:?} {name:?}");
        }
        Ok(self)
    }
}
