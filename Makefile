# The commands of this project. From a clean clone, with python3 >= 3.11 and make: `make demo`, `make test`.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
# The interpreter that makes the virtual environment: the first one that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Where to take torch from, if not from pip's usual index. On Linux without a GPU
# https://download.pytorch.org/whl/cpu has a build without the gigabytes of CUDA.
TORCH_INDEX ?=
# Address of a RabbitMQ for `make demo`, as is FEDMQ_BROKER_URL; without either the demo starts a private one.
BROKER ?=
# How long `make chaos` kills, in seconds, and what the faults are drawn from (empty: another seed each time).
DURATION ?= 120
SEED ?=
# More arguments for the command that a target runs.
ARGS ?=
# Most tests wait for processes and time-outs, so there are more at once than two cores would have. Each of the parallel
# ones has a RabbitMQ node of its own.
PARALLEL ?= -n 3 --dist worksteal

BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUPPLY := .venv-supply
SUPPLIED := $(SUPPLY)/.ready

.PHONY: help demo test test-fast chaos fuzz bench lint format docs rabbitmq chromium venv secrets sbom audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  BROKER=amqps://user:password@host the broker for `make demo`; FEDMQ_BROKER_URL in the environment is the same,'
	@echo '                                   and others on this machine do not see it'
	@echo '  TORCH_INDEX=https://…             where to take torch from'
	@echo '  DURATION=1800 SEED=7              for `make chaos`: seconds, and what the faults are drawn from'
	@echo '  ARGS="…"                          more arguments for demo, test, test-fast, chaos and bench'

demo: $(READY) rabbitmq ## a whole federation on this machine
	$(if $(BROKER),FEDMQ_BROKER_URL='$(BROKER)') $(BIN)/fedmq demo $(ARGS)

test: lint rabbitmq chromium ## everything that CI checks
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(READY) ## the tests that need no broker and take no time
	$(BIN)/python -m pytest -m 'not broker and not slow' $(ARGS)

chaos: $(READY) rabbitmq ## kill aggregators, workers and broker at random, and count what is lost
	$(BIN)/python -m tests.chaos --duration $(DURATION) $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: $(READY) ## a million hostile inputs for everything that reads what others sent
	$(BIN)/python -m tests.attacks.fuzz $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(READY) rabbitmq ## measure everything that docs/benchmarks.md has figures of; half an hour, into results/
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(READY) ## style, types and the rules about imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## lay out the code and repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## make the pages that are made from the code
	$(BIN)/python -m fedmq.reference > docs/configuration.md
	$(BIN)/python -m fedmq.reference scenario > docs/scenario.md
	$(BIN)/python -m fedmq.reference metrics > docs/metrics.md

rabbitmq: ## install RabbitMQ's server if it is missing and can be installed
	@deploy/install-rabbitmq.sh

chromium: ## install a browser for the tests of the live page if it is missing and can be installed
	@deploy/install-chromium.sh

venv: $(READY) ## make or refresh the virtual environment

secrets: ## make the password that `docker compose up` needs
	@deploy/make-secrets.sh

sbom: $(SUPPLIED) ## write a bill of materials of all that is installed here, CycloneDX, to results/sbom.json
	@mkdir -p results
	@# The tool's check of what it has written takes minutes.
	$(SUPPLY)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --no-validate --output-reproducible --of JSON -o results/sbom.json

audit: $(SUPPLIED) ## ask PyPI for known holes in what is installed here; says so where it cannot be asked
	$(SUPPLY)/bin/python deploy/audit.py $(BIN)/python

# The tools have an environment of their own, so that they are not in what they look at.
$(SUPPLIED): $(READY)
	@'$(PYTHON)' -m venv $(SUPPLY)
	@$(SUPPLY)/bin/python -m pip install --quiet --upgrade -c constraints-dev.txt 'pip>=25.1'
	@$(SUPPLY)/bin/python -m pip install --quiet -c constraints-dev.txt --group supply
	@touch $@

clean: ## remove everything that these targets made, the virtual environment too
	rm -rf $(VENV) $(SUPPLY) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Written last, so an interrupted installation is done again.
$(READY): pyproject.toml constraints-dev.txt
	@if [ -z '$(PYTHON)' ]; then echo 'python3 3.11 or newer is needed: install one, or say make PYTHON=/path/to/python3' >&2; exit 1; fi
	@'$(PYTHON)' -m venv $(VENV) || { echo 'cannot make a virtual environment: Debian and Ubuntu need the package python3-venv' >&2; exit 1; }
	@# --group came with pip 25.1, which is newer than the pip inside many a python3.
	@$(BIN)/python -m pip install --help | grep -e '--group' >/dev/null || $(BIN)/python -m pip install --quiet --upgrade -c constraints-dev.txt 'pip>=25.1'
	@# By itself: that index may lack the pinned releases of what torch needs; the next line takes them from pip's own.
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --no-deps -c constraints-dev.txt --index-url '$(TORCH_INDEX)' torch)
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt -e '.[demo,llm,simulate,tensorboard,otel]' --group dev
	@touch $@
