"""The model, and which parts of it learn."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting
from vlm_agents.errors import ConfigError


@dataclass
class LoraConfig(Part, place="model.lora"):
    rank: int = setting(16, "rank of the adapters' matrices", low=1)
    alpha: int = setting(32, "the adapters' output is multiplied by alpha / rank")
    dropout: float = setting(
        0.0,
        "share of the adapters' inputs that are dropped, in stage=sft alone: in stage=ppo, what is trained is what was "
        "sampled",
        low=0,
        high=1,
    )


@dataclass
class TrainableConfig(Part, place="model.train"):
    """Which parts learn; with LoRA, which parts get adapters."""

    vision: bool = setting(True, "the vision tower learns")
    projector: bool = setting(True, "what maps pictures into the language part learns")
    language: bool = setting(True, "the language part learns")

    @property
    def parts(self) -> list[str]:
        """The names of those that learn."""
        return [name for name, learns in vars(self).items() if learns]


@dataclass
class ValueHeadConfig(Part, place="model.value_head"):
    hidden: int = setting(128, "width of the critic's hidden layer")
    stop_gradient: bool = setting(True, "the critic reads the policy's features but doesn't move them")


@dataclass
class TemperatureHeadConfig(Part, place="model.temperature_head"):
    """A learned sampling temperature for every turn, within bounds; it starts at `model.temperature`."""

    low: float = setting(0.3, "lowest temperature", positive=True)
    high: float = setting(1.5, "highest temperature", positive=True)
    hidden: int = setting(64, "width of the hidden layer", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ConfigError(f"model.temperature_head needs 0 < low < high, not {self.low:g} and {self.high:g}")


@dataclass
class ModelConfig(Part, place="model"):
    name: str = setting(MISSING, "chosen by model=")
    path: str | None = setting(
        None, "folder or hub id with weights and processor; null: the tiny model of this package"
    )
    weights: str = setting(
        "pretrained",
        "pretrained: those at path; random: the same architecture, freshly drawn",
        choices=Literal["pretrained", "random"],
    )
    seed: int = setting(0, "of random weights: an adapter trained on them finds the same ones again")
    architecture: dict[str, Any] | None = setting(
        None,
        "for random weights without any file: what a config.json says, and under image_processor what a "
        "preprocessor_config.json says",
    )
    image_processor: Any = setting(
        None,
        "settings that shall be otherwise than in the model's own, {name: value}; {max_pixels: 100352} bounds the "
        "tokens of a picture",
    )
    temperature: float = setting(
        1.0,
        "the policy's own sampling temperature, in rollouts, training and eval/success",
        positive=True,
        reason="; greedy runs are eval's business",
    )
    lora: LoraConfig | None = setting(None, "LoRA adapters instead of full training", bring_in="add model/lora=adapter")
    quantize: str | None = setting(
        None,
        "nf4: QLoRA, the language part's weights in 4 bits under the adapter; null: weights as they are",
        choices=Literal["nf4"],
    )
    train: TrainableConfig = setting(
        TrainableConfig, "which parts learn, with LoRA get adapters: model/train=all, or language as in stage=ppo"
    )
    value_head: ValueHeadConfig = setting(ValueHeadConfig, "the critic, which predicts the return of a turn")
    temperature_head: TemperatureHeadConfig | None = setting(
        None, "the model chooses each turn's sampling temperature", bring_in="add model/temperature_head=learned"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    attention: str = setting(
        "sdpa",
        "implementation of attention; sdpa takes a flash kernel by itself where there is one",
        choices=Literal["sdpa", "eager"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.image_processor is None or isinstance(self.image_processor, dict)):
            raise ConfigError("model.image_processor must be settings: 'model.image_processor={max_pixels: 100352}'")
        if self.quantize is not None and self.lora is None:
            raise ConfigError(
                f"model.quantize={self.quantize}: weights in 4 bits can't be trained themselves. "
                "Add model/lora=adapter, which trains beside them, or set model.quantize=null"
            )
        if self.architecture is not None and self.path is None and self.weights == "pretrained":
            raise ConfigError(f"model={self.name} has no weights of its own: set model.path, or model.weights=random")
        head = self.temperature_head
        if head is not None and not head.low < self.temperature < head.high:
            raise ConfigError(
                f"model.temperature={self.temperature:g}, where the temperature head starts, must lie between "
                f"model.temperature_head.low={head.low:g} and high={head.high:g}"
            )
