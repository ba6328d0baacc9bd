#!/usr/bin/env bash
# Runs cargo with the CUDA tool chain of toolchain.sh. Usage: cargo.sh FOLDER ARGUMENTS…
set -euo pipefail
toolchain=$("$(dirname "$0")/toolchain.sh" "${1:?folder for the tool chain}")
toolchain=$(cd "$toolchain" && pwd)
shift
# cudarc finds the stand-ins by CUDA_HOME, candle-kernels (-lcudart) by LIBRARY_PATH, both find the compiler by NVCC.
export CUDA_HOME="$toolchain" CUDA_PATH="$toolchain" NVCC="$toolchain/bin/nvcc"
export LIBRARY_PATH="$toolchain/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
# The oldest generation that is supported; the driver compiles for the one that it finds.
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
exec cargo "$@"
