# Everything runs from .venv, which `setup` makes and renews when pyproject.toml changes.
PYTHON ?= python3
# What pip is asked for first. Without a GPU, the CPU build saves gigabytes:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := .venv/bin
AGENTS := $(BIN)/python -m vlm_agents
NAME := demo_$(shell date +%Y-%m-%d_%H-%M-%S)
DEMO := name=$(NAME) env.id=MiniGrid-Empty-Random-5x5-v0 model.weights=random

.DEFAULT_GOAL := help
.PHONY: help setup ppo demo ui test check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## make .venv and install the package with its tools

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

ppo: setup ## watch a tiny agent get better at MiniGrid within minutes
	$(AGENTS) stage=ppo env=minigrid

demo: setup ## the whole chain from random weights: collect, preprocess, sft, ppo, eval
	$(AGENTS) stage=collect $(DEMO)
	$(AGENTS) stage=preprocess $(DEMO)
	$(AGENTS) stage=sft $(DEMO)
	$(AGENTS) stage=ppo $(DEMO) stage.init=outputs/$(NAME)/sft
	$(AGENTS) stage=eval $(DEMO) stage.init=outputs/$(NAME)/ppo

ui: setup ## MLflow in the browser, on this machine only
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/mlflow.db \
		--host 127.0.0.1 --port 5000 --workers 1

test: setup ## the tests
	$(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile

check: setup ## lint, types, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(MAKE) test

format: setup ## sort imports and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches; runs and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
