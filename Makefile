# Every target makes what it needs from nothing; a second call is quick.
#   make PYTHON=python3.12 test        another Python
#   make test PYTEST_FLAGS="-k masks"  some tests, in one process

PYTHON ?= python3
VENV ?= .venv
WHEEL_VENV ?= .venv-wheel
COMPAT_VENV ?= .venv-compat
EXAMPLES_VENV ?= .venv-examples
# One process a core, and one thread a process (tests/conftest.py).
PYTEST_FLAGS ?= -n auto --maxprocesses 8 --dist loadscope
# A pytest -m expression: which tests to run against the wheel; with WHEEL_TESTS= all of them.
WHEEL_TESTS ?= not matrix and not ray
# Which of how many parts of the architectures `make test-full` takes.
SHARD ?= 1/1
# How long `make campaign` tries to break the program.
SECONDS ?= 900
# What depends on the releases of others: not the texts, the documentation or the packaging, and not
# the teams of processes, one of which streams its model: that needs transformers 5.
COMPAT_TESTS ?= tests/layout tests/data tests/model tests/walk tests/pruning tests/search tests/run \
	tests/cost tests/engine tests/testing/test_models.py tests/builtin tests/cli tests/evaluation \
	tests/test_parity.py \
	--ignore=tests/engine/test_team.py

PIP_INSTALL := -m pip --disable-pip-version-check install --quiet -c constraints.txt
EXAMPLES := $(wildcard docs/examples/*/pyproject.toml)
SOURCES := $(shell find neuroal plugins -type f -not -path '*/__pycache__/*' 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-full test-ray campaign models check lint format docs wheel test-wheel test-compat examples clean distclean

help: ## show this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.run ## prune the built-in model and compare the methods (under two minutes)
	$(VENV)/bin/neuroal demo

test: $(VENV)/.dev ## run the test suite, of many combinations some (under ten minutes on two cores)
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m "not matrix and not ray" --durations=20

test-full: $(VENV)/.dev ## run what `make test` leaves out; SHARD=1/4 takes a part of the architectures
	NEUROAL_SHARD=$(SHARD) $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 -m matrix tests

test-ray: $(VENV)/.dev ## run studies on a Ray cluster of this machine, and kill its nodes
	$(VENV)/bin/python -m pytest -m ray tests/study

campaign: $(VENV)/.dev ## kill runs, fill disks, mutate inputs for SECONDS=900, and print what came of it
	$(VENV)/bin/python -m tests.campaign --seconds $(SECONDS)

models: $(VENV)/.dev ## measure docs/models.md anew; goes on where it was stopped
	$(VENV)/bin/python -m tests.architectures

check: lint test ## all that has to pass: format, lint, types, import contracts, tests

lint: $(VENV)/.dev ## check without the tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev ## put the source into the house's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(VENV)/.docs ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict --clean --config-file .mkdocs.yml

wheel: dist/.built ## build the wheel into dist/

# From an empty folder and with PYTHONSAFEPATH, so that the checkout cannot stand in for the wheel;
# tests/conftest.py stops the run where it does all the same.
test-wheel: $(WHEEL_VENV)/.run ## run the tests against the built wheel
	@away=$$(mktemp -d) && trap 'rm -rf "$$away"' EXIT && cd "$$away" && \
	PYTHONSAFEPATH=1 NEUROAL_TEST_WHEEL=1 "$(abspath $(WHEEL_VENV))/bin/python" -m pytest \
		-p no:cacheprovider -c "$(CURDIR)/pyproject.toml" $(PYTEST_FLAGS) \
		$(if $(WHEEL_TESTS),-m "$(WHEEL_TESTS)") "$(CURDIR)/tests"

test-compat: $(COMPAT_VENV)/.run ## run the suite's core with the oldest transformers and datasets
	$(COMPAT_VENV)/bin/python -m pytest -p no:cacheprovider $(PYTEST_FLAGS) -m "not slow and not matrix" $(COMPAT_TESTS)

examples: $(EXAMPLES_VENV)/.run ## install the example packages beside neuroal's wheel, and run them
	bash docs/examples/run.sh "$(abspath $(EXAMPLES_VENV))/bin"

clean: ## remove builds and caches
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find neuroal plugins tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf $(VENV) $(WHEEL_VENV) $(COMPAT_VENV) $(EXAMPLES_VENV)

# Environments. torch comes first and alone: the tested version, and no other build beside it.

%/.made:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("neuroal needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=...")'
	$(PYTHON) -m venv --clear $*
	@touch $@

%/.torch: %/.made constraints.txt
	@echo "installing torch (a minute or two)"
	$*/bin/python $(PIP_INSTALL) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml neuroal/version.py
	@echo "installing neuroal and what it needs"
	$(VENV)/bin/python $(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml neuroal/version.py
	@echo "installing neuroal, what it needs and what its checks need"
	$(VENV)/bin/python $(PIP_INSTALL) -e ".[dev]"
	@touch $(VENV)/.run $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml constraints.txt neuroal/version.py
	@echo "installing what the documentation needs"
	$(VENV)/bin/python $(PIP_INSTALL) -e ".[docs]"
	@touch $(VENV)/.run $@

$(WHEEL_VENV)/.run: $(WHEEL_VENV)/.torch dist/.built
	@echo "installing the wheel and what its tests need"
	@$(WHEEL_VENV)/bin/python -m pip uninstall -qq --yes neuroal
	$(WHEEL_VENV)/bin/python $(PIP_INSTALL) "$$(echo dist/neuroal-*.whl)[test]"
	@touch $@

$(COMPAT_VENV)/.run: $(COMPAT_VENV)/.torch pyproject.toml constraints-compat.txt neuroal/version.py
	@echo "installing neuroal with older releases of what it needs"
	$(COMPAT_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
		-c constraints-compat.txt -e ".[test]"
	@touch $@

$(EXAMPLES_VENV)/.run: $(EXAMPLES_VENV)/.torch dist/examples/.built
	@echo "installing the wheels of neuroal and of the examples"
	@$(EXAMPLES_VENV)/bin/python -m pip uninstall -qq --yes neuroal neuroal-nowag neuroal-halving
	$(EXAMPLES_VENV)/bin/python $(PIP_INSTALL) "$$(echo dist/neuroal-*.whl)[test]" dist/examples/*.whl
	@touch $@

dist/.built: $(VENV)/.dev pyproject.toml README.md LICENSE $(SOURCES)
	rm -rf dist
	$(VENV)/bin/python -m build --wheel
	@touch $@

dist/examples/.built: dist/.built $(EXAMPLES) $(shell find docs/examples -path '*/src/*' -name '*.py')
	rm -rf dist/examples
	for example in $(dir $(EXAMPLES)); do \
		$(VENV)/bin/python -m build --wheel --outdir dist/examples $$example || exit 1; \
	done
	@touch $@

.SECONDARY:
