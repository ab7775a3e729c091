"""Where the policy's replies come from while it is trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlm_agents.config.fields import Part, setting
from vlm_agents.config.remote import EndpointConfig
from vlm_agents.errors import ConfigError

if TYPE_CHECKING:
    from vlm_agents.config.run import RunConfig


@dataclass
class EngineConfig(EndpointConfig, place="rollout.remote"):
    """The server that samples: as many requests at once as it decodes at once."""

    needs: ClassVar[tuple[str, ...]] = ("stage.lora_rank=<model.lora.rank>",)
    concurrency: int = 64
    timeout_s: float = 600.0


@dataclass
class RolloutConfig(Part, place="rollout"):
    engine: str = setting(
        "own",
        "own: the weights that are trained, in this process; vllm: a vLLM server, which is handed the adapter after "
        "every update; chosen by rollout=",
        choices=Literal["own", "vllm"],
    )
    tolerance: float = setting(
        0.1,
        "largest mean difference of a token's log-prob, sampled there and computed here, of a new adapter's first "
        "replies; more stop the run",
        positive=True,
        may_change=True,
        only=("engine", ("vllm",)),
    )
    remote: EngineConfig = setting(EngineConfig, "the server of rollout=vllm")

    def check(self, run: "RunConfig") -> None:
        if self.engine == "own":
            return
        if run.stage.name != "ppo":
            raise ConfigError(f"rollout={self.engine}: stage={run.stage.name} trains no policy: leave it out")
        if run.model.lora is None:
            raise ConfigError(
                f"rollout={self.engine}: the server is handed an adapter after every update, and the model has none: "
                "add model/lora=adapter"
            )
        if run.model.train.vision or run.model.train.projector:
            raise ConfigError(
                f"rollout={self.engine}: vLLM takes adapters of the language part alone: set model/train=language"
            )
        if run.model.temperature_head is not None:
            raise ConfigError(
                f"rollout={self.engine}: a server knows one temperature, model.temperature: set "
                "model/temperature_head=null"
            )
        if run.model.quantize is not None:
            raise ConfigError(
                f"rollout={self.engine}: the server's weights aren't those of model.quantize={run.model.quantize}: set "
                "model.quantize=null"
            )
        if not 0.01 <= run.model.temperature <= 2:
            raise ConfigError(
                f"rollout={self.engine}: vLLM samples at temperatures from 0.01 to 2, not at model.temperature="
                f"{run.model.temperature:g}"
            )
        assert run.algo is not None
        if run.algo.correction == "none":
            raise ConfigError(
                f"rollout={self.engine}: another program's log-probs are never quite those that are trained: set "
                "algo.correction=truncate"
            )
