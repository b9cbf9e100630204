# make demo    the whole pipeline on images that it draws itself; prints a test AUC
# make test    all tests
# make check   style and types
# make lock    the versions of this environment to requirements.lock
#
# Each sets up .venv by itself. PYTHON chooses the interpreter; TORCH="torch==x.y" is installed before the rest, for
# a machine that needs a certain build; LOCK=requirements.lock installs the versions of that file; everything else
# honours the user's pip configuration.

PYTHON ?= python3
TORCH ?=
LOCK ?=
TEST_WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# dvc runs `fpt`, and both must be the ones of the virtual environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test check docs lock setup
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@# From an archive there is no Git to find; DVC has to be told.
	@git rev-parse --is-inside-work-tree >/dev/null 2>&1 || dvc config --local core.no_scm true
	dvc repro
	@fpt demo summary

test: $(STAMP)
	@# One torch thread a test process: many tests start processes, and threads of two would fight for the cores.
	OMP_NUM_THREADS=1 pytest -n $(TEST_WORKERS) --dist worksteal

check: $(STAMP)
	ruff check .
	ruff format --check .
	mypy
	lint-imports

docs: $(STAMP)
	$(BIN)/python -m pipeline.method_tables docs/methods.md
	$(BIN)/python -m pipeline.recipe_tables docs/recipes.md
	$(BIN)/python -m pipeline.modality_tables docs/models.md

lock: $(STAMP)
	@{ echo "# Versions with which all tests passed, for pip's --constraint; written by make lock."; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$'; } > requirements.lock

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "$(PYTHON) is missing or older than Python 3.11. Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "The virtual environment could not be made. On Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
ifneq ($(TORCH),)
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK)) $(TORCH)
endif
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK)) -e '.[dev,demo]'
	@touch $@
