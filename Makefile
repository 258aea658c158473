# Everything runs in .venv, which holds exactly what requirements.lock pins.
#
#   make test PYTHON=python3.12    choose the interpreter (3.11 or newer)
#   make test-all SHARD=1/4        run the first of four parts
#
# Without PYTHON an existing .venv is kept as it is; a new one gets python3.11, or
# python3 where there is none.

VENV := .venv
BIN := $(VENV)/bin
SHARD ?= 1/1

ifeq ($(origin PYTHON),undefined)
  PYTHON_VERSION := $(patsubst $(VENV)/.ready-%,%,$(firstword $(wildcard $(VENV)/.ready-*)))
  PYTHON := $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
endif
ifeq ($(PYTHON_VERSION),)
  PYTHON_VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
endif
ready := $(VENV)/.ready-$(PYTHON_VERSION)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast test-all tpu-compiler ladder lint audit bench lock \
  clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(ready)  ## create .venv from requirements.lock

demo: $(ready)  ## train the demonstration on this machine; DEMO_FLAGS="--gin.TRAIN_STEPS=50" changes it
	$(BIN)/switchyard train --gin_file=configs/runs/demo.gin $(DEMO_FLAGS)

# A file's tests stay in one process, so that they share what they compiled.
pytest = $(BIN)/python -m pytest -n 2 --dist=loadfile --durations=15

test: $(ready)  ## run all tests but the slow ones
	$(pytest) -m "not slow"

test-fast: $(ready)  ## run the tests of seconds
	$(pytest) -m "fast and not slow"

test-all: $(ready) $(VENV)/.tpu-compiler  ## run all tests; SHARD=i/n runs the i-th of n parts
	SWITCHYARD_SHARD=$(SHARD) $(pytest)

tpu-compiler: $(VENV)/.tpu-compiler  ## install the TPU's compiler, for test-all; no TPU is needed

# Rows whose configuration and program have not changed are kept.
ladder: $(ready) $(VENV)/.tpu-compiler  ## compile every large model for its slice: hours; FORCE=1 keeps nothing
	$(BIN)/python -m benchmarks.ladder.compile $(if $(FORCE),--force)

lint: $(ready)  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: $(ready)  ## check the locks and the environment, and look up known vulnerabilities
	$(BIN)/python tests/support/audit.py

bench: $(ready)  ## time the train step, the sparse layer, drawing, and making tokens
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.moe_layer
	$(BIN)/python -m benchmarks.drawing
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.records

# uv does not read pip's settings: for an index of your own set UV_DEFAULT_INDEX.
lock: $(ready)  ## write requirements.lock; UPGRADE=--upgrade takes newer versions
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --extra data --extra quality --extra dev --extra buckets \
	  $(UPGRADE) --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --extra tpu \
	  --constraint requirements.lock pyproject.toml | \
	  awk '/^libtpu==/ {on = 1} on {print} !/\\$$/ {on = 0}' > requirements-tpu.lock

# Beside the environment, not in it: jax would look for a TPU whenever it starts.
$(VENV)/.tpu-compiler: requirements-tpu.lock | $(ready)
	rm -rf $(VENV)/tpu-compiler
	$(BIN)/python -m pip install -qq --require-hashes --no-deps \
	  --target $(VENV)/tpu-compiler -r requirements-tpu.lock
	@touch $@

clean:  ## remove .venv, caches and build products (never runs/)
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The installers come first, from the lock too, because those that a new environment
# has are slow (pip) or missing (setuptools); then nothing is built from anything that
# the lock does not pin. What was installed is kept beside it, so that a change of
# pyproject.toml alone takes seconds.
$(ready): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: set PYTHON=..."; exit 1; }
	@$(BIN)/python -c 'import platform, sys; \
	  sys.exit(platform.python_version() != "$(PYTHON_VERSION)")' 2>/dev/null || \
	  $(PYTHON) -m venv --clear $(VENV)
	@start=$$(date +%s); install="$(BIN)/python -m pip install -qq --no-compile"; \
	if ! cmp -s requirements.lock $(VENV)/installed.lock; then \
	  echo "Installing requirements.lock into $(VENV) (Python $(PYTHON_VERSION)):" \
	    "about a minute, 3 GB" && \
	  awk '/^(packaging|pip|setuptools|wheel)==/ {on = 1} on {print} \
	    !/\\$$/ {on = 0}' requirements.lock > $(VENV)/installers.txt && \
	  $$install --require-hashes --no-deps -r $(VENV)/installers.txt && \
	  $$install --require-hashes --no-build-isolation -r requirements.lock && \
	  cp requirements.lock $(VENV)/installed.lock; \
	fi && \
	$$install --no-deps --no-build-isolation --editable . && \
	echo "$(VENV) is ready after $$(($$(date +%s) - start)) s"
	@touch $@
