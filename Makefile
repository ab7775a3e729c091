# Everything runs from .venv, which `setup` makes and renews when pyproject.toml changes.
PYTHON ?= python3
# What pip is asked for first; any other build of torch can be named here, such as a CPU wheel without CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin
AGENTS := $(BIN)/python -m vlm_agents
NAME := demo_$(shell date +%Y-%m-%d_%H-%M-%S)
DEMO = $(AGENTS) name=$(NAME) experiment=empty_room

.DEFAULT_GOAL := help
.PHONY: help setup ppo demo reproduce ui tiny-weights test check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## make .venv and install the package with its tools

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

ppo: setup ## watch a tiny agent get better at MiniGrid within minutes
	$(AGENTS) stage=ppo env=minigrid

demo: setup ## the whole chain from random weights: collect, preprocess, sft, ppo, eval
	$(DEMO)/collect
	$(DEMO)/preprocess
	$(DEMO)/sft
	$(DEMO)/ppo
	$(DEMO)/eval
	$(DEMO)/eval name=$(NAME)_sft stage.init=outputs/$(NAME)/sft stage.baselines=false
	$(DEMO)/eval name=$(NAME)_base stage.init=null stage.episodes=40 stage.baselines=false
	$(BIN)/python benchmarks/table.py base=outputs/$(NAME)_base/eval after_SFT=outputs/$(NAME)_sft/eval \
		after_PPO=outputs/$(NAME)/eval

GAME ?= number_line
SEED ?= 0
RUN = $(GAME)$(if $(filter-out 0,$(SEED)),_seed$(SEED))
reproduce: setup ## a card game from collect to eval: GAME=number_line, blackjack, ez_points or points24; SEED=0
	for stage in collect preprocess sft ppo eval; do test -f outputs/$(RUN)/$$stage/DONE || \
		$(AGENTS) name=$(RUN) seed=$(SEED) experiment=$(GAME)/$$stage || exit; done
	test -f outputs/$(RUN)_sft/eval/DONE || \
		$(AGENTS) name=$(RUN)_sft seed=$(SEED) experiment=$(GAME)/eval stage.init=outputs/$(RUN)/sft stage.baselines=false
	$(BIN)/python benchmarks/table.py after_SFT=outputs/$(RUN)_sft/eval after_PPO=outputs/$(RUN)/eval

ui: setup ## MLflow in the browser, on this machine only
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/mlflow.db \
		--host 127.0.0.1 --port 5000 --workers 1

# The shipped weights: the expert cloned on four ids, then DoorKey as a demonstrator plays it whose hand slips.
TINY := $(AGENTS) tracking=jsonl
TINY_IDS := DoorKey-6x6 DoorKey-5x5 Empty-Random-5x5 Empty-Random-6x6
COMMA := ,
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
tiny-weights: setup ## rebuild the weights of the tiny model (about 30 minutes); runs are kept under outputs/tiny*
	$(TINY) stage=collect name=tiny_DoorKey-6x6 env.id=MiniGrid-DoorKey-6x6-v0 env.max_steps=null stage.episodes=4000
	for id in $(wordlist 2,4,$(TINY_IDS)); do \
		$(TINY) stage=collect name=tiny_$$id env.id=MiniGrid-$$id-v0 env.max_steps=null stage.episodes=500 || exit; done
	$(TINY) stage=preprocess name=tiny \
		stage.data=[$(subst $(SPACE),$(COMMA),$(TINY_IDS:%=outputs/tiny_%/collect))]
	$(BIN)/python -m vlm_agents.models.tiny outputs/tiny/skeleton outputs/tiny/preprocess/train.parquet
	$(TINY) stage=sft name=tiny model.path=outputs/tiny/skeleton
	$(TINY) stage=collect name=tiny_slips seed=1 stage.episodes=1200 stage.noise=0.6
	$(TINY) stage=preprocess name=tiny_slips stage.label=played stage.success_only=false
	$(TINY) stage=sft name=tiny_slips stage.init=outputs/tiny/sft
	$(TINY) stage=sft name=tiny_final stage.init=outputs/tiny_slips/sft stage.data=outputs/tiny_slips/preprocess \
		seed=1 stage.epochs=0.6 stage.batch_size=32 stage.lr=7e-4
	cp outputs/tiny_final/sft/model/* src/vlm_agents/models/tiny_weights/
	sha256sum src/vlm_agents/models/tiny_weights/model.safetensors

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
