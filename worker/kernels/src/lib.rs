//! CUDA kernels for training and serving vision-language models on one GPU.
//!
//! Each folder holds one kernel with the same anatomy: `kernel.cu` (the source, compiled by NVRTC for the card that is
//! found), `reference.rs` (what it computes, in plain Rust), `launch.rs` (the call, which checks shapes), `check.rs` (parity
//! on fresh random inputs, and benchmarks against a floor). Without the feature `cuda` only the references are built.

pub mod activation;
pub mod attention;
pub mod element;
pub mod norm;
pub mod optimizer;
pub mod paged;
pub mod pictures;
pub mod rotary;
pub mod rows;
pub mod sampling;
pub mod shape;
pub mod skinny;
#[cfg(feature = "cuda")]
pub mod streamed;
pub mod vocabulary;

#[cfg(feature = "cuda")]
pub mod bench;
#[cfg(feature = "cuda")]
pub mod check;
#[cfg(feature = "cuda")]
pub mod gpu;

pub use element::{Dtype, Element, Float};
pub use shape::ShapeError;

#[cfg(feature = "cuda")]
pub use gpu::{Buffer, Finish, Gemm, Gpu, GpuError, Graph, Inbox, Outbox};

/// Every source with the constants of one build of it, for compiling without a GPU.
#[cfg(feature = "cuda")]
pub fn sources() -> Vec<(&'static gpu::source::Source, Vec<String>)> {
    [
        activation::sources(),
        attention::sources(),
        norm::sources(),
        optimizer::sources(),
        paged::sources(),
        pictures::sources(),
        rotary::sources(),
        rows::sources(),
        sampling::sources(),
        skinny::sources(),
        streamed::sources(),
        vocabulary::sources(),
    ]
    .concat()
}
