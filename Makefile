# The two commands are `make quickstart` and `make test`; each builds what it needs.
PYTHON ?= python3
# upstream, or onedl (the maintained fork of the OpenMMLab libraries; the default on a
# machine with an NVIDIA GPU)
STACK ?= $(shell $(PYTHON) -m tools.dev.make_env --which)
VENV := $(if $(filter onedl,$(STACK)),.venv-onedl,.venv)
PY := $(VENV)/bin/python
# mmengine finds packages with pkg_resources, which warns each time
export PYTHONWARNINGS := ignore:pkg_resources is deprecated
# where `make docs` puts the site, and the small environment that builds it
SITE ?= site
DOCS_VENV ?= .venv-docs

.PHONY: help env check quickstart test test-all lint format bench study docs clean \
	distclean
.DEFAULT_GOAL := help

help:
	@echo 'make env         the environment in $(VENV); two to five minutes, once'
	@echo 'make quickstart  distil a small detector and a small segmentor, 5 to 15 minutes'
	@echo 'make test        the quick tests;  make test-all: the slow ones too'
	@echo 'make lint        ruff;  make format: fix what ruff can fix'
	@echo 'make bench       timings and memory'
	@echo 'make study       does a student gain on real images? hours; see docs/results.md'
	@echo 'make docs        the documentation as a site, in $(SITE)/; seconds'
	@echo 'make clean       what the tools leave behind;  make distclean: also the'
	@echo '                 environments and work_dirs'

env:
	@$(PYTHON) -m tools.dev.make_env --stack $(STACK)

check: env
	$(PY) tools/check_env.py

quickstart: env
	@$(PY) -m tools.dev.quickstart

test: env
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal -m 'not slow and not gpu'

test-all: env
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: env
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: env
	$(PY) -m benchmarks

study: env
	$(PY) -m study

docs: $(DOCS_VENV)/made
	@# the theme advertises its successor; see requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict \
		--site-dir '$(abspath $(SITE))'

$(DOCS_VENV)/made: requirements-docs.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf build dist site .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-onedl .venv-docs work_dirs
