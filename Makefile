# Every target sets up what it needs in a virtual environment inside the checkout, and does nothing
# twice. PYTHON and TORCH choose the interpreter and the torch requirement.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The oldest torch that the native library serves, built for the CPU.
TORCH_MIN ?= torch==2.10.0+cpu
VENV := .venv
# The interpreter that everything runs with. PY=/path/to/python uses an environment of one's own.
PY ?= $(VENV)/bin/python
JOBS ?= $(shell nproc)
# One's own settings (for instance: export EMBATTLE_CUDA = OFF), not tracked.
-include local.mk

# Packages are installed without bytecode: it is written as they are first imported, else each of the
# many processes that follow compiles torch anew.
export PYTHONDONTWRITEBYTECODE :=

# What the native code is compiled for; what does not run here may be left out (make simd-check).
SIMD_LEVELS ?= v2;v3;v4
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

.PHONY: help setup setup-build setup-jobs dev simd-check demo test browser clipping-nightly fuzz-nightly mutation device-test torch-min recbole lint format sanitize bench cuda-check gpu-model gpu-check emulator-asan clean

help:
	@echo "make demo      train and audit a real recommender (about five minutes on two free cores)"
	@echo "make test      build and run the tests"
	@echo "make torch-min the tests of ops and attacks under the oldest torch ($(TORCH_MIN))"
	@echo "make browser   the report in a headless Chromium, which is installed where that is allowed"
	@echo "make recbole   the tests of RecBole's models, in an environment of its own (.venv-recbole)"
	@echo "make clipping-nightly [CASES=100000]  random models under per-sample clipping"
	@echo "make fuzz-nightly [CASES=100000]  the ops, and the CUDA kernels in the emulator, on calls as they come"
	@echo "make simd-check  whether the highest SIMD level compiles, where nothing could run it"
	@echo "make lint      ruff, mypy --strict, clang-format"
	@echo "make bench     the benchmarks, against the memory roofline and eager torch"
	@echo "make cuda-check [TABLE=file]  spills and 128-bit accesses of the CUDA kernels; needs nvcc, no GPU"
	@echo "make gpu-model [TABLE=file]  what the CUDA kernels would cost a GPU, counted; needs nvcc, no GPU"
	@echo "make gpu-check OUT=dir  test and measure the CUDA kernels on the GPU at hand"
	@echo "make sanitize  the native tests under AddressSanitizer and UBSan"
	@echo "make emulator-asan [SHORT=1]  the CUDA kernels in the emulator under AddressSanitizer and UBSan"
	@echo "make mutation  change the code at random places and see whether the tests notice (an hour)"
	@echo "make clean     remove the build and the virtual environment"

# ---- Set-up ----
ifeq ($(PY),$(VENV)/bin/python)
SETUP = @PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash tools/setup.sh
else
SETUP = @:
endif
setup:
	$(SETUP)
setup-build:
	$(SETUP) build
setup-jobs: setup-build
	$(SETUP) jobs

# ---- Build: in place, so that an edit of a Python file needs no step ----
BUILD = @PYTHON=$(PY) JOBS=$(JOBS) bash tools/build.sh build/dev
dev: setup
	@$(MAKE) --no-print-directory build/dev/.stamp
build/dev/.stamp: $(SOURCES)
	@echo "==> building the native code (build/dev)"
	$(BUILD) -DEMBATTLE_SIMD_LEVELS="$(SIMD_LEVELS)"
	@touch build/dev/.native $@
# For this machine's SIMD level alone: a third of the compiling. What is there for all serves as well.
build/dev/.native: $(SOURCES)
	@echo "==> building the native code for this machine (build/dev)"
	$(BUILD) -DEMBATTLE_SIMD_LEVELS=native
	@touch $@

# Has the compiler read the highest SIMD level without compiling it, where nothing could run it.
simd-check:
	@for file in $(filter-out %/dispatch.cpp,$(wildcard csrc/cpu/*.cpp)); do \
		$(CXX) -std=c++20 -fsyntax-only -Wall -Wextra -Wno-psabi -march=x86-64-v4 -DEMBATTLE_LEVEL=v4 $$file || exit 1; \
	done

# ---- Jobs ----
RUN = PYTHONPATH=python $(PY)

# Threads that spin while they wait are slow beside any other work (see python/embattle/__init__.py).
demo: export OMP_WAIT_POLICY ?= passive
demo: setup-build
	@$(MAKE) --no-print-directory -j2 setup-jobs build/dev/.native
	$(RUN) -m embattle train recipes/womens_reviews.yaml --out runs/demo --overwrite $(DEMO)
	$(RUN) -m embattle audit runs/demo

# A process for each core, each with one thread; tests of threads ask for more by themselves. A test
# that takes so many seconds hangs: it fails, and says where each of its threads is.
TEST_LIMIT ?= 500
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -o faulthandler_timeout=$(TEST_LIMIT) -o faulthandler_exit_on_timeout=true
test: dev
	$(PYTEST) -n $(JOBS) $(TESTS)

# They are part of make test as well, where there is a Chromium.
browser: dev
	@if bash tools/browser.sh; then $(RUN) -m pytest tests/test_report_browser.py; else [ $$? = 3 ]; fi

# Other cases each time, unlike those of make test.
CASES ?= 100000
clipping-nightly: dev
	OMP_NUM_THREADS=1 EMBATTLE_CLIPPING_CASES=$(CASES) $(RUN) -m pytest -n $(JOBS) tests/test_clipping_properties.py

# One process alone: what it times is not to wait for others.
fuzz-nightly: dev
	OMP_NUM_THREADS=1 EMBATTLE_FUZZ_CASES=$(CASES) EMBATTLE_CUDA_FUZZ_CASES=$(CASES) \
		$(RUN) -m pytest tests/test_ops_fuzz.py tests/test_cuda_fuzz.py

# The tests that run on any device, on one that needs no hardware; random cases are make test's.
device-test: dev
	EMBATTLE_PROPERTY_CASES=200 EMBATTLE_CLIPPING_CASES=200 $(PYTEST) --device pretend -n $(JOBS) tests

# The same binary, in an environment of its own.
torch-min: dev
	@PYTHON=$(PY) TORCH_MIN="$(TORCH_MIN)" JOBS=$(JOBS) IF_CHEAP=$(IF_CHEAP) bash tools/torch_min.sh $(TESTS)

# RecBole needs numpy < 2. The same binary again.
recbole: dev
	@PYTHON=$(PY) TORCH="$(TORCH)" bash tools/recbole.sh $(TESTS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/clang_format.py --check

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) tools/clang_format.py

bench: dev
	$(RUN) -m pytest benchmarks $(BENCH)

cuda-check: setup
	@PYTHON=$(PY) JOBS=$(JOBS) EMBATTLE_CUDA=ON bash tools/build.sh build/dev -DEMBATTLE_SIMD_LEVELS="$(SIMD_LEVELS)"
	@touch build/dev/.stamp build/dev/.native
	$(PY) tools/check_cuda_kernels.py --build build/dev $(if $(TABLE),--out $(TABLE))

gpu-model: setup
	@PYTHON=$(PY) JOBS=$(JOBS) EMBATTLE_CUDA=ON CUDAARCHS="80-real;90-real" TARGET=embattle_cuda KEEP_OUT_OF_TREE=1 \
		bash tools/build.sh build/gpu-model -DEMBATTLE_SIMD_LEVELS=native
	$(RUN) tools/gpu_model.py $(if $(TABLE),--out $(TABLE)) $(if $(ONLY),--only $(ONLY))

# SYSTEM_PYTHON=1: no virtual environment and no network, with the python3 that is there.
gpu-check: PYTHON_FOR_GPU = $(if $(SYSTEM_PYTHON),$(PYTHON),$(PY))
gpu-check: $(if $(SYSTEM_PYTHON),,setup)
	@$(PYTHON_FOR_GPU) -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check: torch sees no GPU here: nothing was run')"
	@PYTHON=$$(command -v $(PYTHON_FOR_GPU)) JOBS=$(JOBS) EMBATTLE_CUDA=ON bash tools/build.sh build/gpu -DCMAKE_CUDA_ARCHITECTURES=native
	$(PYTHON_FOR_GPU) tools/gpu_check.py --out $(or $(OUT),runs/gpu-check)

sanitize: setup
	@PYTHON=$(PY) JOBS=$(JOBS) bash tools/sanitize.sh

emulator-asan: dev
	@PYTHON=$(PY) JOBS=$(JOBS) SHORT=$(SHORT) bash tools/emulator_asan.sh

# For the night: more property cases than CI's 1,000 are
# EMBATTLE_PROPERTY_CASES=20000 make test TEST_LIMIT=7200.
mutation: dev
	@$(PY) -c "import cosmic_ray, coverage" 2>/dev/null || \
		$(PY) -m pip install --quiet $$($(PY) tools/requirements.py mutation)
	OMP_NUM_THREADS=1 $(PY) tools/mutation.py --processes $(JOBS) $(MUTATION)

clean:
	rm -rf build $(VENV) .venv-min .venv-recbole python/embattle/_C*.so
