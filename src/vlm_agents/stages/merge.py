"""An adapter merged into its base: one plain HF folder that any server takes, checked against the adapter model.

Trains nothing. The value head comes along in a folder of its own, so that training can go on from the merged folder.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlm_agents.config import MergeConfig, RunConfig
from vlm_agents.errors import ModelError
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.models.sources import adapter_folder
from vlm_agents.progress import say
from vlm_agents.run import Run
from vlm_agents.stages.cards import origin_of, save_model
from vlm_agents.stages.playing import first_prompts, open_envs
from vlm_agents.types import Prompt
from vlm_agents.weights import RUN_MODEL, run_of

PROBES = 16  # held-out seeds whose first prompts are compared
# In float32 sums come in another order, no more. In bfloat16 each merged weight is rounded to 8 bits once more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def main(cfg: RunConfig, stage: MergeConfig, run: Run) -> dict[str, float]:
    run.restore()  # an interrupted one starts anew
    source = adapter_folder(stage.init)
    if (trained := run_of(stage.init)) and (trained / "DONE").exists():
        run.env, _ = origin_of(trained)  # somebody's own chats, perhaps: then what is played here is any env
    with open_envs(cfg.env, PROBES, "never") as envs:
        prompts = first_prompts(cfg, envs, PROBES)
    quantised = None
    if cfg.model.quantize:  # what was trained; it goes before the next one comes: one model at a time in memory
        quantised = logits(load_agent(cfg.model, cfg.hardware, stage.init), prompts)
    # an adapter trained over 4 bits is merged into the weights that they were rounded from: 4 bits hold no merged ones
    agent = load_agent(replace(cfg.model, quantize=None), cfg.hardware, stage.init)
    expected = logits(agent, prompts)
    with agent.adapter_off():
        effect = float((logits(agent, prompts) - expected).abs().max())
    metrics = {"merge/adapter_logit_difference": effect}
    tolerance = TOLERANCE[cfg.hardware.dtype] if stage.tolerance is None else stage.tolerance

    def write(folder: Path) -> None:
        save_merged(agent, folder)
        agent.to("meta")  # one model at a time in memory
        merged = load_agent(replace(cfg.model, lora=None, quantize=None), cfg.hardware, str(folder))
        found = logits(merged, prompts)
        metrics["merge/max_logit_difference"] = compare(expected, found, tolerance, folder, cfg.env.id)
        if quantised is not None:
            metrics["merge/quantised_logit_difference"] = float((found - quantised).abs().max())

    run.begin()
    save_model(run, write, metrics, prompts[0], cfg.prompt.format)
    rounding = ""
    if quantised is not None:
        rounding = f"; from the model in 4 bits that was trained, by {metrics['merge/quantised_logit_difference']:.2g}"
    say(
        f"merged {source}: logits differ by {metrics['merge/max_logit_difference']:.2g} at most over {PROBES} prompts, "
        f"prompt={cfg.prompt.format} of {cfg.env.id}, where the adapter itself makes {effect:.2g}{rounding}"
    )
    run.log(0, metrics)
    return run.finish(metrics, {"model": run.path(RUN_MODEL)})


def save_merged(agent: Agent, folder: Path) -> None:
    """Fold the adapter into the weights for good, and save them."""
    agent.model = agent.model.merge_and_unload()
    agent.save(folder)


@torch.no_grad()
def logits(agent: Agent, prompts: Sequence[Prompt]) -> Tensor:
    """[N V] what the agent makes of each prompt's next token, fp32, on the host."""
    agent.images.clear()  # features of another adapter state
    return agent.family.lm_head(HFSampler(agent).prefill(prompts, 0).hidden).float().cpu()


def compare(expected: Tensor, found: Tensor, tolerance: float, folder: Path, env: str) -> float:
    """The largest difference; ModelError where it is beyond the tolerance, or no number."""
    difference = (found - expected).abs().amax(-1)
    worst, largest = int(difference.nan_to_num(nan=torch.inf).argmax()), float(difference.max())
    if not largest <= tolerance:
        raise ModelError(
            f"{folder}: the merged weights aren't the adapter model: their logits differ by {largest:.3g}, more than "
            f"{tolerance:g}, on the first prompt of held-out seed number {worst} of {env}. Merge with "
            "hardware.dtype=float32, or raise stage.tolerance if you can live with that"
        )
    return largest
