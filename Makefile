# Everything runs in .venv, made from envs/cpu.txt. Needs Python >= 3.11 (with venv), make and git.
# Another interpreter: make demo PYTHON=/path/to/python. `make help` lists the targets.

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=

TRITON_VENV ?= .venv-triton
TRITON_STAMP := $(TRITON_VENV)/.installed
SLURM_STAMP := $(VENV)/.slurm-installed

BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed

# Python compiles modules when it first imports them: most of these never are
PIP_FLAGS := --quiet --no-input --no-compile --disable-pip-version-check

# the environment's commands come first, for rules and tests that call `rad` or `snakemake`
export PATH := $(BIN):$(PATH)
unexport PYTHONPATH

# 3.11 first: the pins were made on it. A candidate counts if it runs and is new enough: a version
# manager may leave commands on the path that do not run.
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python

.DEFAULT_GOAL := help
.PHONY: help env demo smoke test test-triton test-slurm lint format nano-models clean clean-results

help:
	@echo "make demo          environment, then the default study: results/nano/report.html"
	@echo "make test          environment, then the tests"
	@echo "make test-triton   Triton kernels on a CPU, in .venv-triton/ (optional)"
	@echo "make test-slurm    the shrunk study on a real Slurm, started here (root, Debian; optional)"
	@echo "make smoke         the default study, shrunk: every stage and every method"
	@echo "make lint          ruff, mypy, snakefmt and snakemake --lint"
	@echo "make format        let ruff and snakefmt rewrite the sources"
	@echo "make nano-models   train the three embedded models again from nothing"
	@echo "make env           the environment alone, in $(VENV)/"
	@echo "make clean         remove caches and build leftovers"
	@echo "make clean-results remove the outputs and states of all studies"

env: $(STAMP)

$(STAMP): envs/cpu.txt pyproject.toml
	@set -e; \
	if [ ! -x "$(VENV)/bin/python" ]; then \
	  found=""; \
	  for python in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	        >/dev/null 2>&1; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no usable Python >= 3.11 among: $(if $(PYTHON),$(PYTHON),$(CANDIDATES))" >&2; \
	    echo "       install one with its venv module, or name it: make $(firstword $(MAKECMDGOALS) env) PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "environment: $(VENV) from $$("$$found" --version)"; \
	  "$$found" -m venv "$(VENV)"; \
	fi; \
	echo "environment: installing envs/cpu.txt (a few minutes the first time)"; \
	"$(BIN)/python" -m pip install $(PIP_FLAGS) -r envs/cpu.txt; \
	"$(BIN)/python" -m pip install $(PIP_FLAGS) --no-deps -e .; \
	touch "$(STAMP)"

demo: $(STAMP)
	"$(BIN)/snakemake" --cores all
	@echo "report: $(CURDIR)/results/nano/report.html"

smoke: $(STAMP)
	"$(BIN)/snakemake" --cores all --configfile config/nano.yaml config/smoke.yaml

# a file per process at a time; one thread each, for two pools on two cores slow each other down
test: $(STAMP)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

$(TRITON_STAMP): envs/triton.txt envs/cpu.txt pyproject.toml $(STAMP)
	"$(BIN)/python" -m venv "$(TRITON_VENV)"
	"$(TRITON_VENV)/bin/python" -m pip install $(PIP_FLAGS) -r envs/triton.txt
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "$(TRITON_VENV)/bin/python" -m pip install \
	  $(PIP_FLAGS) --no-deps --no-build-isolation --no-binary mamba-ssm mamba-ssm==2.3.2.post1
	"$(TRITON_VENV)/bin/python" -m pip install $(PIP_FLAGS) --no-deps -e .
	touch "$(TRITON_STAMP)"

test-triton: $(TRITON_STAMP)
	"$(TRITON_VENV)/bin/python" -m pytest tests/test_triton_adapter.py $(PYTEST_ARGS)

$(SLURM_STAMP): envs/slurm.txt $(STAMP)
	"$(BIN)/python" -m pip install $(PIP_FLAGS) --no-deps -r envs/slurm.txt
	touch "$(SLURM_STAMP)"

test-slurm: $(SLURM_STAMP)
	"$(BIN)/python" tests/slurm/run.py

lint: $(STAMP)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/snakefmt" --check Snakefile workflow
	"$(BIN)/python" tests/lint_workflow.py

format: $(STAMP)
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .
	"$(BIN)/snakefmt" Snakefile workflow

nano-models: $(STAMP)
	"$(BIN)/snakemake" --cores all nano_models

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rad tests benchmarks workflow -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

clean-results:
	find results -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf state logs .snakemake
