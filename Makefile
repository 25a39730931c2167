# Each target sets .venv up by itself, and again when setup.py changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-slow lint

demo: $(VENV)/.installed
	$(BIN)/nnunet_diffusion demo

test: test-fast test-slow

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# What hangs is told, with where, and tried once more; what fails is not.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow --reruns 1 --only-rerun Timeout --rerun-show-tracebacks

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@
