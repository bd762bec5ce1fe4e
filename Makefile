# Everything happens in .venv, made from the pinned CPU set. A second `make` installs nothing.
#
#   PYTHON=python3.12 make setup     another interpreter (3.11 to 3.13)
#   make test ARGS="-k registry"     what comes after `pytest`; ARGS=--slow adds the slow tests
#
# The engine here is vLLM's CPU back end and wants a CPU build of torch. Where pip's index offers only the CUDA build,
# tell pip of an index with CPU wheels in the environment (PIP_EXTRA_INDEX_URL) and run `make clean setup`. On a machine
# with a GPU, install the package with its `vllm` and `train` extras instead (README).

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile
LOCK := requirements/cpu.lock
LOCKED := .venv/.locked
READY := .venv/.ready

.PHONY: help setup demo test lint format types clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    several domains answered in one batch, on this machine's CPU"
	@echo "make test    the tests (ARGS=... is passed to pytest)"
	@echo "make setup   the environment alone, in .venv"
	@echo "make lint    ruff: rules and format        make format   let ruff mend them"
	@echo "make types   mypy                          make clean    remove .venv, build and caches"

setup: $(READY)

demo: $(READY)
	@$(BIN)/dspy-lora demo

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not read setuptools' package-dir, so it gets the package as it is installed: a folder of links.
types: $(READY)
	@rm -rf build/types && mkdir -p build/types/dspy_lora
	@ln -s $(CURDIR)/dspy_lora/* build/types/dspy_lora/
	@ln -s $(CURDIR)/optimizers build/types/dspy_lora/optimizers
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p dspy_lora

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(READY): $(LOCKED) pyproject.toml
	@$(PIP) --no-build-isolation -e .
	@touch $@
	@echo "Ready."

$(LOCKED): $(LOCK)
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "dspy-lora needs Python 3.11, 3.12 or 3.13; found: $$($(PYTHON) -V 2>&1). Name one: PYTHON=python3.11 make ..."; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@echo "Installing $$(grep -c == $(LOCK)) pinned packages into .venv with $$($(BIN)/python -V) (once, a few minutes) ..."
	@$(PIP) -r $(LOCK)
	@$(BIN)/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' 2>/dev/null || \
	  { echo "The torch in .venv is not a CPU build. Name an index with CPU wheels in PIP_EXTRA_INDEX_URL, then: make clean setup"; exit 1; }
	@$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true  # byte code: halves an engine's imports
	@touch $@
