"""The schema of every configuration group and the checks across fields. Imports no torch.

Hydra composes YAML from `conf/` against these classes; `parse` turns the result into plain dataclasses once, at the
door. Past it nobody sees a DictConfig, and nobody writes to the result. `python -m vlm_agents stage=ppo --help` and
docs/configuration.md show what stands here.
"""

from vlm_agents.config.algo import AlgoConfig, NoveltyConfig
from vlm_agents.config.conf import command, conf_dir, described, groups
from vlm_agents.config.env import (
    ALFWORLD_TASKS,
    FAMILIES,
    AlfWorldConfig,
    BlackjackConfig,
    CardsConfig,
    Compat,
    CustomConfig,
    EchoConfig,
    EnvConfig,
    EZPointsConfig,
    Faces,
    GymnasiumConfig,
    MiniGridConfig,
    NumberLineConfig,
    PointsConfig,
    SandboxConfig,
    VisualSearchConfig,
)
from vlm_agents.config.fields import at_least, between, one_of
from vlm_agents.config.hardware import HardwareConfig
from vlm_agents.config.listing import entries, listing
from vlm_agents.config.model import LoraConfig, ModelConfig, TemperatureHeadConfig, TrainableConfig, ValueHeadConfig
from vlm_agents.config.prompt import PromptConfig
from vlm_agents.config.referee import RefereeConfig
from vlm_agents.config.remote import UNNAMED, EndpointConfig, RemoteConfig
from vlm_agents.config.rollout import RolloutConfig
from vlm_agents.config.run import (
    RunConfig,
    env_of,
    env_of_id,
    flat,
    may_change,
    off_by_default,
    parse,
    read,
    register,
    with_defaults,
)
from vlm_agents.config.secrets import refuse_secrets
from vlm_agents.config.stage import (
    AUTO,
    CollectConfig,
    DoctorConfig,
    EvalConfig,
    MergeConfig,
    PpoConfig,
    PreprocessConfig,
    ServeConfig,
    SftConfig,
    StageConfig,
)
from vlm_agents.config.tracking import TrackingConfig

__all__ = [
    "ALFWORLD_TASKS",
    "AUTO",
    "FAMILIES",
    "UNNAMED",
    "AlfWorldConfig",
    "AlgoConfig",
    "BlackjackConfig",
    "CardsConfig",
    "CollectConfig",
    "Compat",
    "CustomConfig",
    "DoctorConfig",
    "EZPointsConfig",
    "EchoConfig",
    "EndpointConfig",
    "EnvConfig",
    "EvalConfig",
    "Faces",
    "GymnasiumConfig",
    "HardwareConfig",
    "LoraConfig",
    "MergeConfig",
    "MiniGridConfig",
    "ModelConfig",
    "NoveltyConfig",
    "NumberLineConfig",
    "PointsConfig",
    "PpoConfig",
    "PreprocessConfig",
    "PromptConfig",
    "RefereeConfig",
    "RemoteConfig",
    "RolloutConfig",
    "RunConfig",
    "SandboxConfig",
    "ServeConfig",
    "SftConfig",
    "StageConfig",
    "TemperatureHeadConfig",
    "TrackingConfig",
    "TrainableConfig",
    "ValueHeadConfig",
    "VisualSearchConfig",
    "at_least",
    "between",
    "command",
    "conf_dir",
    "described",
    "entries",
    "env_of",
    "env_of_id",
    "flat",
    "groups",
    "listing",
    "may_change",
    "off_by_default",
    "one_of",
    "parse",
    "read",
    "refuse_secrets",
    "register",
    "with_defaults",
]
