# Everything happens in .venv beside this file; nothing global is touched.
# Another interpreter: make install PYTHON=python3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test test-slow lint format clean

help:
	@echo "make install    virtual environment $(VENV) with the package and its development tools"
	@echo "make demo       canopy height of a real scene: outputs/demo/canopy_height.tif and .png"
	@echo "make test       test suite (tests marked slow or gpu are left out)"
	@echo "make test-slow  the slow tests"
	@echo "make lint       ruff and mypy"
	@echo "make format     rewrite the code as ruff wants it"
	@echo "make clean      remove the virtual environment, caches and outputs/"

install: $(VENV)/.installed

# The wheel deepforest holds real NEON scenes under an open licence; the demo and the tests read
# them as files. Its dependencies are not needed for that, and are many.
$(VENV)/.runtime: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 12) else \
	"dinov3geo needs Python 3.12 or newer, but $(PYTHON) is %d.%d; try: make install PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable .
	$(BIN)/python -m pip install --no-deps deepforest
	@touch $@

$(VENV)/.installed: $(VENV)/.runtime
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/dinov3geo demo --out outputs/demo --overwrite

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dinov3geo tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
