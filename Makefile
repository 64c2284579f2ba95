# The commands of the project. `make help` lists them; each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo serve test gpu soak matrix lint format clean

help:
	@echo 'make demo            a burst on stock SGLang, KunServe and stock with more memory, tiny: latencies, pictures'
	@echo 'make demo TRACE=f    the same with a recorded trace (Azure CSV, BurstGPT CSV or Mooncake JSONL)'
	@echo 'make serve           two replicas of a tiny model on port $(PORT), until Ctrl-C; FLAGS="..." adds server flags'
	@echo 'make test            all tests; TESTS=tests/unit for a part'
	@echo 'make gpu             the checks for a GPU; DEVICE=cpu for the same in small; CHECKS="F5 F6" for some'
	@echo 'make soak N=100      drops, restores, deaths and stalls by chance, under load with known answers'
	@echo 'make matrix          processes killed and stopped in every phase of every transition: hours'
	@echo 'make lint            ruff and mypy'
	@echo 'make format          ruff rewrites the files'
	@echo 'make clean           removes everything these commands made'
	@echo 'A first run installs SGLang and torch into .venv: minutes, and about 10 GB.'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'Python 3.10 or newer is needed; choose one with: make PYTHON=python3.11 ...'; exit 1; }
	@echo 'Installing into $(VENV) (SGLang, torch and tools: about 10 GB on disk, minutes the first time)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]' \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

TRACE ?=
FLAGS ?=
PORT ?= 30000
TESTS ?=
WORKERS ?= 3
DEVICE ?= cuda
CHECKS ?=
CACHE ?= .gpu/cache
OUTPUT ?= .gpu/$(DEVICE)
N ?= 100

demo: $(INSTALLED)
	$(BIN)/python bench/demo.py $(if $(TRACE),--trace '$(TRACE)') $(FLAGS)

serve: $(INSTALLED)
	@test -e .demo/tiny/config.json || $(BIN)/python -m kunserve_sgl.tiny_model .demo/tiny
	$(BIN)/python -m kunserve_sgl.launch_server --model-path .demo/tiny --dp-size 2 --port $(PORT) $(FLAGS)

# Tests with servers begin first, as they take longest; each shared server is in one of the processes.
test: $(INSTALLED)
ifneq ($(TESTS),)
	$(BIN)/python -m pytest $(TESTS)
else
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder tests/host tests/unit tests/bench tests/gpu
endif

gpu: $(INSTALLED)
	$(BIN)/python bench/gpu.py $(CHECKS) --device $(DEVICE) --cache '$(CACHE)' --output '$(OUTPUT)'

soak: $(INSTALLED)
	$(BIN)/python bench/soak.py --events $(N) $(FLAGS)

matrix: $(INSTALLED)
	$(BIN)/python -m pytest tests/host/test_faults.py --matrix $(FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .demo .gpu out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
