# One set of commands for people and CI. Every target works on a bare clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: install check test test-cluster test-store test-local demo bench chaos golden format clean

install: $(VENV)/.installed

# torch first, on its own: a plain requirement would bring a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	tests/ceph/install.sh
	tests/chromium/install.sh
	$(MAKE) --no-print-directory --jobs=3 --keep-going test-cluster test-store test-local

# Side by side: one process runs all that needs a Ray cluster, since a second one would find no cores, and one
# all that needs a store, since that is mostly waiting.
test-cluster:
	$(BIN)/pytest -m 'ray and not slow and not gpu' 2>&1 | sed -u 's/^/cluster | /'

test-store:
	$(BIN)/pytest -m '(s3 or chaos) and not ray and not slow and not gpu' 2>&1 | sed -u 's/^/  store | /'

test-local:
	$(BIN)/pytest -m 'not (s3 or chaos or ray or slow or gpu)' 2>&1 | sed -u 's/^/  local | /'

chaos: install
	tests/ceph/install.sh
	$(BIN)/pytest -m 'slow and not gpu'

# Rewrites the losses that tests/unit/test_golden.py compares with; review the diff.
golden: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/golden/losses.py --write

demo: install
	jobs/demo/run.sh $(BIN)

bench: install
	benchmarks/run.sh $(BIN)

clean:
	rm -rf $(VENV) .cache runs
