"""What predicts actions for the novelty bonus: a second LoRA adapter beside the policy's. `learn.novelty` trains it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import nn

from vlm_agents.errors import ConfigError
from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.damage import refusing
from vlm_agents.models.lora import config_of, read
from vlm_agents.tensors import Row, Scores

POLICY = "default"  # peft's name of the only adapter that most models have
PREDICTOR = "temporal"  # that of this one, and its folder inside that of the model


class AdapterPredictor:
    """Implements novelty.ActionPredictor. The adapter comes out of `folder` where that has one, and is saved with the
    agent; ModelError where it is one of another model.

    It has the policy's shape, on the language part alone: what pictures look like is the same for both.
    """

    def __init__(self, agent: Agent, folder: Path | None) -> None:
        assert isinstance(agent.model, PeftModel)
        self.agent, self.model = agent, agent.model
        with self.agent.gradients_kept():
            if folder is not None and (saved := folder / PREDICTOR).is_dir():
                with refusing(f"adapter {saved}", "Put a whole copy there, or delete that folder to begin anew", saved):
                    self.model.add_adapter(PREDICTOR, config_of(saved))
                    read(self.model, saved, PREDICTOR)
            else:
                self.model.add_adapter(PREDICTOR, self._shape())
            self.model.set_adapter(POLICY)

    def score(self, rows: Sequence[Row]) -> Scores:
        """At temperature 1: how varied the policy's replies are is none of its business."""
        with self.agent.at_temperature(1.0):
            return self.agent.score(rows)

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """The second adapter alone answers, and alone learns."""
        with self.agent.gradients_kept():
            self.model.set_adapter(PREDICTOR)
            try:
                with self.agent.images.seen_in(self._as_policy):
                    yield
            finally:
                self.model.set_adapter(POLICY)

    @contextmanager
    def _as_policy(self) -> Iterator[None]:
        self.model.set_adapter(POLICY)
        try:
            yield
        finally:
            self.model.set_adapter(PREDICTOR)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.model.named_parameters() if f".{PREDICTOR}." in name]

    def _shape(self) -> LoraConfig:
        policy = self.model.peft_config[POLICY]
        assert isinstance(policy, LoraConfig)
        adapted = self.model.targeted_module_names  # whole names, where another tool's settings have parts or patterns
        targets = {name for name in adapted if self.agent.family.part_of(name) == "language"}
        if not targets:
            raise ConfigError("algo.novelty adapts the language part: set model.train.language=true")
        return replace(policy, target_modules=targets)
