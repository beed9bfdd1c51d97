# The only door to every check; CI calls the same targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help demo test test-all test-portable audit lint format types docs bench clean

help:
	@echo "make demo      install and explain a bundled triplet; prints where the figure is"
	@echo "make test      lint, types, tests, notebooks and documentation"
	@echo "make test-all  the same with slow and GPU tests and the matrix of real networks"
	@echo "make test-portable  the numeric tests as on other processors, with one and two threads"
	@echo "make audit     pinned versions, hashes of their files, published faults; skips offline"
	@echo "make lint | types | docs | bench | format | clean"

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.base
	$(BIN)/simexplain demo --out simexplain-demo --force

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

# Two workers with a thread each; what differs between threads and processors is test-portable's.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-portable: $(VENV)/.dev
	$(BIN)/python tests/portable.py $(SETTINGS)

audit: $(VENV)/.dev
	$(BIN)/python docs/scripts/audit.py

# The matrix of real networks needs packages of others; what cannot be installed is skipped.
$(VENV)/.compat: $(VENV)/.dev
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,compat]'
	-$(BIN)/pip install -qq --no-deps facenet-pytorch torchreid
	touch $@

test-all: lint types $(VENV)/.compat
	$(BIN)/python -m pytest -m ''

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/explain.py --out docs/benchmarks/explain.md
	@echo "Pointing and faithfulness need folders of cut-outs: see benchmarks/faithfulness.py"

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache simexplain-demo
