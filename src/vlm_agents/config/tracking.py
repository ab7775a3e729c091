"""Where metrics go besides metrics.jsonl."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting
from vlm_agents.config.secrets import refuse_secrets


@dataclass
class TrackingConfig(Part, place="tracking"):
    name: str = setting(
        MISSING,
        "jsonl: metrics.jsonl only; mlflow, tensorboard, wandb: that, and a copy there; chosen by tracking=",
        choices=Literal["jsonl", "mlflow", "tensorboard", "wandb"],
    )
    uri: str | None = setting(None, "MLflow's store; null: what MLFLOW_TRACKING_URI says, else sqlite:///mlflow.db")
    experiment: str | None = setting(
        None,
        "MLflow's experiment, or wandb's project; null: MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT, else vlm_agents",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_secrets("tracking.uri", self.uri or "")
