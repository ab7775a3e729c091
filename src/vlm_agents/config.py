"""The schema of every configuration group and the checks across fields. Imports no torch.

Hydra composes YAML from `conf/` against these classes; `parse` turns the result into plain dataclasses once, at the
door. Past it nobody sees a DictConfig, and nobody writes to the result.
"""

import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from vlm_agents.errors import ConfigError, did_you_mean

PolicyName = Literal["model", "expert", "random", "remote"]
Compat = Literal["ours", "rl4vlm"]
Faces = Literal["ten", "rank"]
RaterName = Literal["none", "expert", "remote"]
AUTO = "auto"  # stage.init: the model that an earlier stage left under the run's name, where there is one


def conf_dir() -> Path:
    """The folder of the YAML groups: beside `src/` in a checkout, inside the package in a wheel."""
    here = Path(__file__).resolve().parent
    for candidate in (here.parents[1] / "conf", here / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(f"no conf/config.yaml beside {here}: reinstall vlm_agents")


def one_of(what: str, value: str, allowed: Any) -> None:
    """Raise unless `value` is one of the `allowed` Literal's words."""
    words = get_args(allowed)
    if value not in words:
        raise ConfigError(f"{what}={value} is not one of {', '.join(words)}.{did_you_mean(value, words)}")


def at_least(what: str, value: float, bound: float) -> None:
    if not value >= bound:  # a value that is no number fails too
        raise ConfigError(f"{what}={value} must be at least {bound}")


def positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{what}={value} must be a positive number")


def between(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{what}={value} must lie between {low} and {high}")


# ---- env -------------------------------------------------------------------------------------------------------------
@dataclass
class EnvConfig:
    family: str = MISSING
    id: str = MISSING
    max_steps: int | None = None  # turns before an episode is truncated; null: the env's own limit
    invalid_penalty: float = 0.1  # taken off the reward of a turn whose reply held no legal action
    workers: bool = False  # step each env in a process of its own
    timeout_s: float = 60.0  # a worker that answers later is restarted, its episode marked env_error

    def __post_init__(self) -> None:
        at_least("env.invalid_penalty", self.invalid_penalty, 0)
        if self.max_steps is not None:
            at_least("env.max_steps", self.max_steps, 1)
        positive("env.timeout_s", self.timeout_s)


@dataclass
class EchoConfig(EnvConfig):
    """A picture shows a colour, its name is the action; `turns` colours make an episode."""

    family: str = "echo"
    id: str = "vlm_agents/Echo-v0"
    colors: int = 4
    turns: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("env.turns", self.turns, 1)
        between("env.colors", self.colors, 2, 8)


@dataclass
class MiniGridConfig(EnvConfig):
    """Any MiniGrid-* or BabyAI-* id."""

    family: str = "minigrid"
    id: str = "MiniGrid-DoorKey-6x6-v0"
    view: str = "full"  # full: the whole grid from above; agent: the 7x7 cells that the agent sees
    tile_size: int = 28  # pixels a cell; 28 makes one cell one merged vision token of Qwen2-VL and Qwen2.5-VL
    describe: bool = False  # put a text description of what is visible into the observation

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("env.view", self.view, Literal["full", "agent"])
        at_least("env.tile_size", self.tile_size, 4)


@dataclass
class CardsConfig(EnvConfig):
    """The card games of RL4VLM; each has a class of its own below."""

    observation: str = "image"  # image; text: what the picture shows, in words; both
    size: int = 300  # side of the picture in pixels; it is drawn at 300 and scaled
    compat: str = "ours"  # rl4vlm: with the original's bugs, and a random action where none could be read

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("env.observation", self.observation, Literal["image", "text", "both"])
        at_least("env.size", self.size, 28)
        one_of("env.compat", self.compat, Compat)
        if self.id != type(self).id:
            raise ConfigError(f"env.id={self.id}: this game's id is {type(self).id}; choose another game by env=")


@dataclass
class NumberLineConfig(CardsConfig):
    """Walk from a number to another one."""

    family: str = "number_line"
    id: str = "vlm_agents/NumberLine-v0"
    highest: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        between("env.highest", self.highest, 2, 99)


@dataclass
class BlackjackConfig(CardsConfig):
    """Beat the dealer."""

    family: str = "blackjack"
    id: str = "vlm_agents/Blackjack-v0"
    natural: bool = False  # a win with an ace and a ten earns 1.5


@dataclass
class PointsConfig(CardsConfig):
    """Points24: make the target of all cards, with + - * / and brackets."""

    family: str = "points24"
    id: str = "vlm_agents/Points24-v0"
    target: int = 24
    cards: int = 4
    faces: str = "ten"  # what J, Q and K count: ten, or their rank
    solvable_only: bool = False  # deal no hand that can't make the target (27 of 100 can't make 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("env.faces", self.faces, Faces)
        at_least("env.target", self.target, 1)
        between("env.cards", self.cards, 2, 4)


@dataclass
class EZPointsConfig(PointsConfig):
    """The same with + and * alone. Two cards that shall make 12 always can."""

    family: str = "ezpoints"
    id: str = "vlm_agents/EZPoints-v0"
    target: int = 12
    cards: int = 2
    solvable_only: bool = True


# ---- prompt ----------------------------------------------------------------------------------------------------------
@dataclass
class PromptConfig:
    format: str = MISSING
    history: str = "last_k"  # none | last_k: the last actions and what they did, as text | full: the whole chat
    last_k: int = 4
    max_prompt_tokens: int | None = None  # a longer chat loses its oldest turns; null: the model's positions bound it
    max_reply_tokens: int = 96
    score_temperature: float = 0.5  # action_scores only: softmax temperature over the scores 1-5

    def __post_init__(self) -> None:
        one_of("prompt.format", self.format, Literal["cot_json", "action_only", "action_scores", "rl4vlm"])
        one_of("prompt.history", self.history, Literal["none", "last_k", "full"])
        at_least("prompt.last_k", self.last_k, 1)
        at_least("prompt.max_reply_tokens", self.max_reply_tokens, 1)
        if self.max_prompt_tokens is not None:
            at_least("prompt.max_prompt_tokens", self.max_prompt_tokens, 1)
        positive("prompt.score_temperature", self.score_temperature)


# ---- model -----------------------------------------------------------------------------------------------------------
@dataclass
class LoraConfig:
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0  # in stage=sft alone: in stage=ppo, what is trained is what was sampled

    def __post_init__(self) -> None:
        at_least("model.lora.rank", self.rank, 1)
        between("model.lora.dropout", self.dropout, 0, 1)


@dataclass
class TrainableConfig:
    """Which parts learn; with LoRA, which parts get adapters."""

    vision: bool | None = None  # null: yes, but for stage=ppo with stage.freeze_vision
    projector: bool | None = None  # null: as vision
    language: bool = True

    def settled(self, freeze_vision: bool) -> "TrainableConfig":
        """Every switch said: what is null learns unless `freeze_vision`, under which nothing but language does."""
        vision, projector = (part is not False and not freeze_vision for part in (self.vision, self.projector))
        return replace(self, vision=vision, projector=projector)


@dataclass
class ValueHeadConfig:
    hidden: int = 128
    stop_gradient: bool = True  # the critic reads the policy's features but doesn't move them


@dataclass
class TemperatureHeadConfig:
    """A learned sampling temperature for every turn, within bounds; it starts at `model.temperature`."""

    low: float = 0.3
    high: float = 1.5
    hidden: int = 64

    def __post_init__(self) -> None:
        at_least("model.temperature_head.hidden", self.hidden, 1)
        if not 0 < self.low < self.high:
            raise ConfigError(f"model.temperature_head needs 0 < low < high, not {self.low:g} and {self.high:g}")


@dataclass
class ModelConfig:
    name: str = MISSING
    path: str | None = None  # folder or hub id with weights and processor; null: the tiny model of this package
    weights: str = "pretrained"  # pretrained | random: the same architecture, freshly drawn
    seed: int = 0  # of random weights: an adapter trained on them finds the same ones again
    architecture: dict[str, Any] | None = None  # for random weights without any file: what a config.json says, and
    # under `image_processor` a preprocessor_config.json
    image_processor: Any = None  # settings that shall be otherwise than in the model's own: {max_pixels: 100352}
    # bounds the tokens of a picture
    temperature: float = 1.0  # the policy's own sampling temperature, in rollouts, training and eval/success
    lora: LoraConfig | None = None
    quantize: str | None = None  # nf4: QLoRA, the language part's weights in 4 bits under the adapter
    train: TrainableConfig = field(default_factory=TrainableConfig)
    value_head: ValueHeadConfig = field(default_factory=ValueHeadConfig)
    temperature_head: TemperatureHeadConfig | None = None
    gradient_checkpointing: bool = False
    attention: str = "sdpa"  # sdpa | eager; sdpa takes a flash kernel by itself where there is one

    def __post_init__(self) -> None:
        one_of("model.weights", self.weights, Literal["pretrained", "random"])
        one_of("model.attention", self.attention, Literal["sdpa", "eager"])
        if not (self.image_processor is None or isinstance(self.image_processor, dict)):
            raise ConfigError("model.image_processor must be settings: 'model.image_processor={max_pixels: 100352}'")
        if self.quantize is not None:
            one_of("model.quantize", self.quantize, Literal["nf4"])
            if self.lora is None:
                raise ConfigError(
                    f"model.quantize={self.quantize}: weights in 4 bits can't be trained themselves. "
                    "Add model/lora=adapter, which trains beside them, or set model.quantize=null"
                )
        if self.architecture is not None and self.path is None and self.weights == "pretrained":
            raise ConfigError(f"model={self.name} has no weights of its own: set model.path, or model.weights=random")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"model.temperature={self.temperature} must be a positive number; greedy runs are eval's business"
            )
        head = self.temperature_head
        if head is not None and not head.low < self.temperature < head.high:
            raise ConfigError(
                f"model.temperature={self.temperature:g}, where the temperature head starts, must lie between "
                f"model.temperature_head.low={head.low:g} and high={head.high:g}"
            )


# ---- hardware --------------------------------------------------------------------------------------------------------
@dataclass
class HardwareConfig:
    name: str = MISSING
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None  # torch CPU threads; null: all cores
    tokens_per_microbatch: int = 8192  # padded tokens in one forward and backward pass

    def __post_init__(self) -> None:
        one_of("hardware.dtype", self.dtype, Literal["float32", "bfloat16"])
        if self.threads is not None:
            at_least("hardware.threads", self.threads, 1)
        at_least("hardware.tokens_per_microbatch", self.tokens_per_microbatch, 1)


# ---- tracking --------------------------------------------------------------------------------------------------------
@dataclass
class TrackingConfig:
    name: str = MISSING  # jsonl: metrics.jsonl only | mlflow, tensorboard, wandb: that, and a copy there
    uri: str | None = None  # null: what MLFLOW_TRACKING_URI says, else sqlite:///mlflow.db
    experiment: str | None = None  # or wandb's project; null: MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT, else vlm_agents

    def __post_init__(self) -> None:
        one_of("tracking.name", self.name, Literal["jsonl", "mlflow", "tensorboard", "wandb"])
        refuse_secrets("tracking.uri", self.uri or "")


# ---- algo ------------------------------------------------------------------------------------------------------------
@dataclass
class NoveltyConfig:
    """The temporal predictor: a second adapter foretells an episode's actions from its first picture."""

    coef: float = 0.0  # reward for a nat of surprise; 0: no predictor
    lr: float = 1e-3

    def __post_init__(self) -> None:
        at_least("algo.novelty.coef", self.coef, 0)
        at_least("algo.novelty.lr", self.lr, 0)


@dataclass
class AlgoConfig:
    name: str = MISSING
    gamma: float = 0.98
    gae_lambda: float = 0.95
    clip: float = 0.2
    epochs: int = 1
    minibatch_turns: int = 128
    thought_coef: float = 0.2  # weight of a thought token's log-prob beside an action token's 1
    value_coef: float = 0.5
    value_warmup: int = 1  # first iterations, in which the critic's head alone learns; 0 where stage.init brings one
    value_epochs: int = 10  # of the critic's head alone, over the states that it read in the first of `epochs`
    entropy_coef: float = 0.0
    turn_entropy: float = 0.1  # nats a token that a learned temperature is drawn towards; needs model.temperature_head
    turn_entropy_coef: float = 0.0
    kl_coef: float = 0.0  # k3 penalty towards the policy that training started from; needs model.lora
    target_kl: float | None = None  # an iteration's remaining updates are skipped once approx_kl passes this
    novelty: NoveltyConfig = field(default_factory=NoveltyConfig)  # needs model.lora
    lr: float = 1e-4
    value_lr: float = 1e-3
    warmup_updates: int = 0
    min_lr_ratio: float = 0.1  # the cosine schedule ends at this share of the learning rate
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        one_of("algo.name", self.name, Literal["ppo"])
        for name in ("gamma", "gae_lambda", "min_lr_ratio"):
            between(f"algo.{name}", getattr(self, name), 0, 1)
        for name in ("epochs", "minibatch_turns"):
            at_least(f"algo.{name}", getattr(self, name), 1)
        for name in ("thought_coef", "value_coef", "entropy_coef", "turn_entropy_coef", "kl_coef", "target_kl"):
            at_least(f"algo.{name}", getattr(self, name) or 0, 0)
        for name in ("lr", "value_lr", "value_warmup", "value_epochs", "warmup_updates", "weight_decay"):
            at_least(f"algo.{name}", getattr(self, name), 0)
        if not (self.clip > 0 and self.max_grad_norm > 0):
            raise ConfigError(f"algo.clip={self.clip} and algo.max_grad_norm={self.max_grad_norm} must be positive")
        if self.value_warmup and not self.value_epochs:
            raise ConfigError(
                f"algo.value_warmup={self.value_warmup} has the critic learn in algo.value_epochs, and there are none: "
                "set value_warmup=0 too, or value_epochs=10"
            )


# ---- stage -----------------------------------------------------------------------------------------------------------
ADDRESS = "http(s)://<host>[:<port>]/<path>, without user, key or query"


def refuse_secrets(setting: str, value: str) -> None:
    """ConfigError, which doesn't repeat the value, where a server's address, or a setting beside it, may hold a key.

    For the command line too: Hydra notes the overrides of a sweep before anybody else sees them.
    """
    key_goes = "a key belongs into the environment variable that stage.remote.key_env names"
    if setting == "stage.remote.url" and re.search(r"[@?#]", value):
        raise ConfigError(f"{setting} must be {ADDRESS}: {key_goes}")
    if setting == "stage.remote.key_env" and re.search(r"[^A-Z0-9_,]", value):
        raise ConfigError(f"{setting} must be a variable's name, of A-Z, 0-9 and _: {key_goes}")
    if setting == "tracking.uri" and not value.startswith(("sqlite:", "file:")) and re.search(r"[@?#]", value):
        raise ConfigError(
            f"{setting} must be written without user, password and query, as it is kept in config.yaml: put an address "
            "with them into the environment variable MLFLOW_TRACKING_URI, and leave tracking.uri out"
        )
    secret = r"(?i)api_?key|authorization|password|secret"
    if setting.startswith("stage.remote.request") and re.search(secret, f"{setting} {value}"):
        raise ConfigError(f"stage.remote.request holds what looks like a key: {key_goes}")


@dataclass
class RemoteConfig:
    """An OpenAI-compatible server. The key, where one is needed, is read from the environment variable `key_env`."""

    url: str = "http://127.0.0.1:8000/v1"
    model: str = "default"
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8  # requests under way at once
    timeout_s: float = 60.0  # for one try
    retries: int = 4  # of a request that was refused for now (429, 5xx), or got no answer; waits double up to 30 s
    request: Any = None  # {field: value} to add to each request, or to replace there; a null leaves the field out
    cache: str = "outputs/.answers"  # folder of all answers so far, shared by all runs: what it holds isn't asked again

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            plain = False
        if not plain:
            raise ConfigError(f"stage.remote.url must be {ADDRESS}")
        refuse_secrets("stage.remote.url", self.url)
        refuse_secrets("stage.remote.key_env", self.key_env)
        at_least("stage.remote.concurrency", self.concurrency, 1)
        at_least("stage.remote.retries", self.retries, 0)
        positive("stage.remote.timeout_s", self.timeout_s)
        self._check_request()

    def _check_request(self) -> None:
        if self.request is None:
            return
        if not (isinstance(self.request, dict) and all(isinstance(name, str) for name in self.request)):
            raise ConfigError("stage.remote.request must be fields: 'stage.remote.request={seed: null, top_p: 0.9}'")
        for name in {"model", "messages", "n", "stream"} & set(self.request):
            fix = "set stage.remote.model" if name == "model" else "what is asked and how it is answered stays as it is"
            raise ConfigError(f"stage.remote.request can't have a field {name}: {fix}")
        try:
            text = json.dumps(self.request, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"stage.remote.request can't be sent as JSON: {error}") from error
        refuse_secrets("stage.remote.request", text)


@dataclass
class StageConfig:
    name: str = MISSING


@dataclass
class CollectConfig(StageConfig):
    """Play and label episodes."""

    name: str = "collect"
    policy: str = "expert"
    init: str | None = None  # policy=model: run directory or HF folder; null: the model's own weights
    episodes: int = 256
    num_envs: int = 32
    noise: float = 0.3  # share of turns where a random legal action is played; the label stays the policy's
    rater: str = "expert"  # who scores each step 0-10
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def __post_init__(self) -> None:
        one_of("stage.policy", self.policy, PolicyName)
        one_of("stage.rater", self.rater, RaterName)
        between("stage.noise", self.noise, 0, 1)
        at_least("stage.episodes", self.episodes, 1)
        at_least("stage.num_envs", self.num_envs, 1)


@dataclass
class PreprocessConfig(StageConfig):
    """Trajectories to SFT data."""

    name: str = "preprocess"
    data: list[str] = MISSING  # run directories of stage=collect, and .json files in LLaVA's layout
    images: str | None = None  # folder that the image paths of LLaVA files start from; null: where each file lies
    label: str = "reply"  # what the policy said, if it meant it | advice: what the expert would have said (DAgger) |
    # played: what was played, random moves too, with the expert's thought: it sees well and acts badly
    success_only: bool = True
    min_score: float = 0.0  # keep steps rated at least this (0-10); unrated steps count as 0
    val_fraction: float = 0.02  # share of episodes held out for validation

    def __post_init__(self) -> None:
        if self.data == []:
            raise ConfigError("stage.data is empty: name run directories of stage=collect, or .json files")
        if not all(isinstance(source, str) for source in self.data):
            raise ConfigError(f"stage.data={self.data} must be a list of paths, as in stage.data=[outputs/a/collect]")
        one_of("stage.label", self.label, Literal["reply", "advice", "played"])
        between("stage.val_fraction", self.val_fraction, 0, 1)
        if not 0 <= self.min_score <= 10:
            raise ConfigError(f"stage.min_score={self.min_score} must lie between 0 and 10")


@dataclass
class SftConfig(StageConfig):
    """Supervised fine-tuning on the Parquet data of stage=preprocess."""

    name: str = "sft"
    data: str = MISSING  # run directory of stage=preprocess
    skip_bad: bool = False  # leave out the rows that can't be trained on, instead of refusing them all before it begins
    init: str | None = None
    epochs: float = 1.0
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 50  # half of all steps at most
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every: int = 200  # optimizer steps
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        positive("stage.epochs", self.epochs)
        for name in ("lr", "warmup_steps", "weight_decay", "max_grad_norm"):
            at_least(f"stage.{name}", getattr(self, name), 0)
        for name in ("batch_size", "checkpoint_every", "keep_checkpoints"):
            at_least(f"stage.{name}", getattr(self, name), 1)


@dataclass
class PpoConfig(StageConfig):
    """Reinforcement learning on the env's reward."""

    name: str = "ppo"
    init: str | None = AUTO  # run directory or HF folder; null: the model's own weights
    iterations: int = 16
    episodes: int = 64  # whole episodes collected per iteration
    num_envs: int = 64
    freeze_vision: bool = True  # pictures are then encoded once and reused by every pass of an iteration
    eval_episodes: int = 200  # size of the held-out panel played before and after; 0: no evaluation
    eval_every: int = 0  # iterations between evaluations on the panel; 0: only before and after
    checkpoint_every: int = 1
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("iterations", "episodes", "num_envs", "checkpoint_every", "keep_checkpoints"):
            at_least(f"stage.{name}", getattr(self, name), 1)
        for name in ("eval_episodes", "eval_every"):
            at_least(f"stage.{name}", getattr(self, name), 0)


@dataclass
class EvalConfig(StageConfig):
    """Play a fixed panel of held-out seeds."""

    name: str = "eval"
    policy: str = "model"
    init: str | None = AUTO  # run directory or HF folder; null: the model's own weights
    episodes: int = 200
    num_envs: int = 64
    baselines: bool = True  # also play random and expert on the same panel
    report_episodes: int = 12  # episodes shown in report.html
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def __post_init__(self) -> None:
        one_of("stage.policy", self.policy, PolicyName)
        at_least("stage.episodes", self.episodes, 1)
        at_least("stage.num_envs", self.num_envs, 1)
        at_least("stage.report_episodes", self.report_episodes, 0)


@dataclass
class MergeConfig(StageConfig):
    """Merge an adapter into its base, as a plain HF folder."""

    name: str = "merge"
    init: str = MISSING  # run directory or folder of the adapter
    tolerance: float | None = None  # largest difference of a logit; null: 1e-3 in float32, 0.5 in bfloat16

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            at_least("stage.tolerance", self.tolerance, 0)


@dataclass
class DoctorConfig(StageConfig):
    """Say what this machine can run, and what the chosen model would need."""

    name: str = "doctor"
    num_envs: int = 64  # prompts that are sampled for at once, as stage=ppo has it
    freeze_vision: bool = True  # as stage=ppo has it; stage=sft trains what model.train says
    prompt_tokens: int | None = None  # longest prompt; null: the longest of a few random episodes

    def __post_init__(self) -> None:
        at_least("stage.num_envs", self.num_envs, 1)
        if self.prompt_tokens is not None:
            at_least("stage.prompt_tokens", self.prompt_tokens, 1)


# ---- a run -----------------------------------------------------------------------------------------------------------
@dataclass
class RunConfig:
    """One run: one stage, on one env, with one model, on one hardware."""

    name: str = MISSING
    seed: int = 0
    run_dir: str = MISSING
    env: EnvConfig = MISSING
    prompt: PromptConfig = MISSING
    model: ModelConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    stage: StageConfig = MISSING
    algo: AlgoConfig | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ConfigError(f"name={self.name!r} names a folder: use letters, digits and . _ + - only")
        at_least("seed", self.seed, 0)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.hardware.device):
            raise ConfigError(
                f"hardware.device={self.hardware.device} isn't known here: set cpu, cuda or cuda:<number>"
            )
        if isinstance(self.env, CardsConfig) and self.env.compat == "rl4vlm" and self.env.invalid_penalty:
            raise ConfigError(
                "env.compat=rl4vlm plays a random action where none can be read and takes nothing off for it, and "
                f"env.invalid_penalty is {self.env.invalid_penalty:g}: set env.invalid_penalty=0"
            )
        if isinstance(self.stage, SftConfig) and self.hardware.device not in ("cpu", "cuda", "cuda:0"):
            number = self.hardware.device.removeprefix("cuda:")
            raise ConfigError(
                f"hardware.device={self.hardware.device}: stage=sft runs transformers' Trainer, which takes the first "
                f"GPU that it sees. Set hardware.device=cuda, and CUDA_VISIBLE_DEVICES={number} before the command"
            )
        if isinstance(self.stage, PpoConfig):
            if self.algo is None:
                raise ConfigError("stage=ppo needs an algo: add algo=ppo")
            if self.algo.value_warmup >= self.stage.iterations > 1:
                raise ConfigError(
                    f"algo.value_warmup={self.algo.value_warmup} leaves the policy none of "
                    f"stage.iterations={self.stage.iterations}: have fewer of the one or more of the other"
                )
            if self.stage.freeze_vision and (self.model.train.vision or self.model.train.projector):
                raise ConfigError(
                    "model.train.vision or projector is true, and stage.freeze_vision freezes both: "
                    "set stage.freeze_vision=false to train them, or leave their switches out"
                )
        if self.algo is not None:
            self._check_what_the_algo_needs(self.algo)
        self._check_that_something_learns()

    def _check_what_the_algo_needs(self, algo: AlgoConfig) -> None:
        if algo.turn_entropy_coef > 0 and self.model.temperature_head is None:
            raise ConfigError(
                "algo.turn_entropy_coef > 0 trains a learned temperature, and there is none: "
                "add model/temperature_head=learned, or set algo.turn_entropy_coef=0"
            )
        if algo.novelty.coef > 0 and self.model.lora is None:
            raise ConfigError(
                "algo.novelty.coef > 0 makes a second adapter, and the model has no first: add model/lora=adapter"
            )
        if algo.kl_coef > 0 and self.model.lora is None:
            raise ConfigError(
                "algo.kl_coef > 0 needs a reference policy, which is the model with its adapter off: "
                "add model/lora=adapter, or set algo.kl_coef=0"
            )

    def _check_that_something_learns(self) -> None:
        if not isinstance(self.stage, SftConfig | PpoConfig):
            return
        frozen = isinstance(self.stage, PpoConfig) and self.stage.freeze_vision
        tempered = isinstance(self.stage, PpoConfig) and self.model.temperature_head is not None
        if not tempered and not any(vars(self.model.train.settled(frozen)).values()):
            choice = "language=true, or stage.freeze_vision=false" if frozen else "vision, projector or language=true"
            raise ConfigError(f"nothing would learn: set model.train.{choice}")


def register() -> None:
    """Tell Hydra the schemas. They live under `schema/` so that they never show up as options of a group.

    `${token:}` is new in every process: it keeps apart the runs without a name that start in one second.
    """
    OmegaConf.register_new_resolver("token", partial(secrets.token_hex, 3), use_cache=True, replace=True)
    store = ConfigStore.instance().store
    store(name="run", group="schema", node=RunConfig)
    for env in (EchoConfig, MiniGridConfig, NumberLineConfig, BlackjackConfig, EZPointsConfig, PointsConfig):
        store(name=env().family, group="schema/env", node=env)
    store(name="prompt", group="schema", node=PromptConfig)
    store(name="model", group="schema", node=ModelConfig)
    store(name="hardware", group="schema", node=HardwareConfig)
    store(name="tracking", group="schema", node=TrackingConfig)
    store(name="algo", group="schema", node=AlgoConfig)
    for stage in (CollectConfig, PreprocessConfig, SftConfig, PpoConfig, EvalConfig, MergeConfig, DoctorConfig):
        store(name=stage().name, group="schema/stage", node=stage)


def parse(cfg: DictConfig) -> RunConfig:
    """The composed configuration as checked plain dataclasses; ConfigError says which value is off."""
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    for key in unknown_keys(run):
        raise ConfigError(f"{key}: no such setting. A leading + doesn't add one; remove +{key}")
    return run


def unknown_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Settings that no schema knows: `+key=value` brings them in, and nothing would ever read them."""
    names = [one.name for one in fields(node)]
    yield from (prefix + name for name in vars(node) if name not in names)
    for name in names:
        if is_dataclass(getattr(node, name)):
            yield from unknown_keys(getattr(node, name), f"{prefix}{name}.")


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings, under dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
