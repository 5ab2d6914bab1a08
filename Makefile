# Each target installs what it needs. A fresh machine needs Python 3.11 or newer and make; the tests need a C++ compiler.
#   make PYTHON=/path/to/python3 TARGET    chooses the Python

VENV := .venv
# Two stamps for one environment: the packages of training, and in addition those of the tests and linters.
READY_ENV := $(VENV)/ready-env
READY := $(VENV)/ready
# Relative, so that the clone's path may have spaces.
BIN := $(VENV)/bin

# The first Python that runs (a version manager's shim may not), is new enough and can make environments.
FIND_PYTHON := for python in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done; true
FOUND_PYTHON = $(or $(PYTHON),$(shell $(FIND_PYTHON)))

# DeepSpeed's launcher and its just-in-time builds look for their programs on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := $(BIN)/python -m pytest
# One process more than there are cores, because many tests wait for other processes; four at most. Each file of tests
# runs in one of them, in the order of their collection.
NUM_WORKERS = $(shell $(BIN)/python -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
WORKERS = -n $(NUM_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help env demo test test-full drill mutants test-airgap test-slurm test-gpu lint audit format bench clean
.DEFAULT_GOAL := help
# Two targets must not build the environment at the same time.
.NOTPARALLEL:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "make %-11s %s\n", $$1, $$2}'

env: $(READY_ENV) ## make the environment, .venv, with what training needs
	@echo "The environment is ready: . $(VENV)/bin/activate"

demo: $(READY_ENV) ## train a small model on the standard library's source code, from scratch to samples
	@$(BIN)/python tools/demo.py

test: lint ## lint, the tests that fit a commit, fuzzing of the readers, and some faults (about 15 minutes on 2 cores)
	@tests/slurm/cluster ready || true
	@$(PYTEST) $(WORKERS) -m "not slow and not gpu"
	@$(BIN)/python tools/fuzz_readers.py --seconds 120
	@$(BIN)/python tools/drill --fast --quiet --jobs 2

test-full: lint ## every test that this machine can run without a GPU
	@$(PYTEST) $(WORKERS) -m "not gpu"

drill: $(READY) ## the fault drill: all that bigtx promises when things fail, tried with real faults (about 25 minutes)
	@$(BIN)/python tools/drill $(DRILL)

mutants: $(READY) ## mutation testing: a sample of small changes of the core, each of which a test should notice
	@$(BIN)/python tools/mutants $(MUTANTS)

test-slurm: $(READY) ## the tests on a real SLURM cluster on this machine; needs root and `tests/slurm/cluster install`
	@tests/slurm/cluster ready
	@$(PYTEST) -m slurm tests/slurm

test-airgap: $(READY) ## installation, training and tests without a network, from wheels that it downloads first; needs root
	@PYTHON=$(abspath $(BIN)/python) tests/airgap

test-gpu: ## what bigtx computes on this machine's GPU and how fast (8 minutes); without a GPU it says so and succeeds
	@python="$(FOUND_PYTHON)"; $${python:-python3} tools/test_gpu $(TEST_GPU)

lint: $(READY) ## ruff, mypy, the import rules, and a check for duplicated code
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted; run: make format" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/pylint bigtx tools
	@$(BIN)/lint-imports > $(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log >&2; exit 1; }

audit: $(READY) ## search the installed packages in the lists of known vulnerabilities; needs a network
	@$(BIN)/python -c 'import pip_audit' 2>/dev/null || $(BIN)/python -m pip install --quiet pip-audit || { \
		echo "pip-audit cannot be installed: is there a network?" >&2; exit 1; }
	@$(BIN)/python tools/audit.py

format: $(READY) ## fix what ruff can fix
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

bench: $(READY_ENV) ## tokens per second of training on this machine (on GPUs also MFU), and the memory of long documents
	@$(BIN)/python tools/bench/throughput.py
	@$(BIN)/python tools/bench/data.py --only long --json

clean: ## remove the environment and everything that was built; runs/ is kept
	@rm -rf $(VENV) build dist wheelhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .mutants *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Install this clone's bigtx with extras. A terminal shows pip's own progress. Otherwise there is a line for each large
# download and the rest is in setup.log; the stamp exists only if pip succeeded.
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
