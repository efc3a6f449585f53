# make demo: compare attention mechanisms on scikit-learn's digits, from nothing, in a few minutes.
# make test: the same set-up, and the test suite.  make test-slow, make test-compile: what takes longer, or a compiler.
# make test-plain: mechanisms, model and training without kernels, switched off and without numba.
# make test-avx2: kernels as a CPU has them whose vectors are of 256 bits.
# make digits: train every mechanism on digits and fail where one stays below 90 %.  make lint: ruff and mypy.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# What must pass with and without kernels.
BOTH_WAYS := tests/attention tests/kernels tests/models tests/workflows/test_train.py
# A sample of it, for CI.
SMOKE := tests/attention/test_contract.py tests/models/test_vit.py
TESTS := -m pytest --numprocesses 2 --dist worksteal
AVX2 := NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+sse4.2,+popcnt,+avx,+f16c,+avx2,+fma,+bmi,+bmi2,+lzcnt

.PHONY: demo digits test test-plain test-avx2 test-smoke test-slow test-compile lint clean

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
	$(BIN)/python $(TESTS)

test-plain: $(INSTALLED)
	VITCMP_KERNELS=off $(BIN)/python $(TESTS) $(BOTH_WAYS)
	PYTHONPATH=tests/without_numba $(BIN)/python $(TESTS) $(BOTH_WAYS)

test-avx2: $(INSTALLED)
	$(AVX2) $(BIN)/python $(TESTS) tests/kernels tests/attention/test_softmax.py tests/attention/test_entmax.py \
		tests/attention/test_summed.py tests/attention/test_differential.py tests/attention/test_sigmoid.py

test-smoke: $(INSTALLED)
	VITCMP_KERNELS=off $(BIN)/python $(TESTS) $(SMOKE) -k "softmax or linear or local or entmax"
	PYTHONPATH=tests/without_numba $(BIN)/python $(TESTS) $(SMOKE) -k "softmax or linear or local or entmax"
	$(AVX2) $(BIN)/python $(TESTS) tests/kernels/test_layers_in_one_pass.py -k mlp

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
