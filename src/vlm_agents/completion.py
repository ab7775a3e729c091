"""Completion of a command line in bash: groups, options, settings, and the values that a setting may take.

Hydra's own knows neither `python -m` nor experiments in folders, nor which values there are.
"""

import os
from collections.abc import Iterator, Sequence
from typing import get_args

from hydra import compose, initialize_config_dir

from vlm_agents.config import conf_dir, entries, groups, register
from vlm_agents.errors import ConfigError
from vlm_agents.hydra_errors import REFUSALS

# readline has a word begin after = and :, so that what stands before is taken off the answers.
SCRIPT = """\
_vlm_agents() {
    COMPREPLY=()
    local line=${COMP_LINE:0:COMP_POINT} ask=("${COMP_WORDS[0]/#\\~/$HOME}") IFS=$' \\n'
    case ${COMP_WORDS[0]} in
        *python*) [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == vlm_agents ]] || return; ask+=(-m vlm_agents) ;;
    esac
    local word=${line##* }
    COMPREPLY=($(COMP_LINE=$line "${ask[@]}" -sc query=bash 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[=:]}"}"}")
}
complete -o nospace -o default -F _vlm_agents vlm-agents python python3
"""
REMOVE = "complete -r vlm-agents python python3; unset -f _vlm_agents"


def answer(request: str) -> str:
    """What `-sc install=bash` prints for a shell to evaluate, and what that asks when somebody presses Tab."""
    match request:
        case "install=bash":
            return SCRIPT
        case "uninstall=bash":
            return REMOVE
        case "query=bash":
            return "\n".join(candidates(os.environ.get("COMP_LINE", "")))
    raise ConfigError(f'{request}: completion is for bash: eval "$(vlm-agents -sc install=bash)"')


def candidates(line: str) -> list[str]:
    """What may stand for the last word of `line`, which is a command up to the cursor: names, and after = values."""
    words = [word for word in line.split() if "=" in word]
    word = "" if line.endswith(" ") else line.split()[-1]
    before = words[:-1] if words and words[-1] == word else words
    return sorted(
        {offer for offer in offers(before) if offer.startswith(word) and offer.endswith("=") == ("=" not in word)}
    )


def offers(words: Sequence[str]) -> Iterator[str]:
    """Everything that a command of these overrides could go on with."""
    for group, options in groups().items():
        yield f"{group}="
        yield from (f"{group}={option}" for option in options)
    register()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", [*words, "name=_", "run_dir=_"])
        found = list(entries(cfg))
    except REFUSALS:
        return  # no stage yet, or something wrong with it: groups alone
    for entry in found:
        if not entry.rules.bring_in:
            yield f"{entry.name}="
        choices = ("true", "false") if isinstance(entry.value, bool) else get_args(entry.rules.choices)
        yield from (f"{entry.name}={choice}" for choice in choices)
