"""Where weights lie: a run directory, an HF folder, the hub. Looks at files and loads none, without torch."""

import json
import math
import os
import threading
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open

from vlm_agents.config import ModelConfig
from vlm_agents.errors import ConfigError, ModelError
from vlm_agents.models.adapters import BASE_FILE, SHIPPED, named_base
from vlm_agents.progress import say
from vlm_agents.weights import ADAPTER_FILE, RUN_MODEL, init_folder

TINY = SHIPPED
WHOLE = "Set model.path or stage.init to a whole HF folder"
CONFIG_FILE = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
HUB_WAIT_S = 5.0  # for the hub's first answer
OFFLINE = "HF_HUB_OFFLINE is set"


def adapter_folder(init: str) -> Path:
    """The folder of the adapter that `init` names; ConfigError where that has whole weights."""
    source = init_folder(init)
    if not (source / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"stage.init={init} holds whole weights and no adapter, so there is nothing to merge: {source} is a "
            "plain HF folder already. Name the run of stage=sft or stage=ppo that had model/lora=adapter"
        )
    return source


def is_hub_id(source: str) -> bool:
    """Whether `source` may be one: they have one slash at most."""
    return not Path(source).is_absolute() and source.count("/") <= 1


def source_of(cfg: ModelConfig) -> str | None:
    """The folder or hub id that the model of `cfg` itself is read from; None: dimensions alone make it."""
    return None if cfg.weights == "random" and cfg.architecture is not None else cfg.path or str(TINY)


def base_of(folder: Path, cfg: ModelConfig) -> Path | None:
    """The folder of weights that the adapter in `folder` was trained on; None where that is the model of `cfg`.

    Where both are named the adapter knows better. ModelError where neither is to be had.
    """
    named = named_base(folder)
    shipped = cfg.path is None and named == str(TINY)
    if not named or shipped or (cfg.path and place(named) == place(cfg.path)):
        return None
    if Path(named).is_dir():
        return Path(named)
    if cfg.path is not None and (folder / BASE_FILE).is_file():
        return None  # a copy elsewhere: whether it is one, the adapter itself will tell
    trained = f"the adapter in {folder} was trained on {named}"
    moved = f"where it has moved, write its place into {ADAPTER_FILE} as base_model_name_or_path"
    if cfg.path is not None:
        raise ModelError(f"{trained}, and model.path is {cfg.path}: set model.path={named}, or {moved}")
    if is_hub_id(named):
        raise ModelError(f"{trained}: set model.path={named} if that is a hub id, or to where that folder lies now")
    raise ModelError(f"{trained}, which isn't there: put it back, or {moved}")


def place(source: str) -> str:
    """One name for one folder; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def config_of(source: str) -> dict[str, Any]:
    """What the config.json of a folder, or of a hub id in the cache, says; nothing where there is none to be read."""
    path = Path(source) / CONFIG_FILE
    if not path.is_file() and not (path := Path(_cached(source, CONFIG_FILE) or path)).is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it says what is wrong
        return {}
    return said if isinstance(said, dict) else {}


def parameters_of(source: str) -> int:
    """How many numbers the safetensors of a folder, or of a hub id in the cache, hold; 0 where there are none."""
    cached = next(filter(None, (_cached(source, name) for name in WEIGHTS)), None)
    folder = Path(cached).parent if cached and not Path(source).is_dir() else Path(source)
    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "np") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):  # whoever loads it says what is wrong
            continue
    return count


def check_source(source: str, weights: bool = True) -> None:
    """ModelError where `source` is no folder of a model, with its `weights` if wanted, and no hub id that can be had.

    Where the hub can't be reached and its cache has the model, this process stays offline from here on.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / CONFIG_FILE).is_file():
            if weights and not any(folder.glob("*.safetensors")):
                raise ModelError(
                    f"model {source} can't be loaded: {folder / WEIGHTS[0]} is missing. Save it as safetensors; a .bin "
                    "isn't read"
                )
            return
        if (folder / ADAPTER_FILE).is_file() or (folder / RUN_MODEL).is_dir():
            raise ModelError(f"{source} is a run or an adapter, and model.path takes a model: set stage.init={source}")
        raise ModelError(f"model {source} can't be loaded: the folder has no {CONFIG_FILE}. {WHOLE}")
    if not is_hub_id(source):
        raise ModelError(f"model {source} can't be loaded: there is no such folder. {WHOLE}")
    if not (trouble := _trouble_with_hub(source)):
        return
    problem, fix = trouble
    names = WEIGHTS if weights else (CONFIG_FILE,)
    if not any(_cached(source, name) for name in names):
        raise ModelError(
            f"model {source} can't be loaded: no such folder, not in the hub's cache, and {problem}. {fix}"
        )
    if problem != OFFLINE:
        say(f"{problem}: taking the copy of {source} in its cache")
    _stay_offline()


def _cached(source: str, name: str) -> str | None:
    if not is_hub_id(source):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(source, name)
    except HFValidationError:
        return None
    return path if isinstance(path, str) else None


def _stay_offline() -> None:
    """Else each file of the model waits for the hub anew."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # of child processes
    constants.HF_HUB_OFFLINE = True


@lru_cache
def _trouble_with_hub(source: str) -> tuple[str, str] | None:
    """Why a model can't be had from the hub now, and what to do; None if it can. It is asked for a few seconds."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    fetch = (
        f"Fetch it where the hub can be reached (hf download {source} --local-dir FOLDER), and set model.path=FOLDER"
    )
    if constants.is_offline_mode():
        return OFFLINE, f"{fetch}, or unset that"
    answers: list[Exception | None] = []
    asking = threading.Thread(target=lambda: answers.append(_ask_hub(source)), daemon=True)
    asking.start()
    asking.join(2 * HUB_WAIT_S)  # longer than the wait for a server: looking for its address has no limit of its own
    hub = constants.ENDPOINT
    match answers[0] if answers else TimeoutError("no answer"):
        case None:
            return None
        case GatedRepoError():
            return f"{hub} asks for a login", f"Ask for access at {hub}/{source}, then give: hf auth login"
        case HFValidationError():
            return "a hub id has letters, digits and . _ - only", WHOLE
        case RepositoryNotFoundError():
            return f"{hub} has none under this id", "Check it; a private one needs a login: hf auth login"
        case RemoteEntryNotFoundError():
            return f"that of {hub} has no {CONFIG_FILE}", WHOLE
        case error:
            reason = shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
            mirror = "or name a mirror in HF_ENDPOINT, or a proxy in HTTPS_PROXY"
            return f"{hub} can't be reached ({reason})", f"{fetch}; {mirror}"


def _ask_hub(source: str) -> Exception | None:
    """What comes of asking for the model's config.json; None if it is there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(source, CONFIG_FILE), timeout=HUB_WAIT_S)
    except Exception as error:  # noqa: BLE001 (whatever a network or a library does, it is told in one line)
        return error
    return None
