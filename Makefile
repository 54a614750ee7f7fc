.PHONY: setup demo test lint format ci

PYTHON ?= python3
BIN := .venv/bin

setup:
	$(PYTHON) -m venv .venv && $(BIN)/pip install -c constraints.txt -e '.[demo,test,dev]'

demo:
	$(BIN)/dpnc demo

test:
	$(BIN)/pytest

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format:
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ci:
	.ci/run
