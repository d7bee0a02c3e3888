# Everything from one place. `make demo` and `make test` need Python >= 3.11 and nothing else: they make their own
# environment in $(VENV) the first time (about two minutes and 6 GB), and use it afterwards.

VENV ?= .venv
WORKERS ?= 2
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
READY := $(VENV)/.flowalign-ready
# one thread per process: two threads each on a busy two-core machine were measured up to seven times slower
RUN := OMP_NUM_THREADS=1 $(BIN)/python

.PHONY: help demo demo-full test test-slow test-gpu test-pipelines lint types format mutation bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "flowalign needs Python 3.11 or newer; none is on the PATH. Set PYTHON=/path/to/python." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(READY)  ## align the little text-to-image model by two methods, 8 minutes on 2 cores
	$(RUN) -m flowalign demo

demo-full: $(READY)  ## the long demo, 32 minutes
	$(RUN) -m flowalign demo --full

test: $(READY) lint types  ## lint, types and the default tests
	$(RUN) -m pytest -n $(WORKERS)

test-slow: $(READY)  ## the tests that take minutes each
	$(RUN) -m pytest -m slow -n $(WORKERS)

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(RUN) -m pytest -m gpu

test-pipelines: $(READY)  ## the contract over every tiny diffusers pipeline
	$(RUN) -m pytest tests/zoo tests/pipelines -m "slow or not slow" -n $(WORKERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy -p flowalign

format: $(READY)  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutation: $(READY)  ## break the core on purpose, count what the tests notice
	$(RUN) tests/mutation.py

bench: $(READY)  ## tests/benchmarks, one after the other
	for f in tests/benchmarks/bench_*.py; do $(RUN) $$f || exit 1; done

clean:  ## remove caches and builds; the environment and your runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
