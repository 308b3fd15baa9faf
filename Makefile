# Needs git, make and Python >= 3.11; everything else comes into .venv from wheels.

# The first of these that runs (a version manager's stub may not) and is new enough.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/installed
IN_PARALLEL := -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help demo dev test faults soak check bench clean

help: ## say what there is
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 14

demo: $(INSTALLED) ## run the reference sagas (ARGS=payment: one), kill the worker, check every promise
	@$(BIN)/python -m sagas.demo $(ARGS)

dev: $(INSTALLED) ## keep Postgres, Valkey, worker, beat and Flower up until Ctrl-C (ARGS=--fresh)
	@$(BIN)/celery -A tasks.app saga dev $(ARGS)

test: $(INSTALLED) ## run the whole suite against real, embedded servers (ARGS=tests/machine)
	@$(BIN)/pytest $(or $(ARGS),$(IN_PARALLEL))

faults: $(INSTALLED) ## the long matrix of real faults, with both brokers (needs RabbitMQ, PgBouncer, faketime)
	@$(BIN)/pytest tests/faults -m "long or not long" --timeout 900 $(ARGS)

soak: $(INSTALLED) ## a random mix of faults (MINUTES=10 SEED=a printed one)
	@$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(ARGS)

check: $(INSTALLED) ## lint, format, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(INSTALLED) ## measure next to a raw Celery chain and bare commits (ARGS="--case three --runs 100")
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what the commands above made
	@rm -rf .venv .dev dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 is needed; name yours with make PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making .venv with $(PYTHON)" && \
		$(PYTHON) -m venv --clear .venv; }
	@echo "Installing"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[embedded,flower,reference,dev]'
	@touch $@
