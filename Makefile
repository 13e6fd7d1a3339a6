# Every target first makes or renews the environment it needs, in .venv (see scripts/setup_venv.sh).
.DEFAULT_GOAL := help
.PHONY: help setup setup-newest demo test test-newest lint clean

# Pytest processes; one file's tests stay in one process, which compiles each shape once. Files are
# taken in their order: those with the most tests first, the default, would leave long ones for last.
JOBS ?= 2
PYTEST = -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# What depends most on JAX, Flax, Orbax and Grain themselves.
NEWEST = $(addprefix tests/test_,batch_sharding.py checkpointing.py docs.py lra.py \
	modeling_vectors.py mosaic_dispatch.py package.py pipeline.py transforms.py)

export PYTHON EXTRAS

help:
	@echo "make setup        make .venv with all that is needed; EXTRAS=cuda13 or EXTRAS=tpu adds that"
	@echo "                  accelerator, PYTHON=/path/to/python names the Python (>= 3.12)"
	@echo "make demo         train a small ListOps classifier on the CPU and evaluate it"
	@echo "make test         run the tests, with the releases pinned in constraints.txt"
	@echo "make test-newest  run those closest to JAX with the newest releases of everything"
	@echo "make lint         ruff and pyrefly"
	@echo "make clean        remove the environments and caches; data/ and runs/ stay"

setup:
	@sh scripts/setup_venv.sh pinned .venv

setup-newest:
	@sh scripts/setup_venv.sh newest .venv-newest

# The trainer refuses a folder that has a run in it.
demo: setup
	rm -rf runs/demo
	.venv/bin/python scripts/train.py configs/demo.yaml
	.venv/bin/python scripts/evaluate.py runs/demo --mode expectation

test: setup
	.venv/bin/python $(PYTEST)

test-newest: setup-newest
	.venv-newest/bin/python $(PYTEST) $(NEWEST)

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyrefly check

clean:
	rm -rf .venv .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
