# Everything runs from .venv, which `setup` makes and renews when pyproject.toml changes.
PYTHON ?= python3
# What pip is asked for first; any other build of torch can be named here, such as a CPU wheel without CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin
AGENTS := $(BIN)/python -m vlm_agents
NAME := demo_$(shell date +%Y-%m-%d_%H-%M-%S)
DEMO = $(AGENTS) experiment=empty_room

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
	$(AGENTS) run empty_room name=$(NAME)
	$(DEMO)/eval name=$(NAME)_sft stage.init=outputs/$(NAME)/sft stage.baselines=false
	$(DEMO)/eval name=$(NAME)_base stage.init=null stage.episodes=40 stage.baselines=false
	$(BIN)/python benchmarks/table.py base=outputs/$(NAME)_base/eval after_SFT=outputs/$(NAME)_sft/eval \
		after_PPO=outputs/$(NAME)/eval

GAME ?= number_line
SEED ?= 0
MODEL ?=
RUN = $(GAME)$(if $(MODEL),_$(MODEL))$(if $(filter-out 0,$(SEED)),_seed$(SEED))
PLAY = seed=$(SEED) $(if $(MODEL),model=$(MODEL))
reproduce: setup ## collect to eval: GAME=number_line, blackjack, ezpoints or points24; SEED=0; GAME=scratch MODEL=tiny_llava: from random weights
	$(AGENTS) run $(GAME) $(PLAY) name=$(RUN)
	$(AGENTS) experiment=$(GAME)/eval $(PLAY) name=$(RUN)_sft stage.init=outputs/$(RUN)/sft stage.baselines=false
	$(BIN)/python benchmarks/table.py after_SFT=outputs/$(RUN)_sft/eval after_PPO=outputs/$(RUN)/eval

ui: setup ## MLflow in the browser, on this machine only
	@$(BIN)/python -m vlm_agents.tracking
	@echo "MLflow on port 5000; Ctrl-C ends it"
	@PYTHONWARNINGS=ignore MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		$(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1 \
		--uvicorn-opts "--log-level warning" > /dev/null

# The shipped weights: experts cloned on MiniGrid and the card games, then players of DoorKey whose hand slips, so that
# PPO has something to do.
COMMA := ,
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
TINY = $(AGENTS) tracking=jsonl stage=$(1) name=tiny_$(2)
MINIGRID = $(call TINY,collect,$(1)) env.id=MiniGrid-$(1)-v0 env.max_steps=null
ROOMS := DoorKey-5x5 Empty-Random-5x5 Empty-Random-6x6
CLONED := DoorKey-6x6 $(ROOMS) number_line blackjack ezpoints points24
SLIPS := slips number_line blackjack ezpoints points24
SLIPS2 := slips2 $(ROOMS) number_line2 blackjack2 ezpoints2 points24_2
KEYS := keys number_line2 blackjack ezpoints2 points24_3
RUNS = stage.data=[$(subst $(SPACE),$(COMMA),$(1:%=outputs/tiny_%/collect))] stage.success_only=false
CLONE = model.path=outputs/tiny_skeleton stage.batch_size=16
tiny-weights: setup ## rebuild the weights of the tiny model (about 90 minutes); runs are kept under outputs/tiny_*
	$(call MINIGRID,DoorKey-6x6) stage.episodes=2500
	$(foreach id,$(ROOMS),$(call MINIGRID,$(id)) stage.episodes=250 &&) true
	$(call TINY,collect,number_line) env=number_line stage.episodes=200
	$(call TINY,collect,blackjack) env=blackjack stage.episodes=1500 stage.noise=0.1
	$(call TINY,collect,ezpoints) env=ezpoints stage.episodes=400 stage.noise=0
	$(call TINY,collect,points24) env=points24 env.solvable_only=true stage.episodes=1500 stage.noise=0
	$(call TINY,collect,slips) seed=1 stage.episodes=800 stage.noise=0.6
	$(call TINY,collect,slips2) seed=2 stage.episodes=1000 stage.noise=0.4
	$(call TINY,collect,number_line2) seed=2 env=number_line stage.episodes=600
	$(call TINY,collect,blackjack2) seed=2 env=blackjack stage.episodes=3000 stage.noise=0.1
	$(call TINY,collect,ezpoints2) seed=2 env=ezpoints stage.episodes=600 stage.noise=0
	$(call TINY,collect,points24_2) seed=2 env=points24 env.solvable_only=true stage.episodes=2000 stage.noise=0
	$(call TINY,collect,keys) seed=3 env.max_steps=8 stage.episodes=2500 stage.noise=0.9
	$(call TINY,collect,points24_3) seed=3 env=points24 env.solvable_only=true stage.episodes=500 stage.noise=0
	$(call TINY,preprocess,cloned) $(call RUNS,$(CLONED))
	$(call TINY,preprocess,slips) $(call RUNS,$(SLIPS)) stage.label=played
	$(call TINY,preprocess,slips2) $(call RUNS,$(SLIPS2)) stage.label=played
	$(call TINY,preprocess,keys) $(call RUNS,$(KEYS))
	$(BIN)/python -m vlm_agents.models.tiny outputs/tiny_skeleton outputs/tiny_cloned/preprocess/train.parquet
	$(call TINY,sft,cloned) $(CLONE)
	$(call TINY,sft,slips) $(CLONE) stage.init=outputs/tiny_cloned/sft
	$(call TINY,sft,slips2) $(CLONE) stage.init=outputs/tiny_slips/sft
	$(call TINY,sft,keys) $(CLONE) stage.init=outputs/tiny_slips2/sft
	$(call TINY,sft,rough) $(CLONE) stage.init=outputs/tiny_keys/sft stage.data=outputs/tiny_slips/preprocess \
		stage.epochs=0.15 stage.lr=3e-4
	cd outputs/tiny_rough/sft/model && cp -r $$(ls | grep -v README.md) $(CURDIR)/src/vlm_agents/models/tiny_weights/
	sha256sum src/vlm_agents/models/tiny_weights/model.safetensors

test: setup ## the tests
	$(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile

check: setup ## lint, types, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(MAKE) test

format: setup ## sort imports, format, write what docs/ has from the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python -m vlm_agents.config docs/configuration.md
	$(BIN)/python -m vlm_agents.metrics > docs/metrics.md

clean: ## remove caches; runs and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
