# make run     pre-train, evaluate and plot a small REALM     make test    every test
# make bench   the benchmarks, beside their peers             make lint    every linter
# make build   rebuild the compiled modules in place          make dist    sdist and wheel, installed and imported
# make clean   remove everything made here
PYTHON ?= python3
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh' 2>/dev/null)

.PHONY: run test bench lint build dist clean

run: $(READY)
	$(BIN)/realm-model world pretrain --out $(OUT)
	$(BIN)/realm-model world evaluate --run $(OUT)

test: $(READY)
	$(BIN)/python -m pytest tests

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# Everything a fresh machine lacks. torch comes first and pinned, so that nothing else chooses its version.
$(READY): requirements-dev.txt pyproject.toml setup.py CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -e ".[model,bench,test,lint]"
	touch $@

build: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m pip install --quiet --no-deps --target dist/installed dist/*.whl
	cd dist/installed && $(CURDIR)/$(BIN)/python -c "import realm_kernels as rk; print(rk.build_info())"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks realm_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
