"""The documentation is true where a test can tell: links resolve, commands compose, settings and files exist."""

import re
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import scaling_model
import tiny_weights
from hydra import initialize_config_dir

from vlm_agents.chain import checked, planned
from vlm_agents.command_line import answer
from vlm_agents.config import conf_dir, groups, register
from vlm_agents.config.fields import Part, dotted, settings_of
from vlm_agents.errors import ConfigError
from vlm_agents.hydra_errors import check_flags, first_of_sweep, is_override

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
WHAT_WAS = ROOT / "CHANGELOG.md"  # names settings that are gone

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
PROGRAM = "python -m vlm_agents"
BLANK = re.compile(r"<[^<>]*>|\.\.\.")  # what a reader fills in
FOLDER = re.compile(r"(?:-cd|--config-dir)[ =](\S+)")


def prose(page: Path) -> str:
    """Without fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def fenced(page: Path) -> str:
    """The fenced blocks, continued lines joined."""
    return "\n".join(FENCE.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")


def spans(page: Path) -> list[str]:
    """What stands in the page as inline code, which may go on in the next line."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(page))]


# ---- links -----------------------------------------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    words = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\- ]", "", word.strip().lower()).replace(" ", "-") for word in words}


def broken(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(SPAN.sub("", prose(page))):
        if re.match(r"[a-z]+:", target):  # the web's
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_resolves(page: Path) -> None:
    assert broken(page) == []


def test_a_wrong_link_or_anchor_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# How `it` works\n[a](#how-it-works) [b](#how) [c](no.md) [d](https://no.where)\n```\n[e](no)\n```\n"
    )
    assert broken(page) == ["#how", "no.md"]


# ---- commands --------------------------------------------------------------------------------------------------------
def commands(page: Path) -> Iterator[str]:
    """What follows `python -m vlm_agents` wherever the page has it, in fenced blocks and as inline code."""
    for line in (*fenced(page).splitlines(), *spans(page)):
        for command in re.findall(rf"(?:^|[\s&;(]){PROGRAM}(?= |$)(.*)", line):
            if command.strip():  # alone it is the program's name
                yield command.strip()


def compose(command: str) -> None:
    """As the command line itself would, up to the run's beginning; ConfigError where it can't.

    What a reader fills in, `<...>` or `...`, stands for 1 as a value, and is left out as a word of its own. Of a sweep
    the first job is composed. A folder of groups that isn't in this repository is the reader's, and what it needs isn't
    known here; what prints and composes nothing isn't either.
    """
    register()
    folders = FOLDER.findall(command)
    words = shlex.split(BLANK.sub("1", command), comments=True)
    if any(not (ROOT / folder).is_dir() for folder in folders) or answer(words) is not None:
        return
    words = [word for word in words if word not in ("1", "--help", "-m", "--multirun")]
    check_flags(words)
    overrides = [first_of_sweep(word) or word for word in words if is_override(word) and not word.startswith("name=")]
    if words[:1] == ["run"]:
        names = [word for word in words[1:] if not is_override(word)]
        for stage in planned(names, overrides, "name").values():
            if (
                len(stage) > 2
            ):  # with its name alone it is an option or an experiment, which tests/test_conf.py composes
                compose_stage(frozenset(stage))
    else:
        own = [f"hydra.searchpath=[{ROOT / folder}]" for folder in folders]
        compose_stage(frozenset([*own, *overrides, "name=name"]))


@cache
def compose_stage(overrides: frozenset[str]) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        checked(sorted(overrides))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_composes(page: Path) -> None:
    for command in commands(page):
        try:
            compose(command)
        except ConfigError as error:
            pytest.fail(f"{page.name}: {PROGRAM} {command}: {error}")


@pytest.mark.parametrize(
    ("command", "good"),
    [
        ("stage=ppo env=minigrid", True),
        ("run name=mine env.id=... sft.stage.epochs=3  # and so on", True),
        ("-m stage=ppo algo.lr=1e-4,3e-4 stage.init=<run of stage=sft>", True),
        ("--version", True),
        ("stage=ppo env=minigird", False),
        ("stage=ppo stage.episdoes=3 --help", False),
        ("stage=ppo stage.episodes=0", False),
        ("run number_line stage.freeze_vision=true", False),
        ("stage=ppo --cgf job", False),
    ],
)
def test_a_wrong_command_is_found(command: str, good: bool) -> None:
    with nullcontext() if good else pytest.raises(ConfigError):
        compose(command)


def test_commands_are_found_wherever_they_stand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"`{PROGRAM} a=1\nb=2` and `{PROGRAM}.config`\n```\ncd x && {PROGRAM} c=3 \\\n    d=4\n```\n")
    assert [command.split() for command in commands(page)] == [["c=3", "d=4"], ["a=1", "b=2"]]


# ---- settings, options, files and targets ----------------------------------------------------------------------------
PARTS = "env|prompt|model|hardware|tracking|stage|algo"
SETTING = re.compile(rf"(?<![\w./-])((?:{PARTS})(?:\.[a-z_]+)+)(?:(?==)|$)")
OPTION = re.compile(r"(?<![\w./-])([a-z_/]+)=([\w/]+)(?![\w/<.]|,\w)")
PATH = re.compile(r"[\w./-]+/[\w.-]+\.(?:py|md|yaml|js|html|png|json)")
OTHERS = {"env.unwrapped.words"}  # Python's


def settings() -> set[str]:
    """Every setting of every part that a run can have, and the parts themselves."""
    kinds, known = [Part], set()
    for kind in kinds:  # grows while it is gone through
        kinds += kind.__subclasses__()
        known |= {dotted(kind, name) for name in settings_of(kind)} if kind is not Part else set()
    return known


@pytest.mark.parametrize("page", [page for page in PAGES if page != WHAT_WAS], ids=lambda page: page.name)
def test_every_setting_and_option_exists(page: Path) -> None:
    known, options = settings() | OTHERS, groups()
    for span in spans(page):
        said = {name for name in SETTING.findall(span) if not name.startswith("hardware.deepspeed.")}  # DeepSpeed's own
        assert said <= known, span
        for group, option in OPTION.findall(span):
            if group in options and option.split("/")[0] not in ("mine", "null"):  # mine: the reader's own
                assert option in options[group], span


def test_every_step_of_the_tiny_weights_takes_what_an_earlier_one_made() -> None:
    """And has settings and options that exist."""
    known, options = settings(), groups()
    made = {tiny_weights.SKELETON}
    for command in tiny_weights.commands():
        words = {key: value for key, _, value in (word.partition("=") for word in command.split())}
        assert set(SETTING.findall(command)) <= known
        assert all(option in options[group] for group, option in words.items() if group in options)
        if "stage" in words:
            assert set(re.findall(r"outputs/[\w/-]+", command)) <= made
            made.add(f"outputs/{words['name']}/{words['stage']}")
    assert len(made) == 1 + 16 + 4 + 5  # the skeleton, then collect, preprocess and sft


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_and_target_exists(page: Path) -> None:
    """Files of the repository, those of the package also by their places in it; targets of `make`."""
    roots = [ROOT, ROOT / "src/vlm_agents", ROOT / "conf"]
    folders = {path.name for root in roots for path in root.iterdir() if path.is_dir()} - {"local", "outputs"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for code in (*spans(page), *fenced(page).splitlines()):
        for path in PATH.findall(code):
            if path.split("/")[0] in folders and "conf/local/" not in path:
                assert any((root / path).exists() for root in roots), code
        for target in re.findall(r"(?:^|[\s(])make ([a-z-]+)", code):
            assert target in targets, code


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_path_of_one_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:tmp|work|root|home)\b.*", page.read_text(encoding="utf-8")) == []


# ---- the map ---------------------------------------------------------------------------------------------------------
def test_the_layers_of_the_architecture_are_those_of_the_test() -> None:
    """Its table has every part of the package, in the rows and cells of tests/test_layers.py."""
    layers = re.search(r'LAYERS = """\n(.*?)"""', (ROOT / "tests/test_layers.py").read_text(), re.DOTALL)
    table = (ROOT / "docs/architecture.md").read_text().partition("| layer | parts |\n")[2].partition("\n\n")[0]
    assert layers
    package = {path.stem for path in (ROOT / "src/vlm_agents").iterdir() if path.is_dir() or path.suffix == ".py"}
    held, shown = (
        [[set(re.findall(r"\w+", cell)) & package for cell in re.split(r"(?<= )\\?\|(?= )", row)] for row in rows]
        for rows in (layers[1].splitlines(), [row.split("|", 2)[2][:-1] for row in table.splitlines()[1:]])
    )
    assert [[cell for cell in row if cell] for row in shown] == [[cell for cell in row if cell] for row in held]


@pytest.mark.parametrize("title", ["## Nouns", "## One iteration of stage=ppo"])
def test_what_the_architecture_names_exists(title: str) -> None:
    """Functions and classes in the first two columns of its tables; a method is sought by its name alone."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    defined = set(re.findall(r"^ *(?:def|class) (\w+)", source, re.MULTILINE))
    section = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition(title)[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("|")]
    columns = 1 if title == "## Nouns" else 2
    named = {name for row in rows for name in SPAN.findall(" ".join(row[:columns])) if "/" not in name}
    assert len(named) > 10
    assert {name.split(".")[-1] for name in named} <= defined


def test_the_model_of_many_gpus_is_the_current_one() -> None:
    """`python benchmarks/scaling_model.py` prints it."""
    assert "\n".join(scaling_model.table()) in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_the_model_of_many_gpus_adds_up() -> None:
    """7B with an adapter: rank 16 on 28 layers, 40,370,176 parameters as doctor counts them. On 8 GPUs with zero=2:
    32 x 16 turns of 500 tokens are 62.5 backward passes of 4096; each sums 2 bytes of each of them, sent twice, and 8
    steps gather them once: (62.5 x 4 + 8 x 2) x 40,370,176 x 7/8 bytes."""
    model = scaling_model.MODELS[1]
    assert model.lora == 40_370_176
    one = scaling_model.iteration(model, True, 2, 8)
    assert one.moved == pytest.approx((62.5 * 4 + 8 * 2) * 40_370_176 * 7 / 8)
    assert one.decode == pytest.approx(16 * 100 * (28 * 923e-6 + 3544e-6))  # launches, not the 15 GB that are read
    assert one.episodes == 8 * 512 * 87_264 / 2e9
