.PHONY: setup demo real test chaos lint docs
PY := .venv/bin/python

setup:
	@bash scripts/setup.sh

demo: setup
	@$(PY) -m actors.commands.demo

real: setup
	@$(PY) -m actors.commands.real

test: setup
	@$(PY) -m pytest tests

chaos: setup  # long faults: each phase of a run killed, and each role again and again
	@$(PY) -m pytest tests/integration -m chaos --timeout 1500

lint: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

docs: setup
	@$(PY) -m mkdocs build --strict --quiet
