# Everything runs from .venv, made once from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check faults install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Ratchet needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[api,train,embedded,dev]'
	touch $@

demo: install
	$(BIN)/ratchet demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install
	$(BIN)/pytest

# The long form of tests/faults; FAULTS_UPDATES, FAULTS_BATCHES and FAULTS_SEED set its size and its dice.
faults: install
	FAULTS=long $(BIN)/pytest -s tests/faults tests/integration/test_worker_processes.py

clean:
	rm -rf $(VENV)
