# Needs Python 3.11 or newer, make and pip; every target sets up .venv by itself when it has to.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready

DEMO ?= ditkit compare emoji --demo --out outputs/demo $(addprefix --label ,face-smiling country-flag heart \
	animal-bird food-fruit time place-building person)
# As on a machine where nobody has worked: nothing downloaded or cached by hand helps a test
FRESH := tools/fresh
# A worker holds 1 GB; a file's tests stay in one worker, which keeps what they share
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
BENCHMARKS ?= $(shell grep -l __main__ benchmarks/*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test parity experiments bench

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(READY) ## draw with the shipped model, exactly and accelerated; writes outputs/demo
	$(BIN)/$(DEMO)

test: $(READY) .venv/.kernels ## lint, types, import layers and the fast tests: what CI runs
	$(FRESH) $(BIN)/ruff check .
	$(FRESH) $(BIN)/ruff format --check .
	$(FRESH) $(BIN)/mypy
	$(FRESH) $(BIN)/lint-imports --no-logo
	$(FRESH) $(BIN)/pytest -m "not slow" $(WORKERS)

parity: $(READY) ## the tests of host views on every supported version of diffusers
	$(BIN)/python tools/parity.py

experiments: $(READY) ## the slow tests: each system's experiment
	$(BIN)/pytest -m slow

bench: $(READY) ## every table of benchmarks/
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

.venv/.kernels: $(READY)
	$(PIP) install -c constraints.txt -e '.[dev,kernels]'
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("ditkit needs Python 3.11 or newer, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v[:2])'
# some systems split ensurepip from Python; then the pip beside $(PYTHON) fills the environment
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
