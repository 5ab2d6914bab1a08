# Each target sets up what it needs. A fresh machine needs Python 3.11 or newer and make; the tests, a C++ compiler too.
#   make PYTHON=/path/to/python3 TARGET    chooses the Python

VENV := .venv
READY := $(VENV)/ready
BIN := $(CURDIR)/$(VENV)/bin

# The first Python that runs (a shim of a version manager may not), is new enough and can make environments.
FIND_PYTHON := for python in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done; true
FOUND_PYTHON = $(or $(PYTHON),$(shell $(FIND_PYTHON)))

# DeepSpeed's launcher and its just-in-time builds look for their programs on the PATH.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := $(BIN)/python -m pytest

.PHONY: help demo test test-full test-slurm test-gpu lint format bench clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(READY) ## train a small model on the standard library's source code, from nothing to samples
	@$(BIN)/python tools/demo.py

test: lint ## lint, the tests that fit a commit, and fuzzing of the readers (15 to 25 minutes on 2 cores)
	@tests/slurm/cluster ready || true
	@$(PYTEST) -n logical --maxprocesses 4 --dist loadfile -m "not slow and not gpu"
	@$(BIN)/python tools/fuzz_readers.py --seconds 120

test-full: lint ## every test that this machine can run without a GPU
	@$(PYTEST) -m "not gpu"

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

bench: $(READY) ## tokens per second of a training step on this machine (on GPUs MFU too), and the memory of long documents
	@$(BIN)/python tools/bench/throughput.py
	@$(BIN)/python tools/bench/data.py --only long --json

clean: ## remove the environment and all that was built; runs/ stays
	@rm -rf $(VENV) build dist wheelhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@test -n "$(FOUND_PYTHON)" || { \
		echo "bigtx needs Python 3.11 or newer with venv; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up $(VENV) (once, some minutes; the log is $(VENV)/setup.log)"
	@$(BIN)/python -c '' 2>/dev/null || $(FOUND_PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -c constraints.txt -e '.[dev]' > $(VENV)/setup.log 2>&1 || { \
		tail -n 30 $(VENV)/setup.log >&2; exit 1; }
	@touch $@
