# All of them work on a fresh clone with nothing but Python >= 3.11. They make .venv and install
# into it when pyproject.toml has changed.
#
#   make demo [ARGS="num_edits=50"]           edit the bundled demo model
#   make test [ARGS="-k packing -n 0"]        lint, types, tests; ARGS=--cov with coverage
#   make docs                                 the documentation in site/; fails for a broken link
#   make demo PYTHON=python3.12               with another Python (remove .venv first)

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: help demo test docs clean
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/.demo
	@$(BIN)/python -m locft_jax.edit --overwrite $(ARGS)

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -rs -n auto --maxprocesses 8 --dist loadfile $(ARGS)

docs: .venv/.docs
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --strict --quiet

.venv/.demo: pyproject.toml
	$(call environment,about 2 minutes)
	@$(PIP) -e .
	@touch $@

.venv/.test: pyproject.toml
	$(call environment,about 4 minutes)
	@$(PIP) -e '.[test]'
	@touch .venv/.demo $@

.venv/.docs: pyproject.toml
	$(call environment,about 2 minutes)
	@$(PIP) -e '.[docs]'
	@touch .venv/.demo $@

clean:
	rm -rf .venv site .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An environment without pip is one whose creation broke off.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo 'locft-jax needs Python >= 3.11; "$(PYTHON)" is older or missing. Say which: make PYTHON=python3.12 ...' >&2; exit 1; }
@echo 'creating .venv, installing ($(1))'
@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv .venv; } || { rm -rf .venv; \
	echo '"$(PYTHON) -m venv" failed, see above; Debian and Ubuntu have it in the package python3-venv' >&2; exit 1; }
endef
