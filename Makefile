# make demo: compare attention mechanisms on scikit-learn's digits, from nothing, in a few minutes.
# make test: the same set-up, and the test suite.  make test-slow, make test-compile: what takes longer, or a compiler.
# make digits: train every mechanism on digits and fail where one stays below 90 %.  make lint: ruff and mypy.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo digits test test-slow test-compile lint clean

demo: $(INSTALLED)
	@echo "Comparing attention mechanisms on digits; the study is written to results/demo."
	$(BIN)/vitcmp --results results/demo compare --quick

digits: $(INSTALLED)
	$(BIN)/vitcmp --results results/digits train --attention all --attention entmax:alpha=learned
	$(BIN)/python -c 'import vitcmp; \
		r = vitcmp.load_records("results/digits").query("kind == \"train\" and dataset == \"digits\""); \
		low = r[~(r.top1_pct > 90)]; print(r[["attention", "top1_pct"]].to_string(index=False)); \
		raise SystemExit(f"below 90 %: {list(low.attention)}" if len(low) else 0)'

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-compile: $(INSTALLED)
	$(BIN)/python -m pytest -m compiler

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
	rm -rf .venv results/demo results/digits build *.egg-info
