# Image of the operator: one program, no shell, no package manager, user 65532, nothing written to its root file system.
#
#   docker build -f docker/operator.Dockerfile -t registry.example.com/flotilla-operator:0.1.0 .
#
# Pin both bases by digest for a build that can be repeated:
#   --build-arg BUILD_IMAGE=rust:1.95-slim-bookworm@sha256:... --build-arg RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot@sha256:...
ARG BUILD_IMAGE=rust:1.95-slim-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
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
    cargo build --locked --release --workspace --bin flotilla-operator \
    && cp /target/release/flotilla-operator /flotilla-operator

FROM ${RUNTIME_IMAGE}
COPY --from=build /flotilla-operator /usr/local/bin/flotilla-operator
USER 65532:65532
EXPOSE 8081
ENTRYPOINT ["/usr/local/bin/flotilla-operator"]
CMD ["run"]
