# Image of the worker: one program for every role, no shell, user 65532, nothing written to its root file system.
#
#   docker build -f docker/worker.Dockerfile -t registry.example.com/flotilla-worker:0.1.0 .
#
# On the CPU; for NVIDIA GPUs there is worker-cuda.Dockerfile.
ARG BUILD_IMAGE=rust:1.95-slim-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
ARG FEATURES=
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
# Cargo reads the manifest of every member, whichever it builds.
COPY api api
COPY operator operator
COPY worker worker
COPY sandbox sandbox
COPY cli cli
COPY tests tests
ENV CARGO_TARGET_DIR=/target
# The whole workspace decides about features, as in the tests: what was tested is what is shipped.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/target \
    cargo build --locked --release --workspace --bin flotilla-worker --features "${FEATURES}" \
    && cp /target/release/flotilla-worker /flotilla-worker

FROM ${RUNTIME_IMAGE}
COPY --from=build /flotilla-worker /usr/local/bin/flotilla-worker
USER 65532:65532
EXPOSE 8080
# The operator gives the arguments and leaves the command to the image.
ENTRYPOINT ["/usr/local/bin/flotilla-worker"]
