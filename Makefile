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

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[dev,reference]"
	touch $@
