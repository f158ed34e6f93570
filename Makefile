# `make tutorial` and `make test` are the two commands; `make help` lists the rest.
# Everything runs in .venv, which is made where it is missing and brought up to date when pyproject.toml changes.

PYTHON    ?=
ONLY      ?=
ARGS      ?=
LAB_FLAGS ?=

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
FINDER := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

.DEFAULT_GOAL := help
.PHONY: help install tutorial lab explorer notebooks book reproduce paper-check test lint types clean

help: ## list these commands
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@printf '\n'; printf '  %s\n' \
	  'make tutorial ONLY="00 02"    some notebooks (also: make notebooks)' \
	  'make test ARGS="-k stream"    arguments for pytest; ARGS="-m \"not notebook\"" leaves the slow ones out' \
	  'make lab LAB_FLAGS=--no-browser' \
	  'make install PYTHON=/path/to/python3.11    another Python than the first one found'

install: $(STAMP) ## make .venv and install everything (the other commands do this by themselves)

tutorial: $(STAMP) ## execute the numbered notebooks in order, into runs/<date>_<time>/
	$(PY) notebooks/run.py $(ONLY)

lab: $(STAMP) ## open JupyterLab on the notebooks
	@# the limit is what a photograph brought to the explorer may have; without it Lab drops more than 10 MB in silence
	@# threads that wait for work sleep: while they spin, other programs slow the explorer down many times over
	OMP_WAIT_POLICY=passive $(PY) -m jupyterlab "--ServerApp.tornado_settings={'websocket_max_message_size': 268435456}" $(LAB_FLAGS) notebooks

explorer: $(STAMP) ## open the bitrate explorer as a web page on this machine
	$(PY) -m slimlib explore $(ARGS)

notebooks: $(STAMP) ## execute the notebooks and write them back with their outputs, ready to commit
	$(PY) notebooks/run.py --write $(ONLY)

book: $(STAMP) ## the notebooks as a site that needs no network, into runs/book
	$(PY) -m sphinx -q -c notebooks/book notebooks runs/book
	@echo "open runs/book/index.html"

reproduce: $(STAMP) ## measure all methods again and write assets/results (hours; goes on where it was stopped)
	$(PY) -m slimlib evaluate --reproduce $(ARGS)

paper-check: $(STAMP) ## the full-size architectures with random weights: load, compress, train a step (minutes, 12 GB)
	$(PY) assets/paper/trial.py check $(ARGS)

test: $(STAMP) ## all tests, two at a time: units first, then notebooks, then the browser (where there is Chromium)
	$(PY) -m pytest -n 2 --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## style of code and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check slimlib tests assets notebooks/run.py

types: $(STAMP) ## static types of slimlib
	$(PY) -m mypy

clean: ## remove caches and build leftovers (.venv and runs/ stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name runs -prune -o \
	  \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

# The first Python that really runs (a version manager may leave dead shims) and can make environments.
$(PY):
	@for candidate in $(PYTHON) python3.11 python3.12 python3.10 python3 python; do \
	  if "$$candidate" -c '$(FINDER)' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$candidate" --version)"; \
	    exec "$$candidate" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No usable Python: this needs Python 3.10, 3.11 or 3.12 with its venv module (on Debian and Ubuntu: the" >&2; \
	echo "package python3-venv). If it lies elsewhere: make install PYTHON=/path/to/python3.11" >&2; \
	exit 1

# uv where there is one (it is faster); pip where there is none, or where uv cannot reach what pip is set up to reach.
$(STAMP): pyproject.toml | $(PY)
	@echo "installing the libraries into $(VENV): several gigabytes, minutes"
	@if command -v uv >/dev/null 2>&1 && uv pip install --python $(PY) --quiet --compile-bytecode -e '.[dev]'; then :; \
	else $(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'; fi
	@touch $@
