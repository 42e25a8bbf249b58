# Every target sets itself up: a virtual environment in .venv, made once and refreshed when pyproject.toml changes.
# A run needs READY; tests, lint and benchmarks need DEV, which adds their tools. Either may come first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
HUGGINGFACE := $(VENV)/.ready-huggingface
# Tests without Ray share nothing, so that each core takes some. Those that are marked `alone` run one by one: tests with
# Ray share one cluster, and some of the others start several processes or measure time.
UNIT := $(BIN)/python -m pytest tests/unit -n auto --maxprocesses=8 --dist worksteal
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input
# The variable silences a notice of the theme's authors about another program.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: help quickstart federating smollm2 test test-long test-fast soak check docs format architecture bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "worldlm_ray needs Python 3.11 or later; try make PYTHON=python3.11")'
	@echo "1/2 making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "2/2 installing what a run needs, torch and Ray above all: usually 2 to 4 minutes, once"
	$(PIP) --editable .
	touch $(READY)

$(DEV): $(READY)
	@echo "installing the tools of tests, lint and benchmarks: usually 1 to 2 minutes, once"
	$(PIP) --editable '.[dev,bench,docs]'
	touch $(DEV)

quickstart: $(READY)  ## train the world that ships with the package, on text that this machine holds
	$(BIN)/worldlm train quickstart

federating: $(READY)  ## eight clients with little text: alone, by FedAvg, with fine-tuning, and as worldlm does
	$(BIN)/worldlm compare federating --methods local,fedavg,fedavg+ft,pooled+ft,worldlm --seeds 1 --jobs 2 --out runs/federating

$(HUGGINGFACE): $(READY)
	@echo "installing transformers and peft: usually a minute, once"
	$(PIP) --editable '.[huggingface]'
	touch $(HUGGINGFACE)

smollm2: $(HUGGINGFACE)  ## fine-tune a real model of 135M parameters by adapters, across two federations
	$(BIN)/python examples/fine_tune.py

test: $(DEV)  ## unit tests, and those with Ray that take seconds
	$(UNIT) -m 'not long'
	$(BIN)/python -m pytest tests --ignore=tests/unit -m 'not long'

test-long: $(DEV)  ## the tests that `make test` leaves out: kills, hosts, clocks, elastic members
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal -m 'long and not alone'
	$(BIN)/python -m pytest -m 'long and alone'

test-fast: $(DEV)  ## unit tests, without Ray: five minutes on two cores
	$(UNIT)

soak: $(DEV)  ## mutated messages, faults on purpose and kills, many times as many: takes an hour
	$(BIN)/python -m pytest --soak -o faulthandler_timeout=0 tests/ray/test_kills.py tests/unit/test_faults.py \
		tests/unit/test_mutations.py tests/unit/test_mutated_files.py tests/unit/gateway

check: $(DEV)  ## lint, format, types, words to avoid, long sentences, docs/architecture.md as the code says, the site without a broken link
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/check_words.py
	$(BIN)/python docs/draw_architecture.py --check
	$(SITE) --strict --quiet

docs: $(DEV)  ## build the documentation site in build/site
	$(SITE) --strict
	@echo "open build/site/index.html, or: $(BIN)/mkdocs serve"

architecture: $(DEV)  ## draw docs/architecture.md from the code
	$(BIN)/python docs/draw_architecture.py

format: $(DEV)  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)  ## the benchmarks, as ratios inside one run
	$(BIN)/python -m benchmarks

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
