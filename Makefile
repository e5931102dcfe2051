.PHONY: setup demo real test lint docs
PY := .venv/bin/python

setup:
	@bash scripts/setup.sh

demo: setup
	@$(PY) -m actors.commands.demo

real: setup
	@$(PY) -m actors.commands.real

test: setup
	@$(PY) -m pytest tests

lint: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

docs: setup
	@$(PY) -m mkdocs build --strict --quiet
