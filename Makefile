# Every door of the project. `make` shows them.

# Builds go to one place outside the checkout, so that a second clone does not build the world again.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/flotilla/target
# Crates come from the lock file; debug builds are the optimised profile of Cargo.toml, used for tests and demo alike.
CARGO ?= cargo
BIN = $(CARGO_TARGET_DIR)/debug
SEED ?=
# Flags of `make bench-operator`.
BENCH ?=
# Where `make test-cluster` and `make cluster` keep the control plane's certificates, data and logs.
CLUSTER_DIR ?= .flotilla/cluster
CLUSTER_TESTS = $(patsubst tests/tests/%.rs,--test %,$(wildcard tests/tests/cluster_*.rs))

# Of `make build-cuda`: features besides cuda (FEATURES=cudnn,nccl or none: FEATURES=), profile (PROFILE=dev), where the tool chain and the program go.
FEATURES ?= nccl
PROFILE ?= release
CUDA = $(CARGO_TARGET_DIR)/cuda
comma = ,
CUDA_CARGO = scripts/cuda/cargo.sh $(CUDA)
CUDA_WORKER = $(CUDA)/flotilla-worker

# Where the clients of `make test-clients` and `make soak` live.
PYTHON_ENV = $(CARGO_TARGET_DIR)/python
# Flags of `make soak`.
SOAK ?= --minutes 10

.PHONY: help build build-cuda demo test test-cluster test-clients test-browser test-cuda check-kernels soak cluster control-plane bench-operator lint fmt generate check-generated \
  install-manifest images-check sandbox deny clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

build: ## build the three programs
	$(CARGO) build --locked --workspace --bins

build-cuda: ## the worker for NVIDIA GPUs, one stripped program that also starts without one: docs/gpu.md (needs Python and g++)
	$(CUDA_CARGO) build --locked --workspace --bin flotilla-worker --profile $(PROFILE) \
	  --features "$(addprefix flotilla-worker/,cuda $(subst $(comma), ,$(FEATURES)))"
	strip -o $(CUDA_WORKER) $(CARGO_TARGET_DIR)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/flotilla-worker
	@ls -lh $(CUDA_WORKER) | awk '{print $$9 ": " $$5}'

demo: build ## train a critic on scanned digits in the sandbox and ask it something (SEED=n for another seed)
	$(BIN)/flotilla demo $(if $(SEED),--seed $(SEED))

test: build ## every test that needs a Rust toolchain and a C compiler only
	$(CARGO) test --locked --workspace

# With KUBECONFIG the cluster that it names, else a control plane that is started for the tests and stopped after them.
test-cluster: build control-plane ## the stories on a real kube-apiserver; KUBECONFIG=FILE for a cluster you have (needs Go)
	$(if $(KUBECONFIG),,$(BIN)/flotilla-cluster run --dir $(CLUSTER_DIR) --) \
	  $(CARGO) test --locked --workspace --features flotilla-tests/cluster $(CLUSTER_TESTS)

test-clients: build $(PYTHON_ENV)/ready ## the server held to the real openai client and to its own OpenAPI document (needs Python)
	$(PYTHON_ENV)/bin/python tests/clients/openai_client.py $(BIN)/flotilla-worker
	PATH=$(PYTHON_ENV)/bin:$$PATH tests/clients/schemathesis.sh $(BIN)/flotilla-worker

test-browser: build ## the chat page in headless Chromium (needs Node.js and Chromium)
	cd tests/browser && npm ci --ignore-scripts --no-audit --no-fund && FLOTILLA_WORKER=$(BIN)/flotilla-worker npm test

check-kernels: $(CUDA)/nvrtc/ready ## every kernel's source compiled for Hopper, without a GPU (needs Python, for NVRTC)
	LD_LIBRARY_PATH=$(CUDA)/nvrtc/nvidia/cu13/lib $(CARGO) run --locked --quiet -p flotilla-kernels --features cuda --example kernels -- compile

$(CUDA)/nvrtc/ready: scripts/cuda/nvrtc.txt
	python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --upgrade \
	  --target $(CUDA)/nvrtc -r $<
	touch $@

# The reference's numbers, computed on the GPU: inside the model, by the commands, and each kernel beside its reference.
test-cuda: ## kernels, learner and engine beside the host, both model families, their gradients and training on the GPU of this machine, serving on two if it has them (needs a driver and CUDA 13's libraries)
	$(CARGO) test --locked -p flotilla-kernels --features cuda
	$(CUDA_CARGO) test --locked -p flotilla-device --features cuda
	$(CUDA_CARGO) run --locked -p flotilla-device --features cuda --example device -- check tests/parity/fixtures/tiny-*
	FLOTILLA_DEVICE=cuda $(CUDA_CARGO) test --locked -p flotilla-model --features cuda --test parity
	FLOTILLA_DEVICE=cuda $(CUDA_CARGO) test --locked -p flotilla-worker --features cuda --test parity
	FLOTILLA_TEST_DEVICE=cuda $(CUDA_CARGO) test --locked -p flotilla-worker --features cuda --lib --test training -- --test-threads 1
	FLOTILLA_KERNEL_CACHE=$$(mktemp -d) FLOTILLA_TEST_DEVICE=cuda $(CUDA_CARGO) test --locked -p flotilla-worker --features cuda --test training -- --test-threads 1
	$(CUDA_CARGO) build --locked --workspace --bin flotilla-worker --features flotilla-worker/cuda,flotilla-worker/nccl
	for model in tests/parity/fixtures/tiny-*; do python3 tests/gpu/tensor_parallel.py $(CARGO_TARGET_DIR)/debug/flotilla-worker $$model || exit 1; done

soak: build $(PYTHON_ENV)/ready ## ten minutes at up to five times the capacity, and kills; SOAK='--seconds 30' for a quick look (needs Python)
	cd tests/soak && FLOTILLA_WORKER=$(BIN)/flotilla-worker $(PYTHON_ENV)/bin/python soak.py $(SOAK)
	cd tests/soak && FLOTILLA_WORKER=$(BIN)/flotilla-worker $(PYTHON_ENV)/bin/python kill.py

$(PYTHON_ENV)/ready: $(wildcard tests/clients/requirements*.txt tests/soak/requirements.txt)
	python3 -m venv --clear $(PYTHON_ENV)
	$(PYTHON_ENV)/bin/pip install --quiet --disable-pip-version-check $(addprefix -r ,$^)
	touch $@

cluster: build control-plane ## a real kube-apiserver with its companions in .flotilla/cluster, until Ctrl-C (needs Go)
	$(BIN)/flotilla-cluster up --dir $(CLUSTER_DIR)

control-plane: ## build Kubernetes' own programs from source, once: about 15 minutes on 2 cores (needs Go)
	tests/cluster/build.sh

bench-operator: build control-plane ## the operator with 10,000 pods on a real kube-apiserver; BENCH=--quick for 1,000 (needs Go)
	$(BIN)/bench-operator $(BENCH)

lint: ## formatting and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --features flotilla-tests/cluster -- -D warnings

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
