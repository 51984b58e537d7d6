# Two commands suffice on a fresh machine: `make train` and `make test`. Both set up what they need.
#   ARGS="..."     options passed on, as in: make train ARGS="--epochs 3"
#   PYTHON=...     the Python (3.11 or newer) to build .venv with
#   SKIP_FFCV=1    set up without FFCV

BIN := .venv/bin
ARGS ?=
# Waiting threads that spin for long slow down whatever shares the machine (docs/log.md).
export GOMP_SPINCOUNT ?= 10000
# Where it is set, as in many containers, each process compiles all that it imports anew: 4 s of torch.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test lint docs bench bench-gpu first-light bench-kernels clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-20s%s\n", $$1, $$2}'
	@sed -n '2,4s/^# */  /p' Makefile

setup:  ## Install everything into .venv (done once, then reused)
	@setup/install.sh

train: setup  ## Set up, train CURE on the quickstart recipe and write its report
	$(BIN)/cure-fast train quickstart $(ARGS)

test: setup  ## Set up and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: setup  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

docs: setup  ## Build the documentation into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: setup  ## Run the benchmarks
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

bench-gpu: setup  ## Measure steps on a CUDA GPU, engine against engine; figures go to bench/results/
	$(BIN)/python -m bench.gpu $(ARGS)

first-light:  ## Measure what is most worth knowing on a GPU, in five minutes; CALL=2 trains
	$(or $(wildcard $(BIN)/python),python3) -m bench.first_light --call $(or $(CALL),1) $(ARGS)

bench-kernels: setup  ## Test the kernels on a CUDA GPU, then measure them; figures go to bench/results/
	$(BIN)/python -m pytest tests/kernels -m gpu $(ARGS)
	$(BIN)/python -m pytest bench/bench_kernels.py --benchmark-only $(ARGS)

clean:  ## Remove .venv, caches and build outputs; runs/ and data/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .benchmarks setup.log
	find cure_fast kernels loaders bench examples tests -type d -name __pycache__ -prune -exec rm -rf {} +
