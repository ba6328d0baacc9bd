# Every door of the project. `make` shows them.

# Builds go to one place outside the checkout, so that a second clone does not build the world again.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/flotilla/target
# Crates come from the lock file; debug builds are the optimised profile of Cargo.toml, used for tests and demo alike.
CARGO ?= cargo
BIN = $(CARGO_TARGET_DIR)/debug
SEED ?=

.PHONY: help build demo test lint fmt generate check-generated install-manifest images-check sandbox deny clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

build: ## build the three programs
	$(CARGO) build --locked --workspace --bins

demo: build ## train a critic on scanned digits in the sandbox and ask it something (SEED=n for another seed)
	$(BIN)/flotilla demo $(if $(SEED),--seed $(SEED))

test: build ## every test that needs a Rust toolchain and a C compiler only
	$(CARGO) test --locked --workspace

lint: ## formatting and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

fmt: ## format everything
	$(CARGO) fmt --all

generate: build ## write crds/ from the types in api/, and what the chart takes from them
	$(BIN)/flotilla-operator crds --out crds
	cp crds/*.yaml charts/flotilla/definitions/
	python3 scripts/chart_readme.py

check-generated: build ## fail if crds/ differs from the types in api/, or the chart's copy from crds/
	$(BIN)/flotilla-operator crds --out $(CARGO_TARGET_DIR)/crds
	diff -ru crds $(CARGO_TARGET_DIR)/crds
	diff -ru crds charts/flotilla/definitions

install-manifest: ## render manifests/install.yaml from the chart (needs Go once, for helm)
	scripts/install-manifest.sh "$$(tests/cluster/build.sh)/helm" > manifests/install.yaml

images-check: ## what can be checked about docker/ without a Docker engine (needs Python)
	scripts/images-check.sh

sandbox: build ## a control plane for kubectl in .flotilla/, until Ctrl-C
	$(BIN)/flotilla sandbox up --dir .flotilla

deny: ## licences, sources and advisories of the dependencies (needs cargo-deny)
	$(CARGO) deny check bans licenses sources

clean: ## remove builds and sandbox state
	$(CARGO) clean
	rm -rf .flotilla
