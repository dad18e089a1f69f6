# make run     pre-train, evaluate and plot a small REALM        make test    all tests
# make bench   the benchmarks, beside their peers                make lint    every linter
# make build   rebuild the compiled modules in place             make clean   remove everything made here
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: run test lint bench build clean

$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet -e ".[model,bench,test,lint]"
	touch $@

build: $(VENV)/.installed
	$(BIN)/python setup.py --quiet build_ext --inplace
