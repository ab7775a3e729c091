"""The settings file of a LoRA adapter: ours, or another tool's. What it may say, and how ours is written.

Not the adapter itself: that is `lora`, which needs peft.
"""

import json
from pathlib import Path
from typing import Any

from vlm_agents.config import LoraConfig
from vlm_agents.errors import ModelError
from vlm_agents.weights import ADAPTER_FILE

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "models" / "tiny_weights"
BASE_FILE = "base.json"  # beside an adapter of ours: what tells its base from other weights, as `fingerprint` has it
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LISTS = list | str | None
MEANT: dict[str, Any] = {  # what `lora` hands to peft, which then does with it as in training; and of what type it is
    "task_type": str | None,
    "r": int,
    "target_modules": LISTS,  # or a pattern
    "exclude_modules": LISTS,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "use_rslora": bool,
    "use_dora": bool,
    "layers_to_transform": list | int | None,
    "layers_pattern": LISTS,
    "rank_pattern": dict | None,
    "alpha_pattern": dict | None,
}
# Of the file, and of training; auto_mapping names a class for peft's AutoPeftModel, which nothing here uses.
UNUSED = {"peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "auto_mapping"}
BASE = {"base_model_name_or_path": str | None}
DRAWN = (True, False, "gaussian", "orthogonal")  # `init_lora_weights` that leave the base as it is


def refuse_no_adapter_weights(folder: Path) -> None:
    """ModelError where an adapter lacks its weights."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is missing: save the adapter as safetensors; a .bin isn't read")


def read_settings(folder: Path) -> dict[str, Any]:
    """What the adapter in `folder` says of itself; ModelError where it is none of LoRA."""
    path = folder / ADAPTER_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of the encoding
        raise ModelError(f"{path} is no JSON ({error}): put a whole copy of the adapter there") from error
    kind = saved.get("peft_type") if isinstance(saved, dict) else None
    if kind != "LORA" or not saved.keys() >= {"r", "lora_alpha"}:
        raise ModelError(f"{path} has peft_type={kind}: name an adapter with peft_type=LORA, r and lora_alpha")
    return saved


def refuse_full_training(folder: Path, lora: LoraConfig | None) -> None:
    """ModelError where there is an adapter in `folder`, and the model shall have none."""
    if lora is None:
        saved = read_settings(folder)
        raise ModelError(
            f"{folder} holds a LoRA adapter: add model/lora=adapter model.lora.rank={saved['r']} "
            f"model.lora.alpha={saved['lora_alpha']}"
        )


def adapter_settings(folder: Path) -> dict[str, Any]:
    """`read_settings`; ModelError too where that is more than plain LoRA.

    What peft can do and `lora` doesn't hand on is refused, before peft sees it: it would be dropped, or frozen.
    """
    path, saved = folder / ADAPTER_FILE, read_settings(folder)
    if wrong := sorted(
        key for key, kind in (MEANT | BASE).items() if key in saved and not isinstance(saved[key], kind)
    ):
        raise ModelError(f"{path} has {shown(saved, wrong)}, of another type: put a whole copy of the adapter there")
    if foreign := foreign_settings(saved):
        raise ModelError(
            f"{path} has {shown(saved, foreign)}, which isn't read "
            "here: merge the adapter into its base with the tool that made it, and set model.path to the merged folder"
        )
    return saved


def named_base(folder: Path) -> str:
    """The base that the adapter in `folder` names: its folder where that is found, as `tidy` names it, or what stands
    there, which may be a hub id; empty where none is named."""
    named = adapter_settings(folder).get("base_model_name_or_path") or ""
    if not named:
        return ""
    for root in (*folder.resolve().parents, Path.cwd()):  # its own project first, for another has equal names
        if (root / named).is_dir():
            return str((root / named).resolve())
    return str(SHIPPED) if Path(named).parts[-2:] == SHIPPED.parts[-2:] else named  # another machine's package


def shown(saved: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={json.dumps(saved[key])[:60]}" for key in keys)


def foreign_settings(saved: dict[str, Any]) -> list[str]:
    """Keys beyond plain LoRA that are set to something else than peft's default."""
    from peft import LoraConfig  # it imports bitsandbytes: seconds that a run without an adapter saves

    off = LoraConfig().to_dict() | {"init_lora_weights": True}
    foreign = {key for key, value in saved.items() if key not in {*MEANT, *UNUSED} and value and value != off.get(key)}
    if saved.get("init_lora_weights", True) in DRAWN:
        foreign -= {"init_lora_weights"}
    return sorted(foreign)


def tidy(folder: Path) -> None:
    """Make what peft wrote into `folder`, and into the folders in it, the same in every process and from everywhere.

    Lists are sorted (peft has sets). The base is named by the package that ships it, or by its place in the working
    directory where the adapter lies there too; any other folder by its absolute path, without which nobody would find
    it. The card that peft writes names it as well, and goes.
    """
    here = Path.cwd()
    for path in folder.rglob(ADAPTER_FILE):
        saved = json.loads(path.read_text(encoding="utf-8"))
        for key, value in saved.items():
            if key in ("target_modules", "exclude_modules") and isinstance(value, list):
                saved[key] = sorted(value)
        base = saved.get("base_model_name_or_path")
        if base and Path(base).is_dir():
            place = Path(base).resolve()
            if place == SHIPPED:
                place = place.relative_to(PACKAGE.parent)
            elif place.is_relative_to(here) and folder.resolve().is_relative_to(here):
                place = place.relative_to(here)
            saved["base_model_name_or_path"] = place.as_posix()
        path.write_text(json.dumps(saved, indent=2, sort_keys=True))
        (path.parent / "README.md").unlink(missing_ok=True)
