# What one does with a clone of this repository. Every target does its own set-up in .venv.
#
# For `make serve`:  PORT WORKERS POLICY ENGINE PROFILE MODEL BUS      For all:  PYTHON TORCH=cpu|cuda|auto
# For `make chaos`:  SEEDS (20: the seeds 1 to 20; 7-9: these)  SECONDS_EACH

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PORT ?= 8000
WORKERS ?= 1
POLICY ?=
ENGINE ?=
PROFILE ?=
MODEL ?=
BUS ?=
TESTS ?= tests
PYTEST_ARGS ?=
SEEDS ?= 20
SECONDS_EACH ?= 180

VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
export PYTHON TORCH VENV VLLM_VENV

.PHONY: help serve test check format docs reproduce chaos peers compose-test audit engine-vllm-test setup-serve setup-dev clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

serve: setup-serve ## the whole mesh on this machine, with the demo model, on PORT (8000)
	@exec $(BIN)/tranche serve --port $(PORT) --workers $(WORKERS) \
	  $(if $(POLICY),--policy $(POLICY)) $(if $(ENGINE),--engine $(ENGINE)) \
	  $(if $(PROFILE),--profile $(PROFILE)) \
	  $(if $(MODEL),--model $(MODEL)) $(if $(BUS),--bus '$(BUS)')

test: setup-dev ## all tests; starts a private RabbitMQ, installing it where it is missing and it may
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) $(TESTS)

check: setup-dev ## format, lint, types, imports, docs
	@echo '[check] format'; $(BIN)/ruff format --check -q .
	@echo '[check] lint'; $(BIN)/ruff check -q .
	@echo '[check] types'; $(BIN)/mypy
	@echo '[check] imports'; shown=$$($(BIN)/lint-imports --no-logo) || { echo "$$shown"; exit 1; }
	@echo '[check] yaml'; $(BIN)/yamllint -s $$(git ls-files "*.yml" "*.yaml")
	@echo '[check] shell'; bash -n $$(git ls-files '*.sh') .ci/run
	@echo '[check] docs'; $(BIN)/python -m pytest -p no:cacheprovider tests/test_docs.py tests/test_architecture.py

format: setup-dev ## rewrite the code as `make check` wants it
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

docs: setup-dev ## rewrite the documents that are made from the code
	@$(BIN)/python -m deploy.setup.documents --write

reproduce: setup-dev ## the papers' tables in simulation, ours beside theirs: docs/reproduction.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m sim.reproduction $(if $(ONLY),--only $(ONLY))

chaos: setup-dev ## seeded storms of faults over a real mesh: SEEDS times SECONDS_EACH; docs/chaos.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.chaos --seeds $(SEEDS) --seconds $(SECONDS_EACH)

peers: setup-dev ## the servers that `python -m bench.peers` compares with, into .peers (5 GB)
	@deploy/setup/peers.sh

compose-test: setup-dev ## images, docker compose up, requests, scaling, a trace
	@$(BIN)/python -m pytest -s -p no:cacheprovider deploy/compose_test

audit: ## pinned packages against PyPI's advisories (needs the network)
	@deploy/setup/audit.sh

engine-vllm-test: ## the engine vllm on the real vLLM (CPU build, in an environment of its own, VLLM_VENV)
	@deploy/setup/vllm.sh
	@TRANCHE_TEST_ENGINES=vllm OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider \
	  -o filterwarnings=default -o timeout=600 $(PYTEST_ARGS) deploy/vllm_test tests/worker/conformance

setup-serve:
	@deploy/setup/venv.sh serve

setup-dev:
	@deploy/setup/venv.sh dev

clean: ## remove .venv, caches and what runs have left
	rm -rf $(VENV) $(VLLM_VENV) .venv-audit .run .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache \
	  build dist ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
