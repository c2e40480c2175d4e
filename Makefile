# Everything is idempotent: a second run skips what is there. `make` alone prints this help.
# Settings: EMBEDLINE_PORT (54329), EMBEDLINE_PGDATA (.postgres), MODEL, NAME, ARGS, TORCH, SEED, SECONDS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export EMBEDLINE_PORT EMBEDLINE_PGDATA TORCH
# Without it each process of pytest compiles all tests at each run, for 20 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

MODEL ?= static-256
NAME  ?=
ARGS  ?=
TORCH ?=

# The system's own Python and nothing else: no user site, no other interpreter from PATH.
BOOTSTRAP := PYTHONPATH=python_udfs PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m embedline.dev.cluster.bootstrap
WITH_DSN  := EMBEDLINE_DSN="$$($(BOOTSTRAP) dsn)"

.PHONY: help setup up demo demo-upgrade test test-faults coverage bench golden lint dsn psql down clean _lint-setup _test-setup

help: ## print this help
	@awk 'BEGIN {FS = ":.*## "; print "usage: make TARGET\n"} /^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile

setup: ## install system packages, pgvector, the virtual environment and the models
	@$(BOOTSTRAP) setup

up: ## set up, start the local cluster, bring its schema to head
	@$(BOOTSTRAP) up

demo: up ## make the PostgreSQL manual searchable by meaning (MODEL=static-256 or minilm)
	@echo "» Running the demo with model $(MODEL)" >&2
	@$(WITH_DSN) .venv/bin/python -m embedline.dev.demo --model $(MODEL)

demo-upgrade: up ## another model for pages that are searched and edited all the time, and back, and for good
	@echo "» Running the demo of a model upgrade" >&2
	@$(WITH_DSN) .venv/bin/python -m embedline.dev.demo --upgrade

.PHONY: demo-finetune _train-setup
_train-setup: up
	@$(BOOTSTRAP) train-setup

demo-finetune: _train-setup ## train the manual's model on half of its index terms; gate, cutover, rollback (TORCH=1 insists on torch)
	@echo "» Running the demo of fine-tuning" >&2
	@$(WITH_DSN) .venv/bin/python -m embedline.dev.demo --finetune

.PHONY: demo-images _images-setup
_images-setup: up
	@$(BOOTSTRAP) images-setup

demo-images: _images-setup ## search emoji and icons by words and by a picture; trains their model once (TORCH=1)
	@echo "» Running the demo of images" >&2
	@$(WITH_DSN) .venv/bin/python -m embedline.dev.demo --images

# Where a build of torch without CUDA is offered, it is installed; elsewhere the tests that need it are skipped.
_test-setup: up
	@$(BOOTSTRAP) test-setup

# Four processes on two cores, because most tests wait for a backend or a model host; three for faults, some of which have a
# limit in seconds. The order is that of tests/conftest.py.
PYTEST := EMBEDLINE_TORCH=$(TORCH) $(WITH_DSN) .venv/bin/pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder --durations 30

test: _test-setup ## run the tests but those of faults (ARGS='-k name' goes to pytest; TORCH=1 insists on torch, 0 skips it)
	@echo "» Running the tests" >&2
	@$(PYTEST) -m "not faults" $(ARGS)

test-faults: _test-setup ## run the tests that kill, break and slow down, and those that wait for pg_cron
	@echo "» Running the tests of faults" >&2
	@$(PYTEST) --numprocesses 3 -m faults $(ARGS)

.PHONY: torture
torture: _test-setup ## write, kill and compute every vector again (SECONDS=600; SEED=n runs a run's statements again)
	@echo "» Torture" >&2
	@PYTHONPATH=tests:python_udfs .venv/bin/python -m torture.run --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: soak
soak: _test-setup ## write 50 rows a second for an hour; tell whether memory, queue and lag stay flat (SECONDS=3600)
	@echo "» Soak" >&2
	@PYTHONPATH=tests:python_udfs .venv/bin/python -m torture.soak --seconds $(or $(SECONDS),3600)

# Statements that run in backends and model hosts count, too: see tests/measuring.
coverage: _test-setup ## run all tests and print which statements of the package they run, in servers and outside (ARGS)
	@rm -rf .build/coverage && mkdir -p .build/coverage && chmod 1777 .build/coverage
	@status=0; PYTHONPATH=$(CURDIR)/tests/measuring $(PYTEST) $(ARGS) || status=$$?; \
	cd .build/coverage; export EMBEDLINE_COVERAGE_DATA=data; \
	../../.venv/bin/coverage combine --quiet --rcfile ../../tests/measuring/coverage.ini .; \
	../../.venv/bin/coverage report --rcfile ../../tests/measuring/coverage.ini; \
	exit $$status

bench: _test-setup ## run a benchmark (NAME=drain-stub, all, or "x --save"; without NAME it lists them)
	@echo "» Running benchmark $(or $(NAME),of every kind)" >&2
	@$(WITH_DSN) .venv/bin/python tests/bench/run.py $(NAME)

.PHONY: platforms
platforms: ## try HEAD on other releases of Debian, as root (NAME=trixie; ARGS='--steps demo,test --users root')
	@PYTHONPATH=python_udfs:tests PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m platforms.run $(NAME) $(ARGS)

_lint-setup:
	@$(BOOTSTRAP) lint-setup

lint: _lint-setup ## check style, types, layers, SQL and migrations
	@echo "» ruff" >&2
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@echo "» mypy --strict" >&2
	@.venv/bin/mypy --strict
	@echo "» import-linter" >&2
	@.venv/bin/lint-imports
	@echo "» sqlfluff" >&2
	@.venv/bin/sqlfluff lint --processes 0 sql
	@echo "» squawk on the rendered migrations" >&2
	@mkdir -p .build
	@.venv/bin/alembic upgrade head --sql >.build/migrations.sql
	@.venv/bin/squawk --config .squawk.toml .build/migrations.sql
	@echo "» pgspot on the rendered migrations and sql/" >&2
	@PYTHONPATH=python_udfs .venv/bin/python -m embedline.dev.spot .build/migrations.sql

.PHONY: docs _docs-setup
_docs-setup:
	@$(BOOTSTRAP) docs-setup

docs: _docs-setup ## build the pages of docs/ as a site into .build/site; a warning fails
	@echo "» mkdocs build --strict" >&2
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --config-file .mkdocs.yml
	@echo "  open .build/site/index.html" >&2

golden: _test-setup ## write sql/README.md, docs/reference/metrics.md, and the schema and the rights in tests/golden
	@PYTHONPATH=python_udfs PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m embedline.dev.sql_index
	@PYTHONPATH=python_udfs PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m embedline.dev.metric_index
	@EMBEDLINE_UPDATE_GOLDEN=1 $(WITH_DSN) .venv/bin/pytest -n 0 -q tests/db/test_golden.py

dsn: ## print the connection URI of the local database, and nothing else
	@$(BOOTSTRAP) dsn

psql: ## open psql on the local database
	@$(BOOTSTRAP) psql

down: ## stop the local cluster; its data stay
	@$(BOOTSTRAP) down

clean: ## stop the local cluster and remove it, .venv, .models and caches
	@$(BOOTSTRAP) clean
