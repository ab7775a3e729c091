"""The YAML groups of `conf/`: where they lie, and which there are."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from vlm_agents.errors import ConfigError


def conf_dir() -> Path:
    """The folder of the YAML groups: beside `src/` in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parents[1] / "conf", package / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(f"no conf/config.yaml beside {package}: reinstall vlm_agents")


def command(words: Iterable[str]) -> str:
    """What a person types in order to run these words, as a shell reads it."""
    return shlex.join(["python", "-m", "vlm_agents", *words])


def groups() -> dict[str, list[str]]:
    """Every group of conf/ and its options. An experiment's option is `<experiment>/<stage>`."""
    found: dict[str, list[str]] = {}
    for path in sorted(conf_dir().rglob("*.yaml")):
        place = path.relative_to(conf_dir())
        group = "experiment" if place.parts[0] == "experiment" else place.parent.as_posix()
        if group not in (".", "local"):
            found.setdefault(group, []).append(place.relative_to(group).with_suffix("").as_posix())
    return found


def described(group: str, option: str) -> str:
    """What an option is: the first comment of its file; empty for one that doesn't lie in conf/."""
    path = conf_dir() / group / f"{option}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.lstrip("# ") for line in lines if line.startswith("# ") and "@package" not in line), "")
