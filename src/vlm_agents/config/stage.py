"""The stages, and what each of them does."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting
from vlm_agents.config.remote import RemoteConfig
from vlm_agents.errors import ConfigError

if TYPE_CHECKING:
    from vlm_agents.config.run import RunConfig

PolicyName = Literal["model", "expert", "random", "remote"]
RaterName = Literal["none", "expert", "remote"]
NOTHING_LEARNS = (
    "nothing would learn: set model/train=language or all, or one of model.train.{vision,projector,language}=true"
)
AUTO = "auto"  # stage.init: the model that an earlier stage left under the run's name, where there is one
WEIGHTS = (
    "run directory or HF folder whose weights are taken; auto: those that an earlier stage left under this run's name, "
    "if there are any; null: the model's own"
)

OWN_OPTIONS = {  # of a server, which aren't the user's: what to do instead
    "host": "set stage.host",
    "port": "set stage.port",
    "model": "set model.path or stage.init",
    "served-model-name": "other runs know the model by what it was read from",
    "api-key": "each server has a new one, in a file that none but you can read",
    "trust-remote-code": "code that comes with a model isn't run",
}


@dataclass
class StageConfig(Part, place="stage"):
    name: str = setting(MISSING, "chosen by stage=")


@dataclass
class CollectConfig(StageConfig):
    """Play and label episodes."""

    name: str = "collect"
    policy: str = setting("expert", "who plays", choices=PolicyName)
    init: str | None = setting(None, "policy=model: run directory or HF folder; null: the model's own weights")
    episodes: int = setting(256, "episodes to play", low=1)
    num_envs: int = setting(32, "episodes played at the same time", low=1)
    noise: float = setting(
        0.3, "share of turns where a random legal action is played; the label stays the policy's", low=0, high=1
    )
    rater: str = setting("expert", "who scores each step 0-10", choices=RaterName)
    remote: RemoteConfig = setting(RemoteConfig, "the server of policy=remote and rater=remote")


@dataclass
class PreprocessConfig(StageConfig):
    """Trajectories to SFT data."""

    name: str = "preprocess"
    data: list[str] = setting(MISSING, "list of run directories of stage=collect, and of .json files in LLaVA's layout")
    images: str | None = setting(
        None, "folder that the image paths of LLaVA files start from; null: where each file lies"
    )
    label: str = setting(
        "reply",
        "what the student shall say. reply: what the policy said, if it meant it; advice: what the expert would have "
        "said (DAgger); played: what was played, random moves too, with the expert's thought: it sees well and acts "
        "badly",
        choices=Literal["reply", "advice", "played"],
    )
    success_only: bool = setting(True, "keep solved episodes only")
    min_score: float = setting(0.0, "keep steps rated at least this; unrated steps count as 0", low=0, high=10)
    val_fraction: float = setting(0.02, "share of episodes held out for validation", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == []:
            raise ConfigError("stage.data is empty: name run directories of stage=collect, or .json files")
        if not all(isinstance(source, str) for source in self.data):
            raise ConfigError(f"stage.data={self.data} must be a list of paths, as in stage.data=[outputs/a/collect]")


@dataclass
class SftConfig(StageConfig):
    """Supervised fine-tuning on the Parquet data of stage=preprocess."""

    name: str = "sft"
    data: str = setting(MISSING, "run directory of stage=preprocess")
    skip_bad: bool = setting(
        False, "leave out the rows that can't be trained on, instead of refusing them all before it begins"
    )
    init: str | None = setting(None, "run directory or HF folder to start from; null: the model's own weights")
    epochs: float = setting(1.0, "passes over the data; a fraction will do", positive=True)
    batch_size: int = setting(64, "chats an optimizer step; turns of one chat that extend each other count once", low=1)
    lr: float = setting(1e-3, "learning rate", low=0)
    warmup_steps: int = setting(
        50, "optimizer steps in which the learning rate rises; half of all steps at most", low=0
    )
    weight_decay: float = setting(0.0, "AdamW's weight decay", low=0)
    max_grad_norm: float = setting(1.0, "longer gradients are scaled down to this norm; 0: none are", low=0)
    checkpoint_every: int = setting(200, "optimizer steps between checkpoints", low=1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", low=1)

    def check(self, run: "RunConfig") -> None:
        if run.hardware.device not in ("cpu", "cuda", "cuda:0"):
            number = run.hardware.device.removeprefix("cuda:")
            raise ConfigError(
                f"hardware.device={run.hardware.device}: stage=sft runs transformers' Trainer, which takes the first "
                f"GPU that it sees. Set hardware.device=cuda, and CUDA_VISIBLE_DEVICES={number} before the command"
            )
        if not run.model.train.parts:
            raise ConfigError(NOTHING_LEARNS)


@dataclass
class PpoConfig(StageConfig):
    """Reinforcement learning on the env's reward."""

    name: str = "ppo"
    init: str | None = setting(AUTO, WEIGHTS)
    iterations: int = setting(16, "rounds of playing and learning", low=1)
    episodes: int = setting(64, "whole episodes learned from per iteration", low=1)
    env_steps: int | None = setting(
        None, "turns played in training after which it ends, though iterations are left; null: no such bound", low=1
    )
    stop_on_collapse: bool = setting(
        False, "end a training that collapses, and keep the last checkpoint from before that; else it is told alone"
    )
    num_envs: int = setting(64, "episodes played at the same time", low=1)
    staleness: int = setting(
        0,
        "updates by which the weights that play are older than those that learn from it. 1: the server of rollout=vllm "
        "plays the next iteration while this one is learned from",
        choices=Literal[0, 1],
    )
    eval_episodes: int = setting(200, "size of the held-out panel played before and after; 0: no evaluation", low=0)
    eval_every: int = setting(0, "iterations between evaluations on the panel; 0: only before and after", low=0)
    checkpoint_every: int = setting(1, "iterations between checkpoints", low=1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", low=1)
    keep_best: bool = setting(
        False,
        "keep the checkpoint too whose weights then succeeded most often in an iteration's rollout, whose seeds aren't "
        "held out; of few episodes that is a noisy choice",
    )

    def check(self, run: "RunConfig") -> None:
        if run.algo is None:
            raise ConfigError("stage=ppo needs an algo: add algo=ppo")
        if self.stop_on_collapse and self.keep_checkpoints < 2:
            raise ConfigError(
                "stage.stop_on_collapse keeps a checkpoint from before a collapse, and the newest is the one that "
                "plays its first bad iteration: set stage.keep_checkpoints=2"
            )
        if self.episodes % run.algo.group_size:
            raise ConfigError(
                f"stage.episodes={self.episodes} are no whole groups of algo.group_size={run.algo.group_size}: have a "
                "multiple of it"
            )
        if run.algo.valued and run.algo.value_warmup >= self.iterations > 1:
            raise ConfigError(
                f"algo.value_warmup={run.algo.value_warmup} leaves the policy none of "
                f"stage.iterations={self.iterations}: have fewer of the one or more of the other"
            )
        if not run.model.train.parts and run.model.temperature_head is None:
            raise ConfigError(NOTHING_LEARNS)
        if self.staleness:
            self._check_staleness(run)

    def _check_staleness(self, run: "RunConfig") -> None:
        assert run.algo is not None
        asked = f"stage.staleness={self.staleness}"
        if run.rollout.engine == "own":
            raise ConfigError(
                f"{asked}: the weights that play are those that learn: set rollout=vllm algo=grpo, or stage.staleness=0"
            )
        if run.algo.valued:
            raise ConfigError(
                f"{asked}: algo={run.algo.name} has a critic read every prompt, with weights that are being trained "
                "then: take one without, such as algo=grpo"
            )
        if run.algo.novelty.coef:
            raise ConfigError(f"{asked}: algo.novelty trains beside what plays: set algo.novelty.coef=0")
        for name in ("keep_best", "stop_on_collapse"):
            if getattr(self, name):
                raise ConfigError(
                    f"{asked}: stage.{name} judges weights by how they play, and older ones do: leave it out"
                )
        if run.hardware.ranks > 1:
            raise ConfigError(f"{asked}: ranks play together, and can't while they learn: set hardware.processes=1")


@dataclass
class EvalConfig(StageConfig):
    """Play a fixed panel of held-out seeds."""

    name: str = "eval"
    policy: str = setting("model", "who plays", choices=PolicyName)
    init: str | None = setting(AUTO, WEIGHTS)
    episodes: int = setting(200, "size of the panel", low=1)
    num_envs: int = setting(64, "episodes played at the same time", low=1)
    baselines: bool = setting(
        True, "also play random and expert on the same panel, and the model without its tool where it has one"
    )
    report_episodes: int = setting(12, "episodes shown in report.html", low=0)
    remote: RemoteConfig = setting(RemoteConfig, "the server of policy=remote")


@dataclass
class MergeConfig(StageConfig):
    """Merge an adapter into its base, as a plain HF folder."""

    name: str = "merge"
    init: str = setting(AUTO, "run directory or folder of the adapter; auto: what ppo, else sft, left under this name")
    tolerance: float | None = setting(
        None, "largest difference of a logit before and after; null: 1e-3 in float32, 0.5 in bfloat16", low=0
    )


@dataclass
class ServeConfig(StageConfig):
    """Serve a model to other runs."""

    name: str = "serve"
    init: str | None = setting(
        None,
        "run directory or HF folder whose weights are served; auto: those that an earlier stage left under this run's "
        "name, if there are any; null: the model's own",
    )
    engine: str = setting(
        "auto",
        "auto: vLLM where it is installed and hardware.device is a GPU, else transformers serve",
        choices=Literal["auto", "vllm", "transformers"],
        may_change=True,
    )
    host: str = setting(
        "127.0.0.1",
        "address that it listens on; node: that of this machine, for other machines: with vLLM alone, which demands "
        "the key",
        may_change=True,
    )
    port: int | None = setting(None, "null: any that is free", low=1, high=65535, may_change=True)
    lora_rank: int | None = setting(
        None,
        "vLLM takes adapters up to this rank while it serves, from runs with rollout=vllm; null: none",
        low=1,
        high=512,
        may_change=True,
    )
    options: Any = setting(
        None,
        "{name: value} of further options of the server's own: 'stage.options={tensor-parallel-size: 4}'",
        may_change=True,
    )
    until: str | None = setting(None, "run directory; the server ends once that run is finished", may_change=True)
    minutes: float | None = setting(
        None, "the server ends so long after its first answer; null: no such bound", positive=True, may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+", self.host) or self.host == "0.0.0.0":
            raise ConfigError(
                f"stage.host={self.host} must be one address of this machine, by which it is handed over: set "
                "127.0.0.1, node, or that address"
            )
        if self.options is None:
            return
        if not (isinstance(self.options, dict) and all(isinstance(name, str) for name in self.options)):
            raise ConfigError("stage.options must be options of the server: 'stage.options={max-model-len: 8192}'")
        for name in self.options:
            if (plain := name.replace("_", "-")) in OWN_OPTIONS:
                raise ConfigError(f"stage.options can't have {name}: {OWN_OPTIONS[plain]}")

    def check(self, run: "RunConfig") -> None:
        if run.model.weights == "random" and self.init is None:
            raise ConfigError(
                "model.weights=random: a server reads a folder. Set stage.init to one, or model.weights=pretrained"
            )
        for name in ("quantize", "image_processor"):
            if getattr(run.model, name) is not None:
                raise ConfigError(
                    f"model.{name} isn't known to servers: set model.{name}=null, and in stage.options what the "
                    "server has for it"
                )


@dataclass
class DoctorConfig(StageConfig):
    """Say what this machine can run, and what the chosen model would need."""

    name: str = "doctor"
    num_envs: int = setting(64, "prompts that are sampled for at once, as stage=ppo has it", low=1)
    prompt_tokens: int | None = setting(None, "longest prompt; null: the longest of a few random episodes", low=1)
