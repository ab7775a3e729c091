"""What is wrong with a command line, in our words: where, what, and the line that mends it.

Flags are looked at before Hydra sees them; what Hydra or OmegaConf refuses is explained afterwards.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from vlm_agents.config import conf_dir, env_of_id, flat, groups, off_by_default
from vlm_agents.errors import ConfigError, did_you_mean

# What Hydra and OmegaConf raise for overrides that they can't compose.
REFUSALS = (HydraException, OmegaConfBaseException, AssertionError, AttributeError, ValueError, yaml.YAMLError)
# Each way of writing a flag, and what it takes. Hydra's --experimental-rerun is left out: it reads a pickle.
FLAGS = {
    **dict.fromkeys(("--help", "-h", "--version", "--hydra-help", "--debug", "--resolve", "--dry-run"), ""),
    **dict.fromkeys(("--multirun", "-m", "--run", "-r", "--shell-completion", "-sc"), ""),
    **dict.fromkeys(("--cfg", "-c"), "job, hydra or all"),
    **dict.fromkeys(("--info", "-i"), "[all, config, defaults, defaults-tree, plugins or searchpath]"),
    **dict.fromkeys(("--package", "-p"), "a part of the configuration, such as env"),
    **dict.fromkeys(("--config-dir", "-cd"), "a folder with groups of your own, beside those of conf/"),
    **dict.fromkeys(("--config-path", "-cp"), "a folder that stands for conf/, with a config.yaml"),
    **dict.fromkeys(("--config-name", "-cn"), "a file of conf/ that stands for config.yaml"),
}
FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")  # the first two are one flag, and so are the others
# What people write for an option, and what it is called here.
OTHER_WORDS = {
    "stage=train": "stage=sft trains on data, stage=ppo on the env's reward",
    "stage=rl": "write stage=ppo",
    "stage=test": "write stage=eval",
    "stage=evaluate": "write stage=eval",
    "stage=play": "write stage=eval, or stage=collect to keep the episodes as data",
    "hardware=cuda": "write hardware=gpu",
    "tracking=none": "write tracking=jsonl",
    "tracking=off": "write tracking=jsonl",
}

NO_STAGE = (
    "nothing says what to run. All stages: 'python -m vlm_agents run name=mine env.id=MiniGrid-Empty-8x8-v0'; one: "
    "'python -m vlm_agents stage=ppo env=minigrid', of stage=<{stages}>; --help lists more"
)

AMBIGUOUS = r"Ambiguous value for argument '(([^=]*)=(.*?))' 1\. .*"  # Hydra's words for key=a,b without -m


def is_override(word: str) -> bool:
    return ("=" in word and not word.startswith("-")) or word.startswith("~")


def first_of_sweep(word: str) -> str | None:
    """The override that the first job of a sweep over `word` has; None where it sweeps over nothing."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:  # told when it is composed
        return None
    if not override.is_sweep_override():
        return None
    listed = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)
    if override.value_type not in listed:  # glob() and interval() have no first one
        return word
    return f"{word.partition('=')[0]}={next(override.sweep_string_iterator())}"


def jobs_of(words: Sequence[str], params: Mapping[str, str]) -> int:
    """How many jobs a sweep has; `params` are those of its sweeper."""
    overrides = OverridesParser.create().parse_overrides([*(f"{key}={value}" for key, value in params.items()), *words])
    return sum(map(len, BasicSweeper.split_arguments(overrides, None)))


def check_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments, paths in them made absolute; ConfigError in one line for a flag where Hydra prints a page."""
    checked = list(arguments)
    if len([word for word in arguments if word.partition("=")[0] in FOLDERS[:2]]) > 1:
        raise ConfigError("--config-dir: one may be given; 'hydra.searchpath=[file://a,file://b]' takes several")
    for place, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if not flag.startswith("-"):
            continue
        if flag not in FLAGS:
            raise ConfigError(f"{flag}: no such flag.{did_you_mean(flag, FLAGS)} Settings are written key=value")
        takes = FLAGS[flag]
        if equals and not takes:
            raise ConfigError(f"{word}: {flag} takes no value")
        after = arguments[place + 1] if place + 1 < len(arguments) else ""
        beside = not equals and bool(after) and not after.startswith("-") and not is_override(after)
        value = after if beside else value
        words = re.findall(r"[a-z-]+", takes) if flag in ("--cfg", "-c", "--info", "-i") else [value]
        if takes and ((not value and takes[0] != "[") or (value and value not in words)):
            raise ConfigError(f"{word}{f' {after}' if beside else ''}: {flag} takes {takes.strip('[]')}")
        if flag in ("--config-name", "-cn") and "/" in value:
            raise ConfigError(f"{flag} {value}: an option of a group is chosen by {'='.join(value.rsplit('/', 1))}")
        if flag in FOLDERS and "://" not in value:
            folder = folder_of(flag, value)
            checked[place + beside] = str(folder) if beside else f"{flag}={folder}"
    return checked


def folder_of(flag: str, value: str) -> Path:
    """The folder that a flag names, as an absolute path."""
    folder = Path(value).absolute()
    if not folder.is_dir():
        raise ConfigError(f"{flag} {value}: no such folder; {flag} takes {FLAGS[flag]}")
    if "${" in value:
        raise ConfigError(f"{flag} {value}: Hydra would read a setting in it; give the folder another name")
    if flag in ("--config-path", "-cp") and not any(folder.glob("*.yaml")):
        raise ConfigError(f"{flag} {value}: there is no config.yaml in it; {flag} takes {FLAGS[flag]}")
    return folder


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """What Hydra or OmegaConf found wrong with the overrides."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(cause).split("\n    full_key", 1)[0].split("\nSee https", 1)[0].split())
    text = re.sub(AMBIGUOUS, r"""\1: -m runs each value; '\2=[\3]' is a list, and '\2="\3"' is one word""", text)
    match cause:
        case ConfigKeyError() | ConfigAttributeError():
            text = f"{cause.full_key}: no such setting.{suggestion(cause)}"
        case ValidationError():
            text = f"{cause.full_key}: {text.rstrip('.')}.{example(cause)}"
        case _ if "You must specify 'stage'" in text:
            text = NO_STAGE.format(stages="|".join(groups()["stage"]))
        case MissingMandatoryValue():
            part = str(cause.full_key).rpartition(".")[0]
            lacking = [str(key) for key in cause.parent_node if OmegaConf.is_missing(cause.parent_node, key)]
            names = [f"{part}.{key}".lstrip(".") for key in lacking]
            have = "have" if len(names) > 1 else "has"
            text = f"{', '.join(names)} {have} no value: give {' '.join(f'{name}=...' for name in names)}"
        case MissingConfigException():
            text = no_such_file(str(cause.missing_cfg_file), overrides)
        case OverrideParseException():
            text = f"{cause.override}: not of the form key=value ({text}){mended(str(cause.override))}"
        case InterpolationResolutionError():
            text = f"{text}: a value refers to it as ${{...}}, and there is no such setting"
        case ValueError():
            wrong = next((no_such_option(*pair) for pair in pairs(overrides) if is_no_option(*pair)), "")
            text = wrong or f"{' '.join(overrides)}: {text}. Write group=option"
        case _ if isinstance(error, AssertionError | AttributeError) or "No match in the defaults list" in text:
            text = below_nothing(overrides) or text
    return ConfigError(text)


def pairs(overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Setting and value of each override."""
    for word in overrides:
        setting, equals, value = word.lstrip("+").partition("=")
        if equals and not setting.startswith("-"):
            yield setting, value


def is_no_option(group: str, option: str) -> bool:
    return option not in groups().get(group, [option])


def no_such_file(missing: str, overrides: Sequence[str]) -> str:
    """A file of conf/ that Hydra doesn't find: an option, which may hold a slash itself, or the file above all."""
    group, option = next((pair for pair in pairs(overrides) if "/".join(pair) == missing), (None, ""))
    if group is None and missing.rpartition("/")[0] in groups():
        group, _, option = missing.rpartition("/")
    if group is not None:
        return no_such_option(group, option)
    return (
        f"no {missing.removesuffix('.yaml')}.yaml in {conf_dir()}, or where -cp or -cd say: leave -cn and -cp out. "
        "Facts of this machine go into conf/local/default.yaml, experiments of your own into a folder that -cd names"
    )


def no_such_option(group: str, option: str) -> str:
    options = groups().get(group, [])
    if group == "env" and re.search(r"-v\d+$|^(MiniGrid|BabyAI)-", option):
        family = env_of_id(option)
        return f"env={option} is the id of an env: write " + (f"env={family}" if family else f"env.id={option}")
    if group == "model" and ("/" in option or Path(option).is_dir()):
        run = f", or stage.init={option} if it is a run directory" if Path(option).exists() else ""
        return f"model={option} is a path or a hub's id: write model.path={option}{run}"
    if hint := OTHER_WORDS.get(f"{group}={option}"):
        return f"{group}={option}: no such option; {hint}. Options: {', '.join(options)}"
    if group == "hardware" and option.isdecimal():
        return f"hardware={option}: no such option; hardware.threads={option} sets threads. Options: cpu, gpu"
    below = [name for name in options if name.startswith(f"{option}/")]
    hint = "" if below else did_you_mean(option, options)
    return f"{group}={option}: no such option.{hint} Options: {', '.join(below or options) or 'none'}"


def suggestion(error: OmegaConfBaseException) -> str:
    """` Did you mean ...?` for an unknown key, else what there is at that place."""
    known = [str(key) for key in error.parent_node if key != "hydra"]
    path, key = str(error.full_key).rpartition(".")[0], str(error.key)
    if path and not known:  # any may be given, such as model.image_processor's
        return f" Write '{path}={{{key}: ...}}'"
    root = error.parent_node._get_root()
    tree = {str(name): node for name, node in root.items_ex(resolve=False) if name != "hydra"}
    elsewhere = [name for name, _ in flat(tree) if name.endswith(f".{key}") and name not in off_by_default()]
    if not path:
        elsewhere = [*(f"{group}=..." for group in groups() if group.endswith(f"/{key}")), *elsewhere]
    if elsewhere:
        return f" Did you mean {' or '.join(elsewhere)}?"
    if path:
        return did_you_mean(key, known).replace("'", f"'{path}.", 1) or f" There are: {', '.join(known)}"
    return did_you_mean(key, [*known, *groups()]) or f" There are: {', '.join(known)}"


def example(error: OmegaConfBaseException) -> str:
    """` For example key=value`, with the value that the setting has by default."""
    group = str(error.full_key).replace(".", "/")
    if group in groups():
        return f" Write {group}={groups()[group][0]}"
    value = OmegaConf.select(error.parent_node, str(error.key), throw_on_missing=False)
    if isinstance(value, ListConfig):
        return f" Write '{error.full_key}=[...]', with brackets"
    return "" if value is None else f" For example {error.full_key}={value}"


def mended(word: str) -> str:
    """`. Write ...` for a word that Hydra's grammar can't take apart."""
    setting, equals, value = word.partition("=")
    if not equals:
        found = [f"{group}={word}" for group, options in groups().items() if word in options]
        found += [f"{word}=<{'|'.join(groups()[word])}>"] if word in groups() else []
        found += [f"--{word}"] if f"--{word}" in FLAGS else []
        return f". Did you mean {' or '.join(found)}?" if found else ""
    if value[:1] in ("'", '"') and value.count(value[0]) % 2:
        return f". Its quotation mark isn't closed: {shlex.quote(f'{word}{value[0]}')}"
    for opening, closing in ("[]", "{}"):
        if value.count(opening) > value.count(closing):
            return f". Its {opening} isn't closed by a {closing}; values with blanks or brackets go in '...'"
    quote = "'" if '"' in value else '"'
    return (
        f". A value that isn't one word is quoted: {shlex.quote(f'{setting}={quote}{value}{quote}')}" if value else ""
    )


def below_nothing(overrides: Iterable[str]) -> str:
    """Names the override that reaches into a part that this run doesn't have; Hydra has only an assertion there."""
    for word in overrides:
        for part, fix in off_by_default().items():
            if word.lstrip("+~").startswith((f"{part}.", f"{part}=")):
                return f"{word}: this run has no '{part}'; {fix}"
    return ""
