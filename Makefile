# `make demo` and `make test` do all the set-up they need; `make setup` builds the environment alone.
SHELL := /bin/bash
VENV := .venv
# the first interpreter on the path that is 3.10 to 3.12 and can make virtual environments
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TVM_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: setup test lint demo format clean

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.12 with venv found; install one or run: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON): some minutes, most of them for torch and TVM"
	env -u PYTHONPATH -u PYTHONHOME $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m tvm_structured.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) lint
	$(BIN)/python -m pytest -q

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info out
