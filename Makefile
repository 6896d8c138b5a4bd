# Set-up, tests and packaging of fastgen; `make help` lists the targets. Every path is relative to this folder,
# so the targets work through `make -C DIR` and where DIR contains spaces.

PYTHON ?= python3
# Any requirement that pip accepts: TORCH=torch takes the index's default build (on Linux the CUDA one).
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
STAMPS := .venv/stamps
BUILD_INPUTS := setup.py pyproject.toml $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)
CXX_SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu csrc/*/*/*.h tests/cpp/*/*.cpp)
ASAN_BUILD := build/asan
# What runs once more on each older instruction set.
ISA_TESTS := tests/test_isa.py tests/test_ops.py tests/ops
# What Triton's interpreter runs: the generated suite, the kernels' own functions, and the op files that test every backend.
TRITON_TESTS := tests/test_ops.py tests/test_triton_math.py tests/ops/test_affine_coupling.py \
  tests/ops/test_instance_norm.py tests/ops/test_rq_spline.py

# The fast tests run side by side: they are many and small, and what they compute hardly fills a core; threads that
# wait for work must not hold what the others need.
SIDE_BY_SIDE := -n auto --maxprocesses 8
PATIENT := OMP_WAIT_POLICY=passive

# clang-format comes from the virtual environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help dev peers demo test test-triton test-slow test-isa test-asan lint format bench wheel gpu-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo '  Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  ARGS= (passed on by test, test-triton, test-slow, test-isa, bench, gpu-check)'

dev: $(STAMPS)/built ## make .venv, install what is needed, build and install fastgen in editable mode

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'fastgen needs Python 3.10 or newer; choose one with: make dev PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -m pip install -q 'setuptools>=77' ninja numpy
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install '$(TORCH)'
	@touch $@

$(STAMPS)/built: $(STAMPS)/torch $(BUILD_INPUTS)
	@echo 'Compiling the kernels: minutes the first time, afterwards only what changed.'
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[train,dev]'
	@touch $@

demo: dev ## train a small model for a minute and draw samples
	$(BIN)/python -m fastgen.demo $(ARGS)

peers: dev # what fastgen.patch() and the benchmarks meet; the tests that want one of them skip without it
	@test -e $(STAMPS)/peers || { $(BIN)/python -m pip install -q 'fastgen[bench]' && touch $(STAMPS)/peers; } || \
	  echo 'Not all of the libraries that fastgen works with could be installed: what needs them is skipped.' >&2

test: dev peers $(if $(ARGS),,test-triton) ## the fast suite; a kernel that should be there and is missing is an error
	$(PATIENT) FASTGEN_STRICT=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu' $(ARGS)

test-triton: dev ## the Triton kernels in Triton's interpreter, which needs no GPU
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  $(PATIENT) FASTGEN_STRICT=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu' $(TRITON_TESTS) $(ARGS); \
	else echo 'Triton is not installed (it exists for Linux on x86-64): its kernels are not tested.'; fi

test-slow: dev ## the long tests: packaging, training to convergence
	FASTGEN_STRICT=1 $(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

test-isa: dev ## the op tests once more for each older code path of the CPU kernels
	for isa in avx2 portable; do \
	  $(PATIENT) FASTGEN_CPU_ISA=$$isa FASTGEN_STRICT=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu' $(ISA_TESTS) $(ARGS) || exit 1; \
	done

test-asan: dev ## the op tests against kernels built with the address and undefined-behaviour sanitizers
	$(PATIENT) sh tests/run_asan.sh $(BIN)/python $(ASAN_BUILD) $(SIDE_BY_SIDE) $(ARGS)

lint: dev ## check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/python -m mypy

format: dev ## rewrite the sources in the project's style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	clang-format -i $(CXX_SOURCES)

bench: dev peers ## install what is compared with, run the benchmarks and draw them: make bench ARGS='adain --threads 1,2'
	$(BIN)/python -m benchmarks.run $(ARGS)

wheel: dev ## build dist/fastgen-*.whl
	rm -rf build/lib.* build/bdist.* dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

# No `dev` before it: on a machine without a package index it runs on PYTHON itself and what that has.
gpu-check: ## build, test, measure and profile on a machine with an NVIDIA GPU, in ten minutes
	@python=$(BIN)/python; $$python -c 'import torch' 2>/dev/null || python=$(PYTHON); \
	$$python -c 'import torch' 2>/dev/null || \
	  { echo 'make gpu-check needs a PyTorch built with CUDA: make dev TORCH=torch, or PYTHON=one that has it' >&2; exit 2; }; \
	$$python -m benchmarks.gpu_check $(ARGS)

clean: ## remove everything that make dev, test and wheel made
	rm -rf .venv build dist fastgen.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fastgen/*.so fastgen/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
