//! SwiGLU and GELU, forward and backward, and biases: elementwise in f32 with one rounding, any of them in place.

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
pub use launch::{add_bias, bias_gradient, bias_gradient_scratch, gelu, gelu_backward, swiglu, swiglu_backward};
pub use reference::Gelu;

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
static SOURCE: Source = Source {
    name: "activation",
    text: concat!(include_str!("../rows/pack.cu"), include_str!("kernel.cu")),
};

/// Parity with the reference.
#[cfg(feature = "cuda")]
pub fn checks() -> Vec<Check> {
    check::checks()
}

/// Speed beside the floor.
#[cfg(feature = "cuda")]
pub fn cases() -> Vec<Case> {
    check::cases()
}

/// Sources with the constants of their builds.
#[cfg(feature = "cuda")]
pub fn sources() -> Vec<(&'static Source, Vec<String>)> {
    let builds = [
        "ELEM=bf16 GELU=0",
        "ELEM=bf16 GELU=1",
        "ELEM=bf16 GELU=2 PACK=1",
        "ELEM=float GELU=1",
    ];
    let defines = |build: &str| build.split(' ').map(str::to_owned).collect();
    builds.iter().map(|build| (&SOURCE, defines(build))).collect()
}
