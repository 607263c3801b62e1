# make demo   train, evaluate and draw the two-tower on handwritten-digit scenes
# make test   lint, type check and the fast tests; `make test-slow` runs the slow ones, and `make test-matrix` one step of
#             all losses on 1, 2 and 4 devices in every placement (the slow ones have 8)
# make bench  time the losses beside their peers; BENCH='--targets' and other options of benchmarks.losses
# make soak   measure what docs/reliability.md promises about faults, and write its table; SOAK='damage kills --count 20'
# All make the virtual environment they need, and reuse it when called again.

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BENCH  ?= --plot runs/figures
SOAK   ?=

bin     := $(VENV)/bin
# Compiled programs are kept between calls, so that a second run of the tests or the demo starts at once.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
# JAX on a CPU asks for fresh memory in each step; keeping what was freed takes a third off the time of small steps.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000
pytest  := $(bin)/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo bench soak test test-fast test-slow test-matrix lint format constraints clean

demo: $(VENV)/.installed-all
	$(bin)/repkit train experiments/two_tower.py --run $(RUN) --resume
	$(bin)/repkit evaluate $(RUN)
	$(bin)/repkit plot $(RUN)

bench: $(VENV)/.installed-all
	$(bin)/python -m benchmarks.losses --output runs/benchmarks.jsonl $(BENCH)

# Huge pages would count the memory of the small process that is watched in steps of half a percent.
soak: export GLIBC_TUNABLES :=
soak: $(VENV)/.installed-dev
	$(bin)/python -m tests.faults.soak $(SOAK) --docs docs/reliability.md

test: lint test-fast

test-fast: $(VENV)/.installed-dev
	$(pytest) -m "not slow and not matrix"

test-slow: $(VENV)/.installed-dev
	$(pytest) -m slow

test-matrix: $(VENV)/.installed-dev
	$(pytest) -m matrix

lint: $(VENV)/.installed-dev
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright --pythonpath $(bin)/python

format: $(VENV)/.installed-dev
	$(bin)/ruff check --fix
	$(bin)/ruff format

# Writes the newest versions that pyproject.toml allows into constraints.txt; run the tests before committing it.
constraints: $(VENV)/.installed-dev
	$(bin)/python -m pip install --quiet uv
	( head -1 constraints.txt; $(bin)/uv pip compile --quiet --universal --python-version 3.11 --all-extras \
	  --no-annotate --no-header --no-emit-index-url --no-emit-find-links pyproject.toml ) > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .cache

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "repkit needs Python 3.11 to 3.13; '$(PYTHON)' is `$(PYTHON) --version`. Name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# What the tests need includes what the demo needs, so a test environment serves for both.
$(VENV)/.installed-dev: $(bin)/python pyproject.toml constraints.txt
	$(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/.installed-all $@

$(VENV)/.installed-all: $(bin)/python pyproject.toml constraints.txt
	$(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	touch $@
