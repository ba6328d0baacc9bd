//! What ends a run.

use flotilla_artifacts::ArtifactError;
use flotilla_engine::EngineError;
use flotilla_model::ModelError;

use crate::{error::WorkerError, uri::UriError};

/// What ends a run before its goal.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A checkpoint or dataset cannot be read or written.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The model cannot be read or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
    /// Rollouts failed.
    #[error("rollout: {0}")]
    Rollout(#[source] EngineError),
    /// The GPU failed.
    #[cfg(feature = "cuda")]
    #[error("GPU: {0}")]
    Device(#[from] flotilla_device::DeviceError),
    /// A URI cannot be opened.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The plot cannot be drawn.
    #[error("draw plot: {0}")]
    Plot(String),
    /// Configuration or data make the run impossible.
    #[error("{0}")]
    Invalid(String),
    /// Asked to stop before the step's first update: the weights are those of the step before.
    #[error("cancelled")]
    Cancelled,
}

impl From<EngineError> for TrainError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Cancelled => Self::Cancelled,
            other => Self::Rollout(other),
        }
    }
}

impl TrainError {
    /// True where a new attempt would end the same way.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Artifact(error) => error.is_permanent(),
            Self::Model(error) => !matches!(error, ModelError::Tensor(_)),
            Self::Uri(_) | Self::Invalid(_) => true,
            // Weights that diverged diverge again: every draw follows from the seed.
            Self::Rollout(error) => matches!(error, EngineError::NotFinite { .. } | EngineError::InvalidRequest(_)),
            #[cfg(feature = "cuda")]
            Self::Device(error) => matches!(error, flotilla_device::DeviceError::Input(_)),
            Self::Tensor(_) | Self::Plot(_) | Self::Cancelled => false,
        }
    }
}

impl From<TrainError> for WorkerError {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Invalid(what) => Self::invalid(what),
            error if error.is_permanent() => Self::permanent("training failed", error),
            error => Self::retryable("training failed", error),
        }
    }
}
