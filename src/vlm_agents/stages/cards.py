"""What a stranger reads beside a model or a dataset: README.md as the hub knows it, and LLaMA-Factory's registry.

No path of this machine stands in them, no clock, and no name that the run gave itself: equal commands leave the same,
interrupted or not.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from vlm_agents.chats import CHAT_COLUMNS, TRL_COLUMNS
from vlm_agents.config import PpoConfig, RunConfig, SftConfig, may_change
from vlm_agents.errors import DataError
from vlm_agents.files import atomic_write
from vlm_agents.metrics import with_interval
from vlm_agents.models.sources import TINY, is_hub_id
from vlm_agents.run import Run
from vlm_agents.types import Prompt
from vlm_agents.weights import ADAPTER_FILE, RUN_MODEL, flat_settings, inside, told_by

CARD = "README.md"
FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
INHERITED = ("base_model", "license", "license_name")  # what a card takes from that of the weights trained further
ABSOLUTE = re.compile(r"(?<![^=,\[\s'\"])/[^,\[\]\s'\"]+")  # a path in a word of a command
VARIANTS = {
    "": "after training, sampled",
    "_greedy": "after training, greedy",
    "_before": "before, sampled",
    "_greedy_before": "before, greedy",
}
SHARES = {"eval/success": "success", "eval/positive_return": "positive return"}
TRAINED = {"sft": "supervised fine-tuning", "ppo": "reinforcement learning (PPO)", "merge": "merging its adapter"}


# ---- models ----------------------------------------------------------------------------------------------------------
def save_model(
    run: Run, save: Callable[[Path], object], metrics: Mapping[str, float], prompt: Prompt | None, form: str | None
) -> None:
    """Have `save` fill the run's folder of its model, and put its card there.

    `prompt` is an example of what the model is asked, `form` the name of its format, where they are known. Metrics are
    looked up when all is saved.
    """

    def write(folder: Path) -> None:
        save(folder)
        (folder / CARD).write_text(model_card(run, folder, metrics, prompt, form), encoding="utf-8")

    run.save_folder(RUN_MODEL, write)


def model_card(run: Run, folder: Path, metrics: Mapping[str, float], prompt: Prompt | None, form: str | None) -> str:
    """The card of the model in `folder`."""
    cfg, adapter = run.cfg, (folder / ADAPTER_FILE).is_file()
    known, base = base_of(cfg)
    licence = known.get("license")
    if isinstance(cfg.stage, SftConfig):  # what its data allow, nobody says here; nor down the chain
        known = {name: value for name, value in known.items() if name != "license_name"} | {"license": "unknown"}
    front = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        **known,
        "tags": ["vlm-agents", cfg.stage.name, *(["lora"] if adapter else [])],
    }
    facts = run.facts()
    temperature, reply = f"{cfg.model.temperature:g}", cfg.prompt.max_reply_tokens
    what = "A LoRA adapter for" if adapter else "All weights of"
    taught = ".json" in run.env  # by somebody's own chats
    does = "was taught by" if taught else "acts in"
    lines = [
        f"# {'Taught by' if taught else 'An agent for'} {run.env}\n",
        f"{what} a vision-language model that {does} `{run.env}`, by {TRAINED[cfg.stage.name]}. Saved by vlm-agents "
        f"{version('vlm-agents')}{f', commit {made}' if (made := facts['commit']) else ''}.\n",
        f"* **Base**: {base}",
        *(
            [f"* **Licence**: the base's is `{licence}`; what the data that it learned from allow isn't known here"]
            if licence not in (None, known.get("license"))
            else []
        ),
        f"* **Made by** `{portable_command(facts['command'])}`",
        f"* **To be sampled** at temperature {temperature}, at most {reply} tokens a reply, in {cfg.hardware.dtype}",
        "* `heads/` holds what vlm-agents trains beside the model, such as the value head; other tools pass it over.",
        *asked(run, prompt, form),
        *results(cfg, metrics),
    ]
    return with_front(front, lines)


def base_of(cfg: RunConfig) -> tuple[dict[str, str], str]:
    """What is known of the weights that a model was made of: fields for its card, and words."""
    init, path = getattr(cfg.stage, "init", None), cfg.model.path
    drawn = cfg.model.weights == "random"
    known: dict[str, str] = {}
    for source in filter(None, (init and str(inside(init)), path or (None if drawn else str(TINY)))):
        known = read_front(Path(source))
        if source == path and not Path(source).is_dir() and is_hub_id(source):
            known = {"base_model": source}
        if known:
            break
    if init:
        words = f"the model of `{portable(init)}` (`model={cfg.model.name}`)"
    elif drawn:
        words = f"random weights of `model={cfg.model.name}`, `model.seed={cfg.model.seed}`"
    elif path is None:
        words = "the tiny weights that vlm-agents ships"
    else:
        words = f"`{portable(path)}`"
    hub = known.get("base_model")
    return known, words if hub in (None, path) else f"{words}, which comes from `{hub}`"


def asked(run: Run, prompt: Prompt | None, form: str | None) -> list[str]:
    """How to ask the model, by an example; that of somebody's own chats isn't shown."""
    if prompt is None or ".json" in run.env:
        return []
    named = f" (`prompt={form}`)" if form else ""
    lines = [f"\n## How to ask it\n\nThrough the model's chat template{named}."]
    for message in prompt:
        many = len(message.images)
        pictures = f", with {many} picture{'s' * (many > 1)}" if many else ""
        lines.append(f"\n{message.role}{pictures}:\n\n````text\n{message.text}\n````")
    return lines


def results(cfg: RunConfig, metrics: Mapping[str, float]) -> list[str]:
    """The figures of the run that say how good the model is, shares with their 95 % intervals."""
    rows = []
    for share, words in SHARES.items():
        for variant, when in VARIANTS.items():
            if f"{share}{variant}" in metrics:
                rows.append(f"| {words}, {when} | {with_interval(metrics, share, variant)} |")
    own = f"{cfg.stage.name}/" if not isinstance(cfg.stage, PpoConfig) else None
    rows += [f"| {name} | {value:.4g} |" for name, value in metrics.items() if own and name.startswith(own)]
    if not rows:
        return []
    where = {
        "ppo": f"On {getattr(cfg.stage, 'eval_episodes', 0)} held-out seeds, with 95 % intervals (Wilson)",
        "merge": f"Against the adapter model, on first prompts of held-out seeds of {cfg.env.id}",
    }.get(cfg.stage.name, "On the training data, and on the rows held out (`val`)")
    return [f"\n## Results\n\n{where}:\n\n| | |\n|---|---|", *rows]


# ---- data ------------------------------------------------------------------------------------------------------------
def write_dataset_card(run: Run, sources: Iterable[str], rows: Mapping[str, int]) -> None:
    """The files by which others load the Parquet of a run as it is; `rows` by split, of which there are files, made of
    the episodes in `sources`."""
    configs = {"default": CHAT_COLUMNS, "trl": TRL_COLUMNS}
    front = {
        "configs": [
            {
                "config_name": name,
                "data_files": [{"split": split, "path": f"{split}.parquet"} for split in rows],
                "columns": list(columns),
            }
            for name, columns in configs.items()
        ],
        "task_categories": ["image-text-to-text"],
        "tags": ["vlm-agents"],
    }
    counted = ", ".join(f"{count} in `{split}`" for split, count in rows.items())
    lines = [
        f"# Chats about {run.env}\n",
        f"Chats with pictures, one a row, whose last message is to be learned: {counted}.\n",
        f"* **From** `{run.env}`, by `{portable_command(run.facts()['command'])}`",
        *(f"* **Played** {words}" for words in dict.fromkeys(played(Path(source)) for source in sources) if words),
        '* **datasets**: `load_dataset("<this folder>")` has `messages`, where `<image>` stands for a picture, '
        "`images`, and where the row is from.",
        '* **TRL**: `load_dataset("<this folder>", "trl")` has `prompt`, `completion` and `images`, which `SFTTrainer` '
        "takes; set `max_length=None`.",
        "* **LLaMA-Factory**: `dataset_dir: <this folder>`, `dataset: train` and `mask_history: true`; the rest is in "
        "`dataset_info.json`.",
    ]
    atomic_write(run.path(CARD), with_front(front, lines))
    tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant", "system")}
    columns = {"messages": "messages", "images": "images"}
    entry = {"formatting": "sharegpt", "columns": columns, "tags": tags}
    registry = {split: {"file_name": f"{split}.parquet", **entry} for split in rows}
    atomic_write(run.path("dataset_info.json"), json.dumps(registry, indent=2) + "\n")


def played(source: Path) -> str:
    """Who played the episodes of a stage=collect, and who rated them; empty for other sources."""
    said = told_by(source)
    policy, noise, rater = (said.get(f"stage.{name}") for name in ("policy", "noise", "rater"))
    if policy is None:
        return ""
    names = {
        "model": f"the model `{said.get('model.name')}`",
        "remote": f"`{said.get('stage.remote.model')}` on a server",
    }
    drawn = f", {noise:.0%} of the turns at random" if noise else ""
    rated = {"none": "rated by nobody", "remote": f"rated by `{said.get('stage.remote.model')}`"}
    return f"by {names.get(policy, f'the {policy} policy')}{drawn}; {rated.get(str(rater), f'rated by the {rater}')}"


def origin_of(data: Path) -> tuple[str, str | None]:
    """Of which env the rows of a stage=preprocess are, and in which prompt format, as far as it says."""
    env, form = data.name, None
    try:
        env = json.loads((data / "summary.json").read_text(encoding="utf-8"))["env"] or env
        form = flat_settings(data / "config.yaml", "").get("prompt.format")
    except (OSError, ValueError, KeyError, TypeError, DataError):  # a Parquet of somebody else, or a copy of ours
        pass
    return env, form


# ---- their form ------------------------------------------------------------------------------------------------------
def with_front(front: Mapping[str, Any], lines: list[str]) -> str:
    body = "\n".join(lines)
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False)}---\n{body}\n"


def read_front(folder: Path) -> dict[str, str]:
    """What a card in `folder` says that one of the weights trained further has to say too; {} where there is none."""
    try:
        found = FRONT_MATTER.match((folder / CARD).read_text(encoding="utf-8"))
        front = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's
        return {}
    return {key: front[key] for key in INHERITED if isinstance(front, dict) and isinstance(front.get(key), str)}


def portable_command(command: str) -> str:
    """A command without what is this machine's: settings that change nothing in what a run does, and absolute paths."""
    words = [word for word in shlex.split(command) if not belongs_here(word.lstrip("+~").split("=")[0])]
    return shlex.join(ABSOLUTE.sub(lambda path: portable(path[0]), word) for word in words)


def belongs_here(key: str) -> bool:
    return bool({key, key.split(".")[0]} & {"hydra", *may_change()})


def portable(path: str) -> str:
    """A path as seen from the working directory, or its last two parts where it lies outside of that."""
    if not Path(path).is_absolute():
        return path
    here = Path.cwd()
    inside = Path(path).is_relative_to(here)
    return str(Path(path).relative_to(here)) if inside else str(Path(*Path(path).parts[1:][-2:]))
