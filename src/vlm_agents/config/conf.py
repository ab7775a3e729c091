"""The YAML groups of `conf/`: where they lie, and which there are."""

from pathlib import Path

from vlm_agents.errors import ConfigError


def conf_dir() -> Path:
    """The folder of the YAML groups: beside `src/` in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parents[1] / "conf", package / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(f"no conf/config.yaml beside {package}: reinstall vlm_agents")


def groups() -> dict[str, list[str]]:
    """Every group of conf/ and its options."""
    found: dict[str, list[str]] = {}
    for path in sorted(conf_dir().rglob("*.yaml")):
        group = path.parent.relative_to(conf_dir()).as_posix()
        if group not in (".", "local"):
            found.setdefault(group, []).append(path.stem)
    return found
