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

.PHONY: demo test quality bench mutants torture sanitize kernel-report gpu-check gpu-train gpu-kernel-tests lint clean
.DELETE_ON_ERROR:

define install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	@$(BIN)/pip install -q "setuptools>=77" wheel
	@$(BIN)/pip install -q --no-build-isolation -e ".[$(1)]"
endef

# What the installation builds: the C++ extension too.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

$(VENV)/.demo: $(SOURCES)
	$(call install,demo)
	@touch $@

$(VENV)/.test: $(SOURCES)
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

# Every method of docs/QUALITY.md on the fixed split, T1 -> T2, ten minutes each, alone on the machine: hours, and the
# same command goes on with what is missing. make quality QUALITY="--people leave-one-out --rows ours,unet_l1" ...
QUALITY_JSON ?= benchmarks/results/quality.jsonl
quality: $(VENV)/.test
	$(BIN)/python -m benchmarks.quality --resume --out $(QUALITY_JSON) $(QUALITY)

# Do the tests of the kernels notice planted faults? Minutes; not part of `make test`.
mutants: $(VENV)/.test
	$(BIN)/python tests/mutants.py --jobs $(shell nproc)

# The faults of docs/FAULTS.md, thousands of times, and a table. Minutes; a short form of each is in `make test`.
torture: $(VENV)/.test
	$(BIN)/python tests/faults/torture.py $(if $(TORTURE_JSON),--json $(TORTURE_JSON))

# The extension's tests under AddressSanitizer and UBSan, in a build of its own. Minutes.
SANITIZED := build/sanitize/lib/phmdiff_fast/_C.so
sanitize: $(VENV)/.test
	PHMDIFF_SANITIZE=1 PHMDIFF_CUDA=0 $(BIN)/python setup.py -q build_ext --build-temp build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PHMDIFF_EXTENSION=$(CURDIR)/$(SANITIZED) \
	$(BIN)/python -m pytest -s $(wildcard tests/test_pyramid*.py) tests/test_haar.py tests/test_philox.py tests/test_phmdiff.py \
		tests/test_adaln_extension.py tests/test_gelu.py $(wildcard tests/test_short_attention_extension.py)

# Registers and spills of every kernel on sm_80, sm_90 and sm_100, and bytes moved over the floor. No GPU needed.
kernel-report: $(VENV)/.test
	$(BIN)/python -m benchmarks.compile_report
	$(BIN)/python tests/cuda_on_cpu/cuda_build.py
	$(BIN)/python -m benchmarks.traffic

# On a machine with a GPU, in $(MINUTES) minutes: what is marked gpu, then all variants side by side at the shapes tagged
# "check", whose figures go to $(RESULTS); each test and figure is told as it comes, should time run out.
# `make gpu-kernel-tests` runs every kernel test there, many small compilations.
# It runs in .venv where there is one (make test TORCH=torch makes it), else in the machine's own
# Python; what that lacks can lie in carry/site (pip install --target carry/site ...).
RESULTS ?= benchmarks/results
MINUTES ?= 8
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check: export PYTHONPATH := .:carry/site
gpu-check:
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'gpu-check: torch sees no GPU here')"
	PHMDIFF_EXTENSION=1 PHMDIFF_CUDA=1 PHMDIFF_CUDA_ARCHS=$$($(GPU_PYTHON) -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") \
		$(GPU_PYTHON) setup.py -q build_ext --inplace
	$(GPU_PYTHON) -m benchmarks.gpu_check --minutes $(MINUTES) --json $(RESULTS)/gpu-compare.json

# Training against the peers at S/2, B/2 and XL/2, variants interleaved: a call of its own, most of it compilation.
# One size: make gpu-train ARGS="--check --shape B/2".
gpu-train: export PYTHONPATH := .:carry/site
gpu-train:
	$(GPU_PYTHON) -m benchmarks.train_compare $(or $(ARGS),--check) --json $(RESULTS)/gpu-train.json

gpu-kernel-tests: export PYTHONPATH := .:carry/site
gpu-kernel-tests:
	$(GPU_PYTHON) -m pytest tests/test_*_triton.py tests/test_model_on_kernels.py

clean:
	rm -rf build dist *.egg-info $(DEMO)
