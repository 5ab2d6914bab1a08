# Each target sets up what it needs. A fresh machine needs Python 3.11 or newer and make; the tests, a C++ compiler too.
#   make PYTHON=/path/to/python3 TARGET    chooses the Python

VENV := .venv
# Two stamps of one environment: what a trainer needs, and what the tests and linters need besides.
READY_ENV := $(VENV)/ready-env
READY := $(VENV)/ready
# Relative, so that the clone's path may have spaces.
BIN := $(VENV)/bin

# The first Python that runs (a shim of a version manager may not), is new enough and can make environments.
FIND_PYTHON := for python in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done; true
FOUND_PYTHON = $(or $(PYTHON),$(shell $(FIND_PYTHON)))

# DeepSpeed's launcher and its just-in-time builds look for their programs on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := $(BIN)/python -m pytest

.PHONY: help env demo test test-full mutants test-slurm test-gpu lint format bench clean
.DEFAULT_GOAL := help
# One environment is not built by two targets at once.
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "make %-10s %s\n", $$1, $$2}'

env: $(READY_ENV) ## make the environment, .venv, with what training needs
	@echo "The environment is ready: . $(VENV)/bin/activate"

demo: $(READY_ENV) ## train a small model on the standard library's source code, from nothing to samples
	@$(BIN)/python tools/demo.py

test: lint ## lint, the tests that fit a commit, and fuzzing of the readers (15 to 25 minutes on 2 cores)
	@tests/slurm/cluster ready || true
	@$(PYTEST) -n logical --maxprocesses 4 --dist loadfile -m "not slow and not gpu"
	@$(BIN)/python tools/fuzz_readers.py --seconds 120

test-full: lint ## every test that this machine can run without a GPU
	@$(PYTEST) -m "not gpu"

mutants: $(READY) ## mutation testing: a sample of small changes of the core, each of which a test should notice
	@$(BIN)/python tools/mutants $(MUTANTS)

test-slurm: $(READY) ## the tests on a real SLURM cluster on this machine; needs root and `tests/slurm/cluster install`
	@tests/slurm/cluster ready
	@$(PYTEST) -m slurm tests/slurm

test-gpu: ## the tests and the throughput figure on this machine's GPU; without one, says so and ends well
	@python="$(FOUND_PYTHON)"; $${python:-python3} tools/test_gpu

lint: $(READY) ## ruff, mypy and the layers of the design
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted; run: make format" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports > $(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log >&2; exit 1; }

format: $(READY) ## mend what ruff can mend
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

bench: $(READY_ENV) ## tokens per second of a training step on this machine (on GPUs MFU too), and the memory of long documents
	@$(BIN)/python tools/bench/throughput.py
	@$(BIN)/python tools/bench/data.py --only long --json

clean: ## remove the environment and all that was built; runs/ stays
	@rm -rf $(VENV) build dist wheelhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .mutants *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installs the bigtx of this clone with extras. A terminal shows pip's own progress; else there is a line for each large
# download, the rest is in setup.log, and pip's success is known by the stamp.
define install
	@test -n "$(FOUND_PYTHON)" || { \
		echo "bigtx needs Python 3.11 or newer with venv; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || { \
		echo "Making $(VENV) with $(FOUND_PYTHON)"; $(FOUND_PYTHON) -m venv --clear $(VENV); }
	@echo "Installing bigtx[$(1)] and its packages into $(VENV) (once, some minutes)"
	@set -f; rm -f $@; install="$(BIN)/python -m pip install -c constraints.txt -e .[$(1)]"; \
		if [ -t 1 ]; then $$install && touch $@; \
		else { $$install 2>&1 && touch $@; } | tee $(VENV)/setup.log | sed -un 's/^ *\(Downloading .* MB)\).*/  \1/p'; fi; \
		test -e $@ || { test -t 1 || tail -n 30 $(VENV)/setup.log >&2; exit 1; }
endef

$(READY_ENV): pyproject.toml constraints.txt
	$(call install,huggingface)

$(READY): pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(READY_ENV)
