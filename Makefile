# Two commands do all the set-up:
#   make quickstart   train a small language model with differential privacy
#   make test         run the test suite
# Each creates .venv from constraints.txt if there is none, and renews it when what it was made
# from has changed.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the test suite.
WORKERS ?= 2
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart test slow lint docs clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

quickstart: $(READY)  ## the main job: private training of a small language model, no network needed
	$(BIN)/lightning-privacy fit --config recipes/quickstart.yaml

test: $(READY)  ## the test suite, but for what takes long
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

slow: $(READY)  ## what takes long: crash tests, whole recipes, many random modules
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

lint: $(READY)  ## style, formatting, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove the environment and everything built
	rm -rf $(VENV) site dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# No build step may fetch another torch: every requirement has to come as a wheel.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --only-binary :all: \
		--constraint constraints.txt --editable ".[dev]"
	@touch $@
