# make quickstart | test | test-all | test-further | venv | lint | bench | faults | faults-short | notebooks | docs          PYTHON=python3.12 chooses the interpreter
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
CONFIG ?= configs/quickstart.py
# Test processes, each with files of its own, in the order of tests/conftest.py (xdist's own takes
# files of one long test last): most of the time goes into compiling, on one core.
WORKERS ?= 2
# Devices of the quickstart's expert axis, for the planner.
DEVICES ?= 4
# Seconds of each of its two searches, at most.
SEARCH ?= 10
export JAX_PLATFORMS = cpu
export TPU_SKIP_MDS_QUERY = 1
export PYTHONUNBUFFERED = 1

.PHONY: quickstart quickstart-commands test test-all test-further venv lint bench faults faults-short notebooks notebooks-write docs clean

quickstart: $(VENV)/.installed quickstart-commands

# The same in an environment that is there already: BIN names its folder of programs.
quickstart-commands: export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(RUN))/compiled
quickstart-commands:
	@rm -rf $(RUN)
	$(BIN)/python train.py --config=$(CONFIG) --workdir=$(RUN)
	$(BIN)/python infer.py --workdir=$(RUN) --record=$(RUN)/trace.npz --held_out=256
	$(BIN)/python -m moe_jax.placement compare $(RUN)/trace.npz --devices=$(DEVICES) --dispatch=exchange --objective=rows --load-cap=1.2x --time-limit=$(SEARCH) --methods=contiguous,round-robin,random,lpt,greedy --json > $(RUN)/compare.json
	$(BIN)/python -m moe_jax.placement solve $(RUN)/trace.npz --devices=$(DEVICES) --dispatch=exchange --objective=rows --load-cap=1.2x --time-limit=$(SEARCH) --out=$(RUN)/plan.json
	$(BIN)/python -m moe_jax.placement apply $(RUN)/plan.json $(RUN) $(RUN)/placed
	$(BIN)/python infer.py --workdir=$(RUN) --measure=$(RUN)/before.npz --held_out=32 --held_out_start=256 --max_new_tokens=32
	$(BIN)/python infer.py --workdir=$(RUN)/placed --measure=$(RUN)/after.npz --held_out=32 --held_out_start=256 --max_new_tokens=32
	$(BIN)/python -m moe_jax.sim.report --before=$(RUN)/before.npz --after=$(RUN)/after.npz --plan=$(RUN)/plan.json --compare=$(RUN)/compare.json --metrics=$(RUN)/metrics.jsonl --out=$(RUN)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not faults"

# What `make test` leaves out, as far as FOR seconds go: the tests that are left are skipped.
test-further: FOR ?= 86400
test-further: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "further and not slow and not faults" --for=$(FOR) tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev,notebooks,docs]'
	@touch $@

bench: $(VENV)/.installed
	$(BIN)/python -m moe_jax.kernels.bench

# The promised numbers of kills, signals and corruptions; the log is kept in the repository.
faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults.campaign

# The short forms and a SIGTERM of the quickstart, with the seconds that they took.
faults-short: $(VENV)/.installed
	$(BIN)/python -m tests.faults.short

# Runs every notebook on the CPU; each .ipynb has to say what the .py beside it says.
notebooks: $(VENV)/.installed
	$(BIN)/python colab/run.py

notebooks-write: $(VENV)/.installed
	$(BIN)/python colab/run.py --write

# A warning is an error.
docs: $(VENV)/.installed
	$(BIN)/zensical build --strict --clean

clean:
	rm -rf $(VENV) runs site
