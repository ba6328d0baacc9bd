//! CUDA kernels: each folder holds one, with its CUDA source, launcher, CPU reference, checks and benchmarks.
