# Needs Python 3.11 or newer, make and pip; every target sets up .venv by itself when it has to.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The stamps of what is installed: for the demo, for the tests, and for the tests of kernels
BASE := .venv/.base
READY := .venv/.ready
LOCK := .make-lock

DEMO ?= ditkit compare emoji --demo --seeds 0..5 --out outputs/demo $(addprefix --label ,face-smiling heart \
	animal-bird food-fruit time person)
# As on a machine where nobody has worked: nothing downloaded or cached by hand helps a test
FRESH := tools/fresh
# A worker holds 1 GB; a file's tests stay in one worker, which keeps what they share
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
BENCHMARKS ?= $(shell grep -l __main__ benchmarks/*.py)

# One set-up or demo at a time; a lock that a killed one left is removed by hand
ALONE := mkdir $(LOCK) 2>/dev/null || { echo "make: another make runs here (if none does: rmdir $(LOCK))" >&2; exit 1; }; \
	trap 'rmdir $(LOCK)' EXIT; trap 'exit 130' INT TERM;

.DEFAULT_GOAL := help
.PHONY: help demo test parity experiments bench

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(BASE) ## draw with the shipped model, exactly and accelerated; writes outputs/demo
	@$(ALONE) $(BIN)/$(DEMO)

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

$(READY): $(BASE)
	@$(ALONE) $(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) tools/check_machine.py
# some systems split ensurepip from Python; then the pip beside $(PYTHON) fills the environment
	@$(ALONE) $(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@$(ALONE) $(PIP) install -c constraints.txt torch
	@$(ALONE) $(PIP) install -c constraints.txt -e .
	@touch $@
