# Each target sets up its own .venv when there is none; nothing else is needed but python3, pip and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint types clean

demo: $(VENV)/.ready
	@rm -rf demo-run
	$(BIN)/chainlora demo --output demo-run

test: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .

types: $(VENV)/.ready
	$(BIN)/mypy

check: test lint types

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo-run
