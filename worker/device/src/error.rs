use flotilla_kernels::{GpuError, ShapeError};

/// Why a model could not be run on the card.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The card, a kernel, or memory.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Operands that do not fit together.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A model that the ranks of a group cannot share.
    #[error(transparent)]
    Shard(#[from] crate::parallel::ShardError),
    /// A group of GPUs.
    #[cfg(feature = "nccl")]
    #[error(transparent)]
    Group(#[from] crate::parallel::CollectiveError),
    /// A tensor of the host.
    #[error(transparent)]
    Host(#[from] candle_core::Error),
    /// The model of the host.
    #[error(transparent)]
    Model(#[from] flotilla_model::ModelError),
    /// A weight that the architecture has and the model of the host has not.
    #[error("the model has no weight {0}")]
    Missing(String),
    /// The engine over it.
    #[error("{}", chain(.0))]
    Engine(Box<flotilla_engine::EngineError>),
    /// Input that does not fit.
    #[error("{0}")]
    Input(String),
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
