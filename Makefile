# make run     pre-train, evaluate and plot a small REALM     make test    every test
# make squad   text: corpus, ICT, REALM, index, fine-tuning, evaluation beside BM25
# make bench   the benchmarks, beside their peers             make lint    every linter
# make build   rebuild the compiled modules in place          make dist    sdist and wheel, installed and imported
# make clean   remove everything made here                   make sanitize   the CPU kernels, sanitizers on
# make gpu     where an NVIDIA GPU is: build for it, test, benchmark, compute-sanitizer. Parts: gpu-build, gpu-test,
#              gpu-bench, gpu-sanitize. Nothing is downloaded: PYTHON= has torch, triton, cmake, ninja, pybind11, pytest
PYTHON ?= python3
OUT ?= runs/demo
# paragraphs.jsonl (id, title, text) and questions.jsonl (question, answers, paragraph)
SQUAD_DATA ?= ../shared/data/squad
SQUAD ?= runs/squad
THREADS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh' \
	'tests/sanitize/*' 'tests/cuda_model/*' 2>/dev/null)

.PHONY: run squad test bench lint build dist sanitize clean gpu gpu-all gpu-build gpu-test gpu-sanitize gpu-bench

run: $(READY)
	$(BIN)/realm-model world pretrain --out $(OUT)
	$(BIN)/realm-model world evaluate --run $(OUT)

# Killed at any point, the same command goes on; THREADS= of torch. Every stage is evaluated on the articles held out.
squad: $(READY)
	@test -f $(SQUAD_DATA)/paragraphs.jsonl -a -f $(SQUAD_DATA)/questions.jsonl || { \
	  echo "make squad: SQUAD_DATA=$(SQUAD_DATA) must be a folder with paragraphs.jsonl (id, title, text) and" \
	  "questions.jsonl (question, answers, paragraph)"; exit 1; }
	test -d $(SQUAD)/corpus || $(BIN)/realm-model corpus $(SQUAD_DATA)/paragraphs.jsonl --out $(SQUAD)/corpus --block 128
	$(BIN)/realm-model split --corpus $(SQUAD)/corpus --questions $(SQUAD_DATA)/questions.jsonl --articles 30 --out $(SQUAD)
	$(BIN)/realm-model ict --threads $(THREADS) --corpus $(SQUAD)/corpus --out $(SQUAD)/ict
	$(BIN)/realm-model index --threads $(THREADS) --corpus $(SQUAD)/corpus --model $(SQUAD)/ict --out $(SQUAD)/ict-index
	$(BIN)/realm-model evaluate --threads $(THREADS) $(SQUAD_EVALUATION) --model $(SQUAD)/ict --index $(SQUAD)/ict-index --out $(SQUAD)/ict.json --bm25
	$(BIN)/realm-model pretrain --threads $(THREADS) --corpus $(SQUAD)/corpus --from $(SQUAD)/ict --out $(SQUAD)/realm
	$(BIN)/realm-model index --threads $(THREADS) --corpus $(SQUAD)/corpus --model $(SQUAD)/realm --out $(SQUAD)/index
	$(BIN)/realm-model evaluate --threads $(THREADS) $(SQUAD_EVALUATION) --model $(SQUAD)/realm --index $(SQUAD)/index --out $(SQUAD)/realm.json
	$(BIN)/realm-model finetune --threads $(THREADS) --corpus $(SQUAD)/corpus --model $(SQUAD)/realm --index $(SQUAD)/index \
		--questions $(SQUAD)/train.jsonl --out $(SQUAD)/tuned $(SQUAD_TUNING)
	$(BIN)/realm-model evaluate --threads $(THREADS) $(SQUAD_EVALUATION) --model $(SQUAD)/tuned --index $(SQUAD)/index --out $(SQUAD)/tuned.json \
		--beside $(SQUAD)/ict.json --beside $(SQUAD)/realm.json

SQUAD_EVALUATION = --corpus $(SQUAD)/corpus --questions $(SQUAD)/held_out.jsonl --length 176
# From nothing, so with a rate fifty times the released one. Of many questions few blocks are read.
SQUAD_TUNING = --steps 1000 --batch 16 --reader-beam 2 --searcher-beam 1000 --lr 5e-4 --length 176

test: $(READY)
	$(BIN)/python -m pytest tests

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

# OP= one op, OUT= folder for the JSON and Markdown, EMBEDDINGS= an index of realm-model to compare searches on,
# ARGS= what else `python -m benchmarks.gpu --help` tells.
gpu: gpu-all
gpu-all gpu-build gpu-test gpu-sanitize gpu-bench:
	@PYTHONPATH=".:python$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks.gpu $(@:gpu-%=%) \
		--out "$(if $(filter file,$(origin OUT)),gpu-results,$(OUT))" $(OP:%=--op %) $(EMBEDDINGS:%=--embeddings %) $(ARGS)

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

# Bounds and undefined behaviour in one build, races in another: the two do not mix.
sanitize: $(READY)
	for kinds in address,undefined thread; do \
	  folder=build/sanitize-$${kinds%%,*}; export PATH="$(CURDIR)/$(BIN):$$PATH" TSAN_OPTIONS=halt_on_error=1; \
	  cmake -S . -B $$folder -G Ninja -DREALM_KERNELS_SANITIZE=$$kinds -DREALM_KERNELS_WERROR=ON >/dev/null \
	  && cmake --build $$folder && $$folder/sanitize || exit 1; \
	done

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m pip install --quiet --no-deps --target dist/installed dist/*.whl
	cd dist/installed && $(CURDIR)/$(BIN)/python -c "import realm_kernels as rk; print(rk.build_info())"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks realm_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
