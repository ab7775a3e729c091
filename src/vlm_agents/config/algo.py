"""How a policy learns from reward."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting
from vlm_agents.errors import ConfigError

if TYPE_CHECKING:
    from vlm_agents.config.run import RunConfig


@dataclass
class NoveltyConfig(Part, place="algo.novelty"):
    """The novelty bonus: a second adapter predicts an episode's actions from its first picture."""

    coef: float = setting(0.0, "reward for a nat of surprise; 0: no predictor; needs model.lora", low=0)
    lr: float = setting(1e-3, "learning rate of the predictor", low=0)

    def check(self, run: "RunConfig") -> None:
        if self.coef > 0 and run.model.lora is None:
            raise ConfigError(
                "algo.novelty.coef > 0 makes a second adapter, and the model has no first: add model/lora=adapter"
            )


@dataclass
class AlgoConfig(Part, place="algo"):
    name: str = setting(MISSING, "chosen by algo=", choices=Literal["ppo"])
    gamma: float = setting(0.98, "discount of the reward a turn", low=0, high=1)
    gae_lambda: float = setting(
        0.95,
        "lambda of generalized advantage estimation over turns; 1: no bootstrapping from the critic",
        low=0,
        high=1,
    )
    clip: float = setting(
        0.2,
        "PPO's clip range: probability ratios count up to 1 + clip, and down to 1 - clip",
        positive=True,
        infinite=True,
    )
    epochs: int = setting(1, "passes over the turns of an iteration", low=1)
    minibatch_turns: int = setting(128, "turns an optimizer step", low=1)
    thought_coef: float = setting(0.2, "weight of a thought token's log-prob beside an action token's 1", low=0)
    value_coef: float = setting(0.5, "weight of the critic's loss", low=0)
    value_warmup: int = setting(1, "first iterations, in which the critic's head alone learns", low=0)
    value_epochs: int = setting(
        10, "passes of the critic's head alone, over the states that it read in the first of epochs", low=0
    )
    entropy_coef: float = setting(0.0, "weight of the token entropy, as a bonus", low=0)
    turn_entropy: float = setting(
        0.1, "nats a token that a learned temperature is drawn towards; needs model.temperature_head"
    )
    turn_entropy_coef: float = setting(
        0.0, "how strongly a learned temperature is drawn towards turn_entropy; needs model.temperature_head", low=0
    )
    kl_coef: float = setting(0.0, "k3 penalty towards the policy that training started from; needs model.lora", low=0)
    target_kl: float | None = setting(
        None, "an iteration's remaining updates are skipped once approx_kl passes this; null: none are", low=0
    )
    novelty: NoveltyConfig = setting(NoveltyConfig, "reward for actions that a second adapter doesn't predict")
    lr: float = setting(1e-4, "learning rate of the policy", low=0)
    value_lr: float = setting(1e-3, "learning rate of the critic's head", low=0)
    warmup_updates: int = setting(0, "iterations in which the learning rate rises to lr", low=0)
    min_lr_ratio: float = setting(0.1, "the cosine schedule ends at this share of the learning rate", low=0, high=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay", low=0)
    max_grad_norm: float = setting(1.0, "longer gradients are scaled down to this norm", positive=True, infinite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_warmup and not self.value_epochs:
            raise ConfigError(
                f"algo.value_warmup={self.value_warmup} has the critic learn in algo.value_epochs, and there are none: "
                "set value_warmup=0 too, or value_epochs=10"
            )

    def check(self, run: "RunConfig") -> None:
        if self.turn_entropy_coef > 0 and run.model.temperature_head is None:
            raise ConfigError(
                "algo.turn_entropy_coef > 0 trains a learned temperature, and there is none: "
                "add model/temperature_head=learned, or set algo.turn_entropy_coef=0"
            )
        if self.kl_coef > 0 and run.model.lora is None:
            raise ConfigError(
                "algo.kl_coef > 0 needs a reference policy, which is the model with its adapter off: "
                "add model/lora=adapter, or set algo.kl_coef=0"
            )
