"""An agent to a plain folder: what transformers, and any server built on it, loads without this package.

Not what a run trains from and resumes: that is `Agent.save`, which keeps an adapter apart from its base.
"""

import json
from pathlib import Path

from safetensors import safe_open

from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.families import kind_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save_merged(agent: Agent, folder: Path) -> None:
    """Fold the adapter into the weights for good, and save all that a server needs; our own heads lie beside."""
    agent.model = agent.model.merge_and_unload()
    agent.save(folder)
    index_weights(folder)
    if settings := kind_of(agent.model.config.model_type).processor(agent.model.config):
        (folder / "processor_config.json").write_text(json.dumps(settings, indent=2))


def index_weights(folder: Path) -> None:
    """Say which file holds which weight, as transformers does where there are several.

    Servers (vLLM, SGLang) read every *.safetensors of a folder, and stumble over the heads, unless an index says
    which of them are the model's.
    """
    if (folder / INDEX).exists():
        return
    with safe_open(folder / WEIGHTS, "pt") as weights:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), WEIGHTS)}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
