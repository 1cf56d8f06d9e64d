# Two commands on a fresh machine: `make up` runs the whole stack, `make test` passes the tests.
# Needed: Python >= 3.11 and the package index. PIP_ARGS is passed to pip, e.g. for another index of torch builds.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
SOURCES := pyproject.toml constraints.txt

.PHONY: help setup setup-dev up test lint types format bench wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/setup.stamp ## create .venv and install what `make up` needs

setup-dev: $(VENV)/dev.stamp ## the same with the development extras

up: setup ## run Redis, API, worker and orchestrator: make up ARGS="--port 8123"
	@exec $(BIN)/fastchat-q up $(ARGS)

test: setup-dev ## all tests, in parallel on the cores that are there
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

lint: setup-dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev .tools/types ## static types of the package, as it is installed, and of the load generator
	$(BIN)/mypy -p fastchat_q
	cd bench && ../$(BIN)/mypy --config-file ../pyproject.toml --explicit-package-bases loadgen fake_openai.py

format: setup-dev ## rewrite the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev ## what the queue costs, against no queue in one run (docs/benchmarks.md)
	$(BIN)/python bench/run.py $(ARGS)

wheel: setup-dev ## dist/*.whl
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove everything that was made
	rm -rf $(VENV) .tools build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastchat-q needs Python >= 3.11; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/setup.stamp: $(BIN)/python $(SOURCES)
	@echo "Installing into $(VENV) (the first time takes a few minutes)"
	$(INSTALL) -e '.[worker]'
	@touch $@

$(VENV)/dev.stamp: $(BIN)/python $(SOURCES)
	@echo "Installing into $(VENV) with the development extras (the first time takes a few minutes)"
	$(INSTALL) -e '.[worker,dev]'
	@touch $@ $(VENV)/setup.stamp

# The package lies in three folders and is one only when installed; type checkers want it as one tree.
.tools/types: Makefile
	@rm -rf $@ && mkdir -p $@/fastchat_q
	@ln -s $(CURDIR)/fastchat_q/* $(CURDIR)/api $(CURDIR)/workers $@/fastchat_q/
	@touch $@
