# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler and pip, and set up the rest in .venv.
#
#   make demo PROMPT="..."      TORCH=torch==2.12.1 make test       JOBS=8 make test
#   HEADWAY_DEVICE=cuda make demo           # or cpu; default: CUDA where there is a GPU
#   SYSTEM_SITE=1 make demo                 # use the torch that PYTHON already has
#   make test-gpu PYTHON=python3 VENV=      # no virtual environment: install into PYTHON itself, without network

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SYSTEM_SITE ?= 0
PROMPT ?= def read_lines(path):
JOBS ?= 2
GPU_JOBS ?= $(shell n=$$(nproc); echo $$(( n < 12 ? n : 12 )))

# CUDA kernels take minutes to compile: here only where there is a GPU. `pip install .` builds them where nvcc is found.
export HEADWAY_DEVICE ?= $(if $(wildcard /dev/nvidiactl),auto,cpu)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  STAMPS := build/stamps
else
  PY := $(VENV)/bin/python
  STAMPS := $(VENV)/stamps
endif
WITH_TOOLS := export PATH="$(if $(strip $(VENV)),$(abspath $(VENV))/bin:)$$PATH"
PIP := $(PY) -m pip --disable-pip-version-check --quiet
# $(call install,EXPRESSION): installs the list that the expression picks out of pyproject.toml, read as `p`. It may have
# no comma: make would take what follows for another argument.
install = $(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*$1, sep="\n")' \
  > $@.txt && $(PIP) install -r $@.txt
NATIVE_SOURCES := CMakeLists.txt $(shell find cmake csrc -type f)
CLANG_FORMAT := find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format

.PHONY: help demo test test-long test-clients test-gpu test-sanitizer bench lint format clean
.DEFAULT_GOAL := help

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/package ## a streamed completion of the shipped model: make demo PROMPT="..."
	@$(PY) -m headway generate --echo -- '$(subst ','\'',$(PROMPT))'

test: $(STAMPS)/test-tools ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not gpu and not long and not clients"

test-long: $(STAMPS)/test-tools ## fuzzers and mutants at full length
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m long --timeout 3600

test-clients: $(STAMPS)/client-tools ## lm-eval, guidellm and a browser against a live server
	OMP_NUM_THREADS=1 $(PY) -m pytest -m clients

test-gpu: $(STAMPS)/test-tools ## what needs a GPU, and every test that runs on each device present
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(GPU_JOBS) --dist loadgroup -m gpu

test-sanitizer: $(STAMPS)/test-tools ## small cases of every kernel under compute-sanitizer
	@mkdir -p build
	$(PY) -m bench.sanitizer build/sanitizer.json

bench: $(STAMPS)/test-tools ## the benchmarks
	$(PY) bench/decode_vs_transformers.py
	$(PY) bench/engine_step.py
	$(WITH_TOOLS); cmake -S . -B build/native -G Ninja -DHEADWAY_DEVICE=cpu -DHEADWAY_PYTHON=OFF -DHEADWAY_NATIVE_TESTS=ON
	$(WITH_TOOLS); cmake --build build/native --target ledger_bench prefix_bench
	find build/native \( -name ledger_bench -o -name prefix_bench \) -type f -exec {} \;
ifneq ($(wildcard /dev/nvidiactl),)
	$(PY) -m bench.ops --all
endif

lint: $(STAMPS)/dev-tools ## ruff, clang-format and mypy, as in CI
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(WITH_TOOLS); $(CLANG_FORMAT) --dry-run -Werror
	$(PY) -m mypy --strict python

format: $(STAMPS)/dev-tools ## rewrite the sources as lint wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(WITH_TOOLS); $(CLANG_FORMAT) -i

clean: ## remove what was built, the virtual environment included
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python -name '*.so' -delete

# --- set-up: each stamp is a step that is done; a change of what it depends on does it again ---

# Debian's python3 may lack ensurepip; pip can then install itself into the new environment.
$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "headway needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
ifneq ($(strip $(VENV)),)
	@echo "creating $(VENV)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(if $(filter 1,$(SYSTEM_SITE)),--system-site-packages) $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --without-pip $(if $(filter 1,$(SYSTEM_SITE)),--system-site-packages) $(VENV) && \
	    $(PYTHON) -m pip --quiet --python $(VENV)/bin/python install pip; }
endif
	@mkdir -p $(@D) && touch $@

# torch first: whatever else asks for torch then finds it, and pip does not fetch another one.
$(STAMPS)/torch: $(STAMPS)/python
ifneq ($(strip $(VENV)),)
	@$(if $(filter 1,$(SYSTEM_SITE)),$(PY) -c 'import torch' 2>/dev/null ||) { echo "installing $(TORCH)"; $(PIP) install $(TORCH); }
endif
	@touch $@

# The extension modules are built in place of a wheel (editable), so that Python sources need no second install.
$(STAMPS)/package: $(STAMPS)/torch pyproject.toml $(NATIVE_SOURCES)
	@echo "building headway (the first time takes minutes)"
ifneq ($(strip $(VENV)),)
	@$(call install,p["build-system"]["requires"])
	@$(PIP) install 'cmake>=3.24' ninja
	@$(PIP) install --no-build-isolation --editable .
else
	@$(PIP) install --no-build-isolation --no-deps --editable .
endif
	@touch $@

$(STAMPS)/test-tools: $(STAMPS)/package
ifneq ($(strip $(VENV)),)
	@$(call install,p["project"]["optional-dependencies"]["test"] + p["project"]["optional-dependencies"]["serve"])
endif
	@touch $@

$(STAMPS)/client-tools: $(STAMPS)/test-tools
ifneq ($(strip $(VENV)),)
	@$(call install,p["project"]["optional-dependencies"]["eval"] + ["$(TORCH)"])
endif
	@touch $@

$(STAMPS)/dev-tools: $(STAMPS)/test-tools
ifneq ($(strip $(VENV)),)
	@$(call install,p["project"]["optional-dependencies"]["dev"])
endif
	@touch $@
