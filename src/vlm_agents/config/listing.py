"""The settings of a composed run as a person reads them: name, value, meaning, what is allowed."""

from collections.abc import Iterator, Mapping
from textwrap import fill
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from vlm_agents.config.conf import described, groups
from vlm_agents.config.fields import Part, Setting, dotted, settings_of

COLUMN = 36  # where meanings begin


class Entry(NamedTuple):
    name: str
    value: Any  # plain; "???" where one must be given
    rules: Setting


def entries(cfg: DictConfig) -> Iterator[Entry]:
    """Every setting of a part and of the parts in it; a part that is off is an entry itself, of value None."""
    part = OmegaConf.get_type(cfg)
    assert part is not None
    assert issubclass(part, Part)
    for key, (_, rules) in settings_of(part).items():
        value = "???" if OmegaConf.is_missing(cfg, key) else cfg[key]
        if isinstance(value, DictConfig) and issubclass(OmegaConf.get_type(value) or dict, Part):
            yield from entries(value)
        else:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            yield Entry(dotted(part, key), plain, rules)


def listing(cfg: DictConfig, chosen: Mapping[str, str], width: int) -> str:
    """Every setting of the run, by its parts. `chosen`: each group's option, as Hydra has it."""
    options = groups()
    blocks: dict[str, list[str]] = {}
    for entry in entries(cfg):
        group = entry.name.split(".")[0]
        blocks.setdefault(group if group in options else "", []).append(line(entry, width))
    text = []
    for group, lines in blocks.items():
        option = chosen.get(group) or ""
        about = described(group, option) if option else "off"
        title = f"{group}={option or 'null'}: {about}" if group else "the run"
        others = [other for other in options.get(group, []) if other != option]
        head = [title, f"  or {', '.join(others)}"] if others else [title]
        text.append("\n".join([*(fill(words, width, subsequent_indent="  ") for words in head), *lines]))
    return "\n\n".join(text)


def line(entry: Entry, width: int) -> str:
    """One setting: `name=value`, then its meaning from a column on, and what is allowed."""
    left = f"  {entry.name}={shown(entry.value)}"
    allowed = f" ({entry.rules.allowed})" if entry.rules.allowed else ""
    off = f"; off here: {entry.rules.bring_in}" if entry.rules.bring_in else ""
    indent = " " * COLUMN
    right = fill(entry.rules.help + off + allowed, width, initial_indent=indent, subsequent_indent=indent)
    return f"{left:<{COLUMN}}{right.lstrip()}" if len(left) < COLUMN - 1 else f"{left}\n{right}"


def shown(value: Any, limit: int = 40) -> str:
    """A value as it is given on the command line; of long settings within settings the beginning."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).removesuffix("\n...\n")
    text = text.strip()
    return f"{text[:limit]} ...}}" if isinstance(value, dict) and len(text) > limit else text
