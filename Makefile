# make train: set up and train.  make check: set up and try it out.  make test: set up and test.  All from a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux without a GPU this spares you the CUDA build of torch, about 3 GB:
#   make train TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(12, (3 * os.cpu_count() + 1) // 2))")
PIP := $(BIN)/pip install --disable-pip-version-check --quiet

.PHONY: setup train check test soak test-gpu lint format build clean

setup: $(VENV)/installed

train: setup
	$(BIN)/dmnist train --dataset auto

# A minute: examines the machine, then trains at 1, 2, ... processes and compares the weights.
check: setup
	$(BIN)/dmnist doctor --dataset auto
	$(BIN)/dmnist verify

# More workers than cores, because tests also wait. Each takes whole files, the slow ones first.
# Compiled files are kept even where the environment forbids it, for the tests start many programs.
test: $(VENV)/installed-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Many repetitions and rare variants, of which `make test` runs a short form.
soak: $(VENV)/installed-dev
	$(BIN)/pytest -m soak

# On a machine with a GPU or another accelerator: what only it can show. `make test` hides GPUs from all tests.
test-gpu: $(VENV)/installed-dev
	$(BIN)/pytest -m gpu

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

format: $(VENV)/installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

build: $(VENV)/installed-dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# With TORCH_INDEX, torch comes from that index and the rest from the usual one, in two calls: asked about both
# at once, pip takes whichever has the newer version of anything. The second call brings what came along with
# torch to the tested versions.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV), once: this takes a minute or more."
	@$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) $$(grep '^torch==' constraints.txt))
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
