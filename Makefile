# `make demo` and `make test` set themselves up; nothing else is needed beforehand but Python >= 3.10.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build by default: the plain `torch` of a package index may bring several GB of CUDA with it.
# For a GPU: make demo TORCH=torch
TORCH ?= torch==2.13.0
DEMO ?= demo_out
, := ,

.PHONY: demo test bench gpu-check lint clean
.DELETE_ON_ERROR:

define install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	@$(BIN)/pip install -q "setuptools>=77" wheel
	@$(BIN)/pip install -q --no-build-isolation -e ".[$(1)]"
endef

$(VENV)/.demo: pyproject.toml setup.py
	$(call install,demo)
	@touch $@

$(VENV)/.test: pyproject.toml setup.py
	$(call install,test$(,)demo$(,)bench)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/phmdiff-fast demo --out $(DEMO) --overwrite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(VENV)/.test lint
	$(BIN)/python -m pytest

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# On a machine with a GPU: what is marked gpu, then the benchmarks, whose figures go to $(RESULTS).
# It runs in .venv where there is one (make test TORCH=torch makes it), else in the machine's own
# Python; what that lacks can lie in carry/site (pip install --target carry/site ...).
RESULTS ?= benchmarks/results
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check: export PYTHONPATH := .:carry/site
gpu-check:
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'gpu-check: torch sees no GPU here')"
	$(GPU_PYTHON) -m pytest tests -m gpu
	$(GPU_PYTHON) -m pytest benchmarks/ --benchmark-only --benchmark-json=$(RESULTS)/gpu-check.json

clean:
	rm -rf build dist *.egg-info $(DEMO)
