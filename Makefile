# make ema_ablation   set everything up and run the main experiment    (ARGS="--scale smoke" for other options)
# make examples       run the guides' scripts, a few steps each
# make test           set everything up and run the tests              (ARGS="-m slow" for others)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
EXPERIMENTS := $(filter-out run __init__,$(basename $(notdir $(wildcard experiments/*.py))))
ARGS ?=

.PHONY: setup test check tables examples clean $(EXPERIMENTS)

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "Python 3.11, 3.12 or 3.13 is needed, got %d.%d; name one: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(EXPERIMENTS): $(READY)
	$(PY) -m experiments.run $@ $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest tests/test_architecture.py
	$(PY) -m analysis.theory --check

tables: $(READY)
	$(PY) -m analysis.tables
	$(PY) -m analysis.figures
	$(PY) -m analysis.notebooks.build
	$(PY) -m analysis.theory
	$(PY) -m analysis.claims_page

examples: $(READY)
	@for script in examples/*.py; do echo "== $$script" && $(PY) $$script $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) runs *.egg-info
