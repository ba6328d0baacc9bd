# Image of the worker for NVIDIA GPUs: the program and CUDA 13's libraries, no shell, user 65532, nothing written to its root
# file system.
#
#   docker build -f docker/worker-cuda.Dockerfile -t registry.example.com/flotilla-worker:0.1.0-cuda .
#   docker run --rm --gpus all registry.example.com/flotilla-worker:0.1.0-cuda doctor
#
# The build needs neither a GPU nor a driver. The node needs driver 580 or newer; its libcuda comes with the container runtime.
# FEATURES=cudnn,nccl adds cudnn (its library is then yours to add); RUNTIME_IMAGE may be any with glibc 2.34 or newer and
# libstdc++, for example nvcr.io/nvidia/cuda:13.0.2-base-ubuntu24.04 for one with a shell.
ARG BUILD_IMAGE=rust:1.95-slim-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
ARG FEATURES=nccl
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY scripts/cuda scripts/cuda
# The files of /libraries keep their names: programs ask for them by soname.
RUN python3 -m pip install --no-cache-dir --no-deps --no-compile --only-binary=:all: --require-hashes --root-user-action=ignore \
    --target /libraries -r scripts/cuda/runtime.txt
COPY Makefile Cargo.toml Cargo.lock ./
# Cargo reads the manifest of every member, whichever it builds.
COPY api api
COPY operator operator
COPY worker worker
COPY sandbox sandbox
COPY cli cli
COPY tests tests
ENV CARGO_TARGET_DIR=/target
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/target \
    make build-cuda FEATURES="${FEATURES}" \
    && cp /target/cuda/flotilla-worker /flotilla-worker

FROM ${RUNTIME_IMAGE}
COPY --from=build /libraries/nvidia/cu13/lib /usr/local/cuda/lib64
COPY --from=build /libraries/nvidia/nccl/lib /usr/local/cuda/lib64
COPY --from=build /flotilla-worker /usr/local/bin/flotilla-worker
# The first for the loader, the others for NVIDIA's container runtime.
ENV LD_LIBRARY_PATH=/usr/local/cuda/lib64 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
EXPOSE 8080
# The operator gives the arguments and leaves the command to the image.
ENTRYPOINT ["/usr/local/bin/flotilla-worker"]
