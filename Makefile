# Each target sets up what it needs and does nothing twice. `make help` lists them.
# Nothing is written outside this folder and the store (.llmlab/, or LLMLAB_HOME).
SHELL  := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:

VENV    := .venv
BIN     := $(CURDIR)/$(VENV)/bin
PY      := $(BIN)/python
# cpu, or cuda: `make install TORCH=cuda`. What is installed stays what it is.
TORCH   ?= $(if $(wildcard $(VENV)/.torch-cuda),cuda,cpu)
# asked only where pip itself finds no +cpu build of torch
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
ARGS    ?=

STAMP   := $(VENV)/.installed-$(TORCH)
HOOK    := $(VENV)/etc/jupyter/jupyter_server_config.py

# what llmlab.kit.settings.contained() says: other tools keep their files in the store and not in the home folder
STORE   := $(or $(LLMLAB_HOME),$(CURDIR)/.llmlab)
export HF_HOME ?= $(STORE)/hub
export MPLCONFIGDIR ?= $(STORE)/config/matplotlib
export IPYTHONDIR ?= $(STORE)/config/ipython
export JUPYTER_CONFIG_DIR ?= $(STORE)/config/jupyter
export JUPYTER_DATA_DIR ?= $(STORE)/config/jupyter-data
export JUPYTER_RUNTIME_DIR ?= $(STORE)/config/jupyter-runtime
export JUPYTERLAB_SETTINGS_DIR ?= $(STORE)/config/lab/settings
export JUPYTERLAB_WORKSPACES_DIR ?= $(STORE)/config/lab/workspaces
export PATH := $(BIN):$(PATH)
unexport PYTHONHOME

PIP     := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 $(PY) -m pip install --quiet --no-cache-dir --retries 10 --no-deps
HASHED  := --require-hashes --no-warn-conflicts
say      = @printf '\033[1m%s\033[0m\n' "$(1)"
# downloads fail now and then: three tries
tries    = for i in 1 2 3; do if $(1); then break; elif [ $$i = 3 ]; then exit 1; else echo "trying again …"; sleep $$((5 * i)); fi; done

.PHONY: help install lab test check bench gpu jupyter locks clean
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP) ## everything into .venv, by hash; TORCH=cuda for the CUDA build
	@echo "installed in $(VENV), torch for $(TORCH)"

$(VENV)/bin/python:
	@python=$$(sh tools/python.sh "$(PYTHON)") && printf '\033[1m%s\033[0m\n' "making $(VENV) with $$python" && "$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMP): pyproject.toml locks/base.txt locks/source.txt locks/torch-$(TORCH).txt locks/encoder.txt tools/jupyter_server_config.py | $(VENV)/bin/python
	$(call say,installing 1 of 4: everything but torch)
	@$(call tries,$(PIP) $(HASHED) -r locks/base.txt)
	@$(call tries,$(PIP) $(HASHED) --no-build-isolation -r locks/source.txt)
	$(call say,installing 2 of 4: torch for $(TORCH))
	@[ -e $(VENV)/.torch-$(TORCH) ] || { rm -f $(VENV)/.torch-* $(VENV)/.installed-*; $(PY) -m pip uninstall --quiet --yes torch 2>/dev/null; touch $(VENV)/.torch-$(TORCH); }
	@$(call tries,$(PIP) $(HASHED) -r locks/torch-$(TORCH).txt || { [ $(TORCH) = cpu ] && echo "asking $(TORCH_INDEX)" && $(PIP) $(HASHED) --extra-index-url $(TORCH_INDEX) -r locks/torch-$(TORCH).txt; })
	$(call say,installing 3 of 4: the embedded encoder)
	@$(call tries,$(PIP) $(HASHED) -r locks/encoder.txt)
	$(call say,installing 4 of 4: llmlab)
	@$(PIP) --no-build-isolation -e .
	@mkdir -p $(dir $(HOOK)) && cp tools/jupyter_server_config.py $(HOOK)
	@$(PY) tools/lock.py --installed
	@touch $@

lab: install ## run the course under the tiny profile and end in a report; ARGS="--profile smoke" for others
	$(call say,running the course)
	@$(BIN)/llmlab run $(or $(ARGS),--profile tiny)

test: install ## the gate: clean, export, no difference, lint, locks, every test
	@$(MAKE) gate
	$(call say,all tests)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: install ## the fast part of the gate
	@$(MAKE) gate
	$(call say,fast tests)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m "not notebooks and not browser" $(ARGS)

.PHONY: gate
gate: install
	$(call say,notebooks clean and package in sync)
	@$(PY) tools/sync.py
	$(call say,lint and locks)
	@$(BIN)/ruff check llmlab tests tools
	@$(PY) tools/lock.py --check

bench: install ## what starting up costs, each figure beside its bound
	@$(PY) tests/bench_overheads.py $(ARGS)

gpu: ## the gpu profile on one CUDA GPU, with the CUDA build of torch
	@$(MAKE) install TORCH=cuda
	@$(BIN)/llmlab run $(or $(ARGS),--profile gpu)

jupyter: install ## JupyterLab on nbs/index.ipynb
	@mkdir -p $(STORE)/config
	@npm_config_cache=$(STORE)/config/npm $(BIN)/jupyter lab nbs/index.ipynb $(ARGS)

locks: install ## make locks/ again from pyproject.toml; ARGS=--upgrade for the newest versions
	@$(PY) tools/lock.py $(ARGS)

clean: ## remove what builds and tests leave; ALL=1 also the environment, the store and all runs
	@rm -rf build dist *.egg-info .cache .pytest_cache .ruff_cache .hypothesis _proc _site
	@find nbs llmlab tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
	@$(if $(ALL),rm -rf $(VENV) .envs .llmlab _runs && echo "removed caches$(,) environment$(,) store and runs",echo "removed caches and build folders; ALL=1 also removes the environment$(,) the store and all runs")
, := ,
