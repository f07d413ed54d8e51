# Everything runs in .venv, which is made when it is missing and left alone when it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two contended threads make small matrix products many times slower: one thread for tests.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
DEMO ?= demo

.PHONY: demo test test-slow test-gpu lint format wheel clean install

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/genvision demo --out $(DEMO)

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
