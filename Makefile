# The words people try. Each target makes its own environment in $(VENV) if there is none.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/
READY := $(VENV)/.ready

.PHONY: help demo test lint types bench clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(READY)  ## train a cross-domain model on built-in data, in a minute or two
	$(RUN)python train.py

test: $(READY)  ## run the tests (those on public datasets where RECSYS_DATA names a folder that has them)
	OMP_NUM_THREADS=1 $(RUN)python -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: $(READY)  ## check style
	$(RUN)ruff check .
	$(RUN)ruff format --check .

types: $(READY)  ## check types
	$(RUN)mypy

bench: $(READY)  ## time training and ranking beside RecBole, RecTools and RePlay, each in its own environment under .bench
	$(RUN)python benchmarks/bench.py

clean:  ## remove the environment and what tools left behind; runs/ and data/ stay
	rm -rf $(VENV) .bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt install.sh
	sh install.sh "$(PYTHON)" "$(VENV)"
	@touch $@
