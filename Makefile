# `make` alone prints this help. Every command works in the virtual environment .venv, which `make setup` creates.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,analysis,onnx,annotate,mapping,dev

# A strict editable install links file by file, so it is made anew when the list of source files changes.
SOURCE_FOLDERS := src configuration tokenization modeling_scfoundation corpus inference evaluation trainer_scripts
SOURCE_LIST := $(shell find $(SOURCE_FOLDERS) -type f -not -name '*.pyc' 2>/dev/null | LC_ALL=C sort | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(SOURCE_LIST)

.PHONY: help
help:  ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(INSTALLED)  ## Create .venv and install the package with all extras but [gpu] and the peers of benchmarks, and xFormers; quick when nothing changed

$(VENV)/.dependencies: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=strict --editable '.[$(EXTRAS)]' xformers
	@touch $@

$(INSTALLED): $(VENV)/.dependencies
	@rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=strict --editable .
	@touch $@

.PHONY: demo
demo: setup  ## Embed real cells with the small reference model; writes demo_output/ with a picture
	$(BIN)/python examples/demo.py

.PHONY: test
test: setup  ## Run all tests
	$(BIN)/python -m pytest

.PHONY: test-fast
test-fast: setup  ## Run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

.PHONY: test-matrix
test-matrix:  ## Run tests with the oldest and the newest transformers, datasets, anndata, huggingface-hub
	$(PYTHON) tests/package/run_matrix.py

.PHONY: test-common
test-common: setup  ## Run transformers' own model tests on our models (fetches its sdist)
	$(BIN)/python tests/common/run_common_tests.py

.PHONY: lint
lint: setup  ## ruff (lint, format), mypy, typos, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos
	$(BIN)/lint-imports

.PHONY: format
format: setup  ## Let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: setup  ## Time every job against the original's computation; writes docs/benchmarks/<machine>-<date>.*
	$(BIN)/python benchmarks/speed.py --output docs/benchmarks

.PHONY: bench-gpu
bench-gpu: setup  ## The same on the GPU, under 10 minutes
	$(BIN)/python benchmarks/speed.py --output docs/benchmarks --device cuda

.PHONY: bench-parts
bench-parts: setup  ## Run the smaller benchmarks of benchmarks/, which print
	for script in $(filter-out benchmarks/speed.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

.PHONY: docs
docs: setup  ## Build the documentation into docs/_build; warnings fail
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

.PHONY: clean
clean:  ## Remove what was built (not .venv)
	rm -rf build dist demo_output docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info src/*.egg-info
