# Everything runs in .venv, made on first use from python3 (3.10 or newer) and pip alone.
#   make demo      prefill/decode against one mixed node: table, picture, every token compared
#   make test      all tests that a CPU can run
#   make check     ruff, mypy, notebooks without outputs
#   make lab       JupyterLab on the notebooks
#   make test-gpu  tests marked gpu or multi_gpu, on a machine that has them
#   make clean     caches, runs and the environment

PYTHON ?= python3
VENV   ?= .venv
# Many tests wait, for processes that start and for deadlines: two at a time fill two cores. 0 runs them one after the other.
TEST_WORKERS ?= 2
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

# One thread per process: the demo and the tests run several processes, and more threads than cores make each of them slower.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check lab test-gpu clean

help:
	@sed -n '2,7s/^#   //p' Makefile

install: $(READY)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"ksana_lab needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(PY) -m ksana_lab.notebook.demo

test: $(READY)
	$(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal -m 'not gpu and not multi_gpu'

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/nbstripout --verify $(wildcard notebooks/*.ipynb)

lab: $(READY)
	$(VENV)/bin/jupyter lab notebooks

test-gpu: $(READY)
	$(PY) -m pytest -m 'gpu or multi_gpu' -rs

clean:
	rm -rf $(VENV) .cache runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
