# make demo: compare attention mechanisms on scikit-learn's digits, from nothing, in a few minutes.
# make test: the same set-up, and the test suite.  make lint: ruff and mypy.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow lint clean

demo: $(INSTALLED)
	@echo "Comparing attention mechanisms on digits; the study is written to results/demo."
	$(BIN)/vitcmp --results results/demo compare --quick

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vitcmp needs Python 3.11 or newer; name one with PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv: PyTorch and the rest, some gigabytes and a few minutes the first time."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv results/demo build *.egg-info
