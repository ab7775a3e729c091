"""Write the tables of docs/configuration.md from the schema: `python -m vlm_agents.config docs/configuration.md`.

What stands above the mark is written by hand, and stays.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml

from vlm_agents.config.conf import conf_dir, described, groups
from vlm_agents.config.fields import Part, Setting, dotted, settings_of
from vlm_agents.config.listing import shown
from vlm_agents.config.run import SCHEMAS, RunConfig
from vlm_agents.files import atomic_write

MARK = "<!-- From here on written by `python -m vlm_agents.config docs/configuration.md`. -->\n"
CHOSEN = ("family", "format", "name")  # what a group's option is called inside the group


class Row(NamedTuple):
    name: str
    default: Any
    rules: Setting


def part_in(hint: Any) -> type[Part] | None:
    """The part that a field of this type holds, if it is one: `LoraConfig` of `LoraConfig | None`."""
    return next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Part)), None)


def rows(part: type[Part]) -> Iterator[Row]:
    """The settings of a part and of the parts in it, which may be off."""
    hints = get_type_hints(part)
    for name, (one, rules) in settings_of(part).items():
        inside = part_in(hints[name])
        if inside is None or rules.bring_in:
            made = None if one.default_factory is MISSING else one.default_factory()
            yield Row(dotted(part, name), made if one.default is MISSING else one.default, rules)
        if inside is not None:
            yield from rows(inside)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    heads = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *cells])


def described_rows(some: Iterable[Row]) -> str:
    def default(row: Row) -> str:
        return "must be given" if row.default == "???" else f"`{shown(row.default)}`"

    def meaning(row: Row) -> str:
        return row.rules.help + (f"; {row.rules.bring_in}" if row.rules.bring_in else "")

    head = ("setting", "default", "allowed", "meaning")
    return table(head, ([f"`{row.name}`", default(row), row.rules.allowed, meaning(row)] for row in some))


def option_rows(group: str, option: str) -> list[Row]:
    """The settings of a group as one of its options has them."""
    said: Mapping[str, Any] = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8"))
    schema = next(str(one) for one in said["defaults"] if str(one).startswith("/schema/"))
    part = SCHEMAS[schema.removeprefix("/schema/").removesuffix("@_here_")]
    return [row._replace(default=said.get(row.name.partition(".")[2], row.default)) for row in rows(part)]


def section(group: str, base: type[Part], rules: Setting) -> Iterator[str]:
    """A group: its options, the settings that all of them have, and those that one of them has alone."""
    hidden = {f"{group}.{name}" for name in CHOSEN}
    common = {row.name: row for row in rows(base) if row.name not in hidden}
    own, lines = [], []
    for option in groups()[group]:
        found = [row for row in option_rows(group, option) if row.name not in hidden]
        other = [row for row in found if row.name in common and row.default != common[row.name].default]
        lines.append(
            [f"`{option}`", described(group, option), ", ".join(f"`{r.name}={shown(r.default)}`" for r in other)]
        )
        if alone := [row for row in found if row.name not in common]:
            own.append(f"### {group}={option}\n\n{described_rows(alone)}")
    yield f"## {group}: {rules.help}"
    yield table([f"{group}=", "what it is", "sets"], lines)
    if common:
        yield described_rows(common.values())
    yield from own


def page() -> str:
    """All settings, by group and option, as Markdown."""
    hints = get_type_hints(RunConfig)
    plain = [row for row in rows(RunConfig) if "." not in row.name and row.name not in groups()]
    said: Mapping[str, Any] = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    parts = ["## The run", described_rows(row._replace(default=said.get(row.name, row.default)) for row in plain)]
    for group, (_, rules) in settings_of(RunConfig).items():
        if base := part_in(hints[group]):
            parts += section(group, base, rules)
    parts.append("## Ready-made")
    others = [group for group in groups() if group.split("/")[0] not in hints]
    lines = [[f"`{group}={name}`", described(group, name)] for group in others for name in groups()[group]]
    return "\n\n".join([*parts, table(["option", "what it does"], lines)]) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    by_hand = path.read_text(encoding="utf-8").partition(MARK)[0]
    atomic_write(path, f"{by_hand}{MARK}\n{page()}")
