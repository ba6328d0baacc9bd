//! Errors of the engine.

/// Why the engine cannot go on with a request.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The model failed.
    #[error("the model failed to {step} {rows} rows")]
    Model {
        /// `prefill`, `decode`, `drop` or `join`.
        step: &'static str,
        /// Rows in the batch.
        rows: usize,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The weights give no distribution, as they do once a training run has diverged.
    #[error("the logits of sample {sample} are not finite after {tokens} tokens")]
    NotFinite {
        /// Index of the sample in its request.
        sample: usize,
        /// Tokens generated before.
        tokens: usize,
    },
    /// A request cannot be run as it is.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// A step in which the request took part failed.
    #[error("{0}")]
    Step(String),
    /// The request's deadline passed.
    #[error("the deadline of the request passed")]
    Deadline,
    /// New weights were loaded, and requests that ran were to end.
    #[error("aborted: weights {0:?} were loaded")]
    Aborted(String),
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The thread that owns the model has ended.
    #[error("the engine has stopped")]
    Stopped,
}
