PYTHON ?= python3
BIN := .venv/bin

.PHONY: train lint docs test test-slow test-torch-2.14 chaos clean

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

train: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pipeengine launch --workers 2 --max-restarts 0 examples/train_gpt.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site in build/site; a warning, a dead link among them, is an error.
docs: .venv/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Files side by side; the cases of one file share their launches of workers.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

# Faults at random over whole runs that are started again: hours, not part of .ci/run.
chaos: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py --faults 500

# Another torch, in an environment of its own; not part of .ci/run.
.venv-2.14/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-2.14
	.venv-2.14/bin/pip install --quiet torch==2.14.1 -e ".[test]"
	touch $@

test-torch-2.14: .venv-2.14/.installed
	.venv-2.14/bin/python -m pytest

clean:
	rm -rf .venv .venv-2.14 build dist *.egg-info
