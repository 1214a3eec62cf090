# Every target sets up what it needs: on a fresh machine `make test` is enough.
# Needs GNU make and Python >= 3.11. Pass more options with ARGS, as in `make test ARGS="-k space"`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
CONSTRAINTS := .ci/constraints.txt

# What notebooks and documentation need besides, in the same environment.
DOCS_STAMP := $(VENV)/.docs-stamp

# The second environment: the newest torch that we support, with libraries that do not run beside the first one's torch.
INTEROP := .venv-interop
INTEROP_BIN := $(INTEROP)/bin
INTEROP_STAMP := $(INTEROP)/.stamp
INTEROP_CONSTRAINTS := .ci/constraints-interop.txt

# The third: the oldest.
OLDEST := .venv-oldest
OLDEST_BIN := $(OLDEST)/bin
OLDEST_STAMP := $(OLDEST)/.stamp
OLDEST_CONSTRAINTS := .ci/constraints-oldest.txt

BENCH := .benchmarks
BENCH_STAMP := $(VENV)/.stamp-bench

# One thread per process: test workers run side by side, and threads that compete for cores are slower than none.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help env demo quick test fuzz oldest interop bench power notebooks docs browse lint format types layers check wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## Make the virtual environment .venv, unless it is up to date

# torch first and alone: its exact spelling selects the build that the constraints were frozen with.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adjointlab needs Python >= 3.11: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,demo]'
	@touch $@

demo: $(STAMP) ## Run the demonstration
	$(BIN)/adjointlab demo $(ARGS)

test: $(STAMP) ## Run all tests and doctests, in parallel
	$(ONE_THREAD) $(BIN)/python -W error -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

quick: $(STAMP) ## Run a part of the tests in a minute or two: every fifth operator, one dtype, nothing slow
	$(ONE_THREAD) $(BIN)/python -W error -m pytest -n $(WORKERS) --dist worksteal --quick $(ARGS)

# Two files of one process each; what is found is printed at once, with the number that makes it again.
fuzz: $(STAMP) ## Try operators and changes at random, for an hour or two; FUZZ_STEPS=2000 FUZZ_OPERATORS=500 for less
	$(ONE_THREAD) FUZZ_STEPS=$${FUZZ_STEPS:-20000} FUZZ_OPERATORS=$${FUZZ_OPERATORS:-5000} \
		$(BIN)/python -W error -m pytest -s tests/fuzz -o faulthandler_timeout=0 $(ARGS)

# The oldest torch that we support.
$(OLDEST_STAMP): pyproject.toml $(OLDEST_CONSTRAINTS)
	test -x $(OLDEST_BIN)/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.6.0
	$(OLDEST_BIN)/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST_CONSTRAINTS) -e '.[dev,demo]'
	@touch $@

# All of what depends on the version of torch or needs other libraries; of the rest, the quick part unless WHOLE is set.
ON_TORCH := tests/transpose tests/interop tests/adapters tests/test_docs.py
define on_torch
$(ONE_THREAD) $(1)/python -W error -m pytest -n $(WORKERS) --dist worksteal $(ON_TORCH) $(ARGS)
$(ONE_THREAD) $(1)/python -W error -m pytest -n $(WORKERS) --dist worksteal $(if $(WHOLE),,--quick) \
	-m "not packaging" $(ON_TORCH:%=--ignore=%) $(ARGS)
endef

oldest: $(OLDEST_STAMP) ## Run the tests on the oldest supported torch, in .venv-oldest; all of them with WHOLE=1
	$(call on_torch,$(OLDEST_BIN))

# torch and torchvision first and alone, spelt like this: see $(STAMP).
$(INTEROP_STAMP): pyproject.toml $(INTEROP_CONSTRAINTS)
	test -x $(INTEROP_BIN)/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(INTEROP_BIN)/python -m pip install --quiet --disable-pip-version-check -c $(INTEROP_CONSTRAINTS) \
		-e '.[dev,demo]' deepinv==0.5.0 mrpro==0.261015 pylops==2.8.0 pyproximal==0.13.0 torchkbnufft==1.5.2 \
		astra-toolbox==2.5.0 jax==0.10.2
	@touch $@

interop: $(INTEROP_STAMP) ## Run the tests beside deepinv, mrpro and ASTRA, on the newest supported torch, in .venv-interop; WHOLE=1
	$(call on_torch,$(INTEROP_BIN))

# What only the benchmarks need: JAX, and all that they compare with.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[bench]'
	@touch $@

# Without pytest's capture of logs, which has torch.compile write a great many. The results are rendered even if a
# benchmark fails; a quick or partial run leaves docs/ alone.
bench: $(BENCH_STAMP) ## Run the benchmarks and render docs/benchmarks.md; a smoke test with ARGS=--quick
	@mkdir -p $(BENCH)
	status=0; $(BIN)/python -W error -m pytest tests/benchmarks -p no:logging -o faulthandler_timeout=0 -o python_files='bench_*.py' \
		--benchmark-enable --benchmark-json=$(BENCH)/latest.json --benchmark-disable-gc --benchmark-sort=fullname \
		--benchmark-columns=median,iqr,rounds $(ARGS) || status=$$?; \
	$(BIN)/python tests/benchmarks/render.py $(BENCH)/latest.json docs; \
	$(BIN)/python docs/headline.py; exit $$status

power: $(STAMP) ## Inject bugs into adjoints, and write what the check sees of them to docs/verification_power.md
	$(ONE_THREAD) $(BIN)/python -m tests.verify_power $(ARGS)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,demo,notebooks,docs]'
	@touch $@

notebooks: $(DOCS_STAMP) ## Run the notebooks and keep their outputs; ARGS=--check leaves the files as they are
	$(ONE_THREAD) $(BIN)/python notebooks/execute.py $(ARGS)

docs: $(DOCS_STAMP) ## Build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python docs/headline.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html $(ARGS)
	@echo "built: docs/_build/html/index.html"

browse: docs ## Look at the documentation in headless Chromium, at the width of a desktop and of a phone; pictures in build/pages
	$(BIN)/python docs/browse.py docs/_build/html --shots build/pages $(ARGS)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(STAMP) ## Check the types
	$(BIN)/mypy
	if command -v node > /dev/null; then $(BIN)/pyright --pythonpath $(BIN)/python; else echo "no pyright: it needs Node"; fi

layers: $(STAMP) ## Check that imports only point down
	$(BIN)/lint-imports

check: lint types layers ## lint, types and layers

wheel: $(STAMP) ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build --no-isolation --outdir dist

clean: ## Remove everything that was made, .venv included
	rm -rf $(VENV) $(OLDEST) $(INTEROP) dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks .coverage htmlcov
	find adjointlab examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
