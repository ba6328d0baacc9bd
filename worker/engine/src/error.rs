//! Errors of the engine.

/// Why the engine cannot go on with a request.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The model failed.
    #[error("the model failed to {step} tokens of {rows} samples")]
    Model {
        /// `compute`, `copy` or `identify`.
        step: &'static str,
        /// Samples that took part.
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
    /// The pool of keys and values could not be made.
    #[error("failed to make a pool of {blocks} blocks of {block_size} tokens")]
    Pool {
        /// Blocks.
        blocks: usize,
        /// Tokens of a block.
        block_size: usize,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// New weights could not be put in place.
    #[error("failed to load the weights {version:?}")]
    Weights {
        /// Their version.
        version: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The engine's thread could not be started.
    #[error("failed to start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// A request cannot be run as it is.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// A step failed while the request ran or waited.
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
