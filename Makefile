# The commands of this project; `make` alone lists them.

PYTHON ?= python3
VENV := .venv

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
runtime := $(VENV)/.runtime
dev := $(VENV)/.dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help grokking benchmarks test lint types check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

grokking: $(runtime) ## train the quick grokking run and explain it, into storage/grokking-quick
	$(python) -m experiments.grokking --recipe quick --out storage/grokking-quick

benchmarks: $(dev) ## measure what attribution costs, into docs/benchmarks.md; best on an idle machine
	OMP_NUM_THREADS=1 $(python) -m tests.benchmarks

test: $(dev) ## run the tests, a file on each core at a time
	$(python) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(dev) ## check style and formatting
	$(python) -m ruff check
	$(python) -m ruff format --check

types: $(dev) ## check types
	$(python) -m mypy

check: test lint types ## run what CI runs: test, lint and types

clean: ## remove the environment, caches and build products; recorded runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find explaind experiments tests -type d -name __pycache__ -prune -exec rm -rf {} +

# A stamp inside the environment says that it is up to date with these two files. torch goes in first and alone:
# held to its pinned release, it cannot be resolved to a larger build by what depends on it.
$(runtime): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("explaind needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name a newer one: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(pip) install --upgrade pip
	$(pip) install --constraint constraints.txt torch
	$(pip) install --constraint constraints.txt --editable '.[analysis]'
	@touch $@

$(dev): $(runtime)
	$(pip) install --constraint constraints.txt --editable '.[dev]'
	@touch $@
