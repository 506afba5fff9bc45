# Each target does all of its own set-up in $(VENV): `make demo` and `make test` work in a fresh clone.
#   make PYTHON=python3.12 test    another interpreter, 3.10 to 3.13
#   make WORKLOADS=base-cpu-fp32 bench    one workload
#   make JOBS=8 test               so many processes of tests side by side, each on one thread
#   make GPU=v100 build            the Docker image for a V100, rather than for current GPUs
#   make CONSTRAINTS= test         the newest versions that setup.cfg allows rather than the tested ones
# Without a GPU, PyTorch's small CPU build is enough:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DEMO_DIR ?= demo-run
PYTEST_ARGS ?=
JOBS ?= 2
WORKLOADS ?=
DOCKER ?= docker
GPU ?= modern
IMAGE ?= txl:$(GPU)

BIN := $(VENV)/bin
PACKAGING := setup.cfg pyproject.toml $(CONSTRAINTS)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint type coverage bench bench-demo build interactive install triton clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## train, evaluate, export, check, measure and report on a small built-in corpus, in a few minutes
	@PATH="$(abspath $(BIN)):$$PATH" benchmarks/demo.sh "$(DEMO_DIR)"

bench: $(VENV)/.installed ## the named workloads of benchmarks/workloads against NVIDIA's way of computing: an hour, 6 GiB
	@PATH="$(abspath $(BIN)):$$PATH" python benchmarks/speed.py $(WORKLOADS)

bench-demo: $(VENV)/.installed ## measure the newest demo's models long enough for a sound p99; runs the demo first where there is none
	@PATH="$(abspath $(BIN)):$$PATH" benchmarks/bench.sh "$(DEMO_DIR)"

build: ## build the Docker image for current GPUs; GPU=v100 builds the one for a V100
	$(DOCKER) build --file docker/$(GPU).Dockerfile --tag $(IMAGE) .

interactive: ## open a shell in that image with all GPUs, and this folder as /workspace
	$(DOCKER) run --gpus all --init --interactive --tty --rm --network host --ipc host \
		--user "$$(id -u):$$(id -g)" --env HOME=/tmp --volume "$(CURDIR):/workspace" $(IMAGE) bash

test: lint type ## lint, types and the whole test suite
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev ## the test suite without its slow tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## ruff: rules and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --quiet .

type: $(VENV)/.installed-dev ## mypy --strict on both packages
	$(BIN)/python -m mypy

coverage: $(VENV)/.installed-dev ## the test suite, with the lines it does not reach
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

install: $(VENV)/.installed-dev ## everything for development, into .venv

clean: ## remove .venv, caches, build products, demo and benchmark runs
	rm -rf .venv demo-run runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find txl_train txl_deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON). Install Python 3.10 to 3.13, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit("txl needs Python 3.10 to 3.13, but $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(PACKAGING)
	@echo "Installing txl and what it needs into $(VENV). The first time takes a minute or more."
	$(PIP_INSTALL) --editable '.[onnx,report]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(PACKAGING)
	@echo "Installing txl and its development tools into $(VENV). The first time takes a minute or more."
	$(PIP_INSTALL) --editable '.[dev]'
	@$(MAKE) --no-print-directory triton || echo "Tests of Triton Inference Server are skipped: it could not be installed." >&2
	@touch $@ $(VENV)/.installed

# Triton Inference Server with its Python backend, which nvidia-pytriton carries, in an environment of its own: it needs numpy below 2.
# All other packages come from $(VENV), whose folder is on its path.
triton: $(VENV)/.made ## Triton Inference Server for its tests, in an environment of its own
	"$(PYTHON)" -m venv "$(VENV)/triton"
	"$(VENV)/triton/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --constraint triton-constraints.txt \
		nvidia-pytriton numpy
	@"$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$(VENV)/triton.pth"
	@echo "$(CURDIR)" >> "$(VENV)/triton.pth"
	@mv "$(VENV)/triton.pth" "$$("$(VENV)/triton/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/txl.pth"
