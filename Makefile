# Every target makes what it needs; all you need is Python 3.10 or newer, make and an internet connection.
#   make test PYTHON=python3.12                          another Python
#   make test CONSTRAINTS=constraints-lowest.txt         the oldest supported versions
#   make test CONSTRAINTS=                               the newest versions there are
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

BIN := $(VENV)/bin
# The name of the stamp holds the choice of versions: another choice installs anew.
STAMP := $(VENV)/.installed-$(notdir $(or $(CONSTRAINTS),newest))
DOCS_STAMP := $(STAMP)-docs
QUIET := $(shell test -t 2 || echo -qq)
# Workers share the cores, so each takes one thread; they must also order sets alike to agree on the tests.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg PYTHONHASHSEED=0

.DEFAULT_GOAL := help
.PHONY: help demo test wheel-test lint format coverage docs docs-clean bench-trust bench-roundtrip bench-guides bench-density bench-speed bench-memory bench-images bench-amortised bench-step bench-scaling bench-streaming clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## fit the eight schools with a flow guide, print and draw the result
	$(TEST_ENV) $(BIN)/python examples/eight_schools.py

test: $(STAMP)  ## run all tests and the examples in docstrings
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS)

wheel-test: $(STAMP)  ## build wheel and sdist, install the wheel away from the source, and test it there
	$(BIN)/python -m pip install $(QUIET) build twine
	$(TEST_ENV) $(BIN)/python tests/wheel.py $(ARGS)

lint: $(STAMP)  ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: $(STAMP)  ## run the tests and list the lines that none of them reaches
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --cov

docs: $(DOCS_STAMP)  ## build the documentation, running its tutorials: docs/_build/html/index.html
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -d docs/_build/doctrees -W -n --keep-going docs docs/_build/html

docs-clean:  ## remove the built documentation and what its tutorials printed
	rm -rf docs/_build

bench-roundtrip: $(STAMP)  ## measure the float32 round-trip error of deep stacks, here and in Pyro's coupling
	$(TEST_ENV) $(BIN)/python tests/benchmarks/round_trip.py

bench-guides: $(STAMP)  ## compare guides on posteriors with Pyro's and NUTS, hours; ARGS="--seeds 1" for less
	$(TEST_ENV) $(BIN)/python tests/benchmarks/guides.py --jobs $(WORKERS) $(ARGS)

bench-trust: $(STAMP)  ## check the verdict on three posteriors against long NUTS runs, about ten minutes
	$(TEST_ENV) $(BIN)/python tests/benchmarks/trust.py

bench-density: $(STAMP)  ## compare densities of real tables with other libraries, hours; ARGS="--seeds 1" for less
	$(TEST_ENV) $(BIN)/python tests/benchmarks/density.py $(ARGS)

bench-speed: $(STAMP)  ## compare steps, scores and draws with other libraries and the bare networks
	$(TEST_ENV) $(BIN)/python tests/benchmarks/speed.py $(ARGS)

bench-memory: $(STAMP)  ## measure peak memory and time of the three memory modes
	$(TEST_ENV) $(BIN)/python tests/benchmarks/memory.py $(ARGS)

bench-step: $(STAMP)  ## measure one training step of guides, ours and Pyro's
	$(TEST_ENV) $(BIN)/python tests/benchmarks/guide_step.py $(ARGS)

bench-scaling: $(STAMP)  ## measure fits by one process and by two; needs both cores idle
	$(TEST_ENV) $(BIN)/python tests/benchmarks/scaling.py $(ARGS)

bench-streaming: $(STAMP)  ## measure fits to a file of 4 GB within 1 GB of memory; ARGS="--gigabytes 1" for less
	$(TEST_ENV) $(BIN)/python tests/benchmarks/streaming.py $(ARGS)

bench-images: $(STAMP)  ## compare image flows on small digits with other libraries
	$(TEST_ENV) $(BIN)/python tests/benchmarks/images.py $(ARGS)

bench-amortised: $(STAMP)  ## compare amortised posteriors with exact draws
	$(TEST_ENV) $(BIN)/python tests/benchmarks/amortised.py $(ARGS)

clean:  ## remove the environment and all that was built
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install $(QUIET) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	touch $@

# Beside the above, if that is there: only what it does not have is installed.
$(DOCS_STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install $(QUIET) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[docs]'
	touch $@
