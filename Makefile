# Everything runs from .venv, which `setup` makes and renews when pyproject.toml changes.
PYTHON ?= python3
# What pip is asked for first; any other build of torch can be named here, such as a CPU wheel without CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin
AGENTS := $(BIN)/python -m vlm_agents
COMPARE := $(BIN)/python -m vlm_agents.compare
NAME := demo_$(shell date +%Y-%m-%d_%H-%M-%S)
DEMO = $(AGENTS) experiment=empty_room

.DEFAULT_GOAL := help
.PHONY: help setup ppo demo reproduce study bench profile extras alfworld compare ui tiny-weights test slurm-test check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## make .venv and install the package with its tools

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/python -m pip install --no-deps alfworld==0.4.2 # its files of rules and texts, nothing of it is imported
	touch $@

ppo: setup ## watch a tiny agent get better at MiniGrid within minutes
	$(AGENTS) stage=ppo env=minigrid

demo: setup ## the whole chain from random weights: collect, preprocess, sft, ppo, eval
	$(AGENTS) run empty_room name=$(NAME)
	$(DEMO)/eval name=$(NAME)_sft stage.init=outputs/$(NAME)/sft stage.baselines=false
	$(DEMO)/eval name=$(NAME)_base stage.init=null stage.episodes=40 stage.baselines=false
	$(COMPARE) base=outputs/$(NAME)_base/eval after_SFT=outputs/$(NAME)_sft/eval after_PPO=outputs/$(NAME)/eval \
		--out outputs/$(NAME)/comparison

GAME ?= number_line
SEED ?= 0
MODEL ?=
RUN = $(GAME)$(if $(MODEL),_$(MODEL))$(if $(filter-out 0,$(SEED)),_seed$(SEED))
PLAY = seed=$(SEED) $(if $(MODEL),model=$(MODEL))
reproduce: setup ## collect to eval: GAME=number_line, blackjack, ezpoints or points24; SEED=0; GAME=scratch MODEL=tiny_llava: from random weights
	$(AGENTS) run $(GAME) $(PLAY) name=$(RUN)
	$(AGENTS) experiment=$(GAME)/eval $(PLAY) name=$(RUN)_sft stage.init=outputs/$(RUN)/sft stage.baselines=false
	$(COMPARE) after_SFT=outputs/$(RUN)_sft/eval after_PPO=outputs/$(RUN)/eval --out outputs/$(RUN)/comparison

RUNS ?=
study: setup ## every algorithm on four games, side by side (hours; goes on where it was stopped)
	$(BIN)/python benchmarks/algorithms.py
	$(COMPARE) outputs/algorithms/final --baseline ppo
	$(COMPARE) outputs/algorithms/thoughts --baseline "cot_json thought_coef=0.2"

bench: setup .venv-trl/.installed ## speeds against RL4VLM's way, TRL and transformers' generate, into benchmarks/results.json (half an hour)
	$(BIN)/python benchmarks/sampler.py
	$(BIN)/python benchmarks/speed.py --trl .venv-trl/bin/python

.venv-trl/.installed: # TRL, and beside it this package without its requirements
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install $(TORCH) trl==1.16.0 transformers==5.24.0 hydra-core minigrid pillow
	.venv-trl/bin/python -m pip install --no-deps -e .
	touch $@

extras: setup ## every extra in this one environment, and the tests that hold ALFWorld against TextWorld (compiles for minutes)
	$(BIN)/python -m pip install --dry-run --quiet '.[alfworld,math,sandbox,serve,tensorboard,wandb]' # they agree
	@# torchvision alone is left out: PyPI's can't be imported beside a CPU build of torch, nor transformers beside it
	$(BIN)/python -m pip install -e '.[alfworld,math,sandbox,tensorboard,wandb]' 'transformers[serving]>=5.23'
	$(BIN)/python -c "import alfworld, fast_downward, textworld, math_verify, skimage, tensorboardX, wandb, fastapi, openai, uvicorn, vlm_agents"
	$(BIN)/python -m pytest -q -m alfworld

alfworld: extras ## TextWorld and what else ALFWorld's package needs, as extras

WORDS ?=
profile: setup ## an iteration's operations by their time, and their trace for a browser: WORDS="env=number_line hardware=gpu"
	$(BIN)/python benchmarks/profile_run.py $(WORDS)

compare: setup ## finished runs held against each other: RUNS=multirun/<name>/ppo, or any words of the command
	$(COMPARE) $(if $(RUNS),$(RUNS),--help)

ui: setup ## MLflow in the browser, on this machine only
	@$(BIN)/python -m vlm_agents.tracking
	@echo "MLflow on port 5000; Ctrl-C ends it"
	@PYTHONWARNINGS=ignore MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		$(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1 \
		--uvicorn-opts "--log-level warning" > /dev/null

tiny-weights: setup ## rebuild the weights of the tiny model (about 90 minutes); runs are kept under outputs/tiny_*
	$(BIN)/python benchmarks/tiny_weights.py

test: setup ## the tests
	$(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder --durations=25

DRILLS ?=
slurm-test: setup ## the tests marked slurm, on a Slurm of this machine alone; DRILLS=10: that many drills of each kind too
	@tests/slurm/run.sh $(BIN)/python $(DRILLS)

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
