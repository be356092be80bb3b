# make demo   the whole path on this machine, set-up included      make demo SPEECHES=questions.jsonl
# make test   the tests, set-up included
# make setup  only the set-up; DEVICE=cpu or DEVICE=gpu overrides what is found
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
RUN ?= runs/demo
BIN := $(VENV)/bin
UV := $(BIN)/uv

# Compiled at set-up: a worker that may not write bytecode (PYTHONDONTWRITEBYTECODE) would else import three times slower.
INSTALL := $(UV) pip install --compile-bytecode --python $(BIN)/python

# uv does not read pip's settings; where pip is told about wheels or an index, tell uv.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
# The CPU build of torch lies in a folder of wheels, or else in PyTorch's own index.
HAS_TORCH := $(wildcard $(UV_FIND_LINKS)/torch-*+cpu*.whl)
BACKEND := $(if $(filter cpu,$(DEVICE)),$(if $(HAS_TORCH),,--torch-backend cpu),)

RUNTIME := $(VENV)/.ready-$(DEVICE)
DEV := $(VENV)/.ready-dev

.PHONY: demo test lint format setup lock clean
.DEFAULT_GOAL := demo

demo: $(RUNTIME)
	HF_HUB_OFFLINE=1 $(BIN)/psyray run configs/demo.yaml --serve run.path=$(RUN) $(if $(SPEECHES),speeches.path=$(SPEECHES))

test: $(RUNTIME) $(DEV)
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(TESTS)

lint: $(RUNTIME) $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(RUNTIME)

$(UV):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "psyray needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv==0.13.9

$(RUNTIME): requirements/$(DEVICE).txt requirements/model.txt pyproject.toml | $(UV)
	DS_BUILD_OPS=0 $(INSTALL) $(BACKEND) -r requirements/$(DEVICE).txt
	$(INSTALL) --no-deps -r requirements/model.txt -e .
	$(BIN)/psyray prepare
	touch $@

$(DEV): requirements/dev.txt | $(RUNTIME)
	$(INSTALL) -r requirements/dev.txt
	touch $@

# Exact versions of what pyproject.toml asks for; no index or host is written down.
COMPILE := $(UV) pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28
lock: | $(UV)
	$(COMPILE) pyproject.toml --extra cpu $(if $(HAS_TORCH),,--torch-backend cpu) --upgrade -o requirements/cpu.txt
	UV_FIND_LINKS= $(COMPILE) pyproject.toml --extra gpu --upgrade -o requirements/gpu.txt
	$(COMPILE) --group dev -c requirements/cpu.txt -o requirements/dev.txt

clean:
	rm -rf $(VENV) build *.egg-info
