# The only commands a developer needs. Everything runs in a virtual environment of its own, under constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Real data sets, where they lie beside the repository; without them the demo and the tests use scikit-learn's digits.
ifneq ($(wildcard ../shared/data),)
export METAKERN_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

# What is installed depends on these files only: Python sources are used in place, native ones are rebuilt by `setup`.
NATIVE := $(wildcard csrc/*.* csrc/*/*.*)
$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing metakern into $(VENV)"
	@$(PIP) torch numpy triton
	@$(PIP) --editable '.[dev,train,triton,transformers]'
	@touch $@

setup: $(VENV)/installed  ## make the virtual environment and install

demo: setup  ## train plainly and with L2RW, and write a report
	$(BIN)/metakern demo

test: setup  ## the whole suite: Triton kernels under the interpreter, the GPU's tests on an emulated one, everything else
	$(BIN)/python -m pytest -q tests/ops -m interpreter --interpreter
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 -p tests.emulated_gpu.plugin -m "gpu and not slow" --ignore tests/ops
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8

check: setup  ## ruff, pyright, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $(filter-out %.txt,$(NATIVE))

format: setup  ## apply ruff and clang-format
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter-out %.txt,$(NATIVE))

# The steps of README's table, some nine minutes on two quiet cores. All suites, more than an hour: make bench BENCH=benchmarks
BENCH ?= benchmarks/suite_steps.py -k test_step --seconds 3

bench: setup  ## metakern and its peers, in plain steps; README's table and the plots from the rows
	@$(PIP) --editable '.[bench]'
	@$(PIP) --no-deps backpack-for-pytorch
	$(BIN)/python -m pytest $(BENCH)
	$(BIN)/python -m benchmarks.publish
