# Needs make and Python 3.11 or newer; everything else goes into .venv, in the versions of constraints.txt.
# pip's own settings apply: with PIP_EXTRA_INDEX_URL set to PyTorch's CPU index, torch comes without its CUDA libraries.

PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell command -v $(name))))
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

demo: .venv/installed ## train and evaluate the miniature K2.5, write its report
	$(BIN)/baltoro recipe configs/nano.toml

test: .venv/installed ## run all tests
	@test -x /usr/bin/chromium || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q --no-install-recommends chromium; fi; \
	} || true
	@test -x /usr/bin/chromium || echo 'make: without /usr/bin/chromium the browser tests are skipped; run: sudo apt-get install chromium' >&2
	$(BIN)/python -m pytest -q

lint: .venv/installed ## style, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv-bench/installed ## compare with peers; each file prints one JSON line last
	@for file in bench/*.py; do \
		echo "== $$file"; .venv-bench/bin/python "$$file" || exit 1; \
	done

clean: ## remove the environments and caches; keeps runs/
	rm -rf .venv .venv-bench .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -exec rm -rf {} +

# The stamp is written last: an interrupted installation is taken up again, a complete one costs nothing.
.venv/installed: pyproject.toml constraints.txt
	$(call environment,.venv)
	$(BIN)/python -m pip install -q -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,dev]'
	@touch $@

.venv-bench/installed: pyproject.toml constraints.txt bench/requirements.txt
	$(call environment,.venv-bench)
	.venv-bench/bin/python -m pip install -q -c constraints.txt '$(TORCH)'
	.venv-bench/bin/python -m pip install -q -e '.[train]' -r bench/requirements.txt
	@touch $@

# Debian and Ubuntu pack ensurepip, which venv needs, apart from Python itself.
define environment
	@test -n '$(PYTHON)' || { echo 'make: no python3 found; install Python 3.11 or newer, or run make PYTHON=/path/to/python' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: $(PYTHON) is older than Python 3.11; install Python 3.11 or newer, or run make PYTHON=/path/to/python' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip' 2>/dev/null || { \
		package=$$('$(PYTHON)' -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q "$$package"; \
		else echo "make: Python's ensurepip is missing; run: sudo apt-get install $$package" >&2; exit 1; fi; }
	@echo 'Installing the pinned packages into $(1), once ...'
	@'$(PYTHON)' -m venv $(1)
endef
