//! What the kernels compute.
