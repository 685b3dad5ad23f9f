# Every target sets itself up: from a bare clone, `make quickstart` and `make test` are single commands.
# Variables: PYTHON (3.11 or newer), PYTEST_ARGS (passed to pytest; -n 0 runs tests in one process).

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

.PHONY: setup quickstart test test-fast lint bench clean help

help:
	@echo "make setup       .venv with pinned packages, and a sandbox backend"
	@echo "make quickstart  bare machine -> trained policy, in runs/quickstart"
	@echo "make test        every test; test-fast: a subset of about five minutes"
	@echo "make lint        ruff, mypy and the import rules"
	@echo "make bench       the programs in benchmarks/, their JSON in benchmarks/results"
	@echo "make clean       removes .venv and caches, keeps runs/"

$(STAMP): setup.py constraints.txt scripts/setup_venv.sh
	@bash scripts/setup_venv.sh "$(PYTHON)"
	@touch $@

setup: $(STAMP)
	@bash scripts/setup_sandbox.sh

quickstart: setup
	$(BIN)/python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart

# Two groups, because the number of devices is fixed when jax starts: tests marked devices8 see 8 fake CPU devices.
# The second runs even where the first fails, so that one call shows every failure.
test: setup
	@bash scripts/setup_for_tests.sh chromium chromium chromium-browser google-chrome
	@bash scripts/setup_for_tests.sh tmux tmux
	@bash scripts/setup_libtpu.sh
	@status=0; \
	$(PYTEST) -m "not devices8" || status=$$?; \
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(PYTEST) -m devices8 || status=$$?; \
	exit $$status

test-fast: $(STAMP)
	$(PYTEST) -m "not slow and not devices8"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy rome
	$(BIN)/lint-imports

bench: setup
	@set -e; for program in benchmarks/*.py; do \
	  case $$program in */__init__.py|*/_*|*/soak.py|*/serve_load.py|*/kills.py|*/overlap.py|*/chaos.py|*/native.py) continue;; esac; \
	  name=$$(basename $${program%.py}); \
	  $(BIN)/python -m benchmarks.$$name > benchmarks/results/$$name.jsonl; \
	  cat benchmarks/results/$$name.jsonl; \
	done

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +
