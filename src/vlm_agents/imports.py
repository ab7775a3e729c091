"""What an import path names: `package.module:attribute`, as a user writes it in a setting.

Foreign code is imported here and called here, so that what is wrong with it is one line that names the setting.
"""

import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from vlm_agents.errors import ConfigError, TrainingError, VlmAgentsError, did_you_mean, harmless


def module(setting: str, name: str) -> ModuleType:
    """The module of this name, of the working directory too; ConfigError, which names the `setting`, where none is."""
    here = str(Path.cwd())
    if here not in (Path(entry or here).absolute().as_posix() for entry in sys.path):
        sys.path.append(here)  # `vlm-agents`, unlike `python -m`, doesn't look there
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{setting}: there is no module {error.name} in {', '.join(searched(here))}: start where it lies (the "
                "first of these is the working directory), put its folder into PYTHONPATH, or install it"
            ) from error
        raise ConfigError(f"{setting}: {name} imports {error.name}, which isn't installed") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{setting}: importing {name} fails: {told(error)}") from error


def attribute(setting: str, path: str) -> Any:
    """What `path`, the value of `setting`, names; ConfigError where that is nothing."""
    name, colon, words = path.partition(":")
    if not (name and colon and words):
        raise ConfigError(f"{setting}={path}: write package.module:attribute, as in my_package.my_module:make")
    found: Any = module(f"{setting}={path}", name)
    for word in words.split("."):
        if not hasattr(found, word):
            known = [other for other in vars(found) if not other.startswith("_")]
            raise ConfigError(f"{setting}={path}: {name} has no {word}.{did_you_mean(word, known)}")
        found = getattr(found, word)
    return found


def made(setting: str, path: str, *arguments: Any, needs: tuple[str, ...] = (), **named: Any) -> Any:
    """What comes of calling it; ConfigError where it can't be called so, or gives what lacks one of `needs`."""
    factory = attribute(setting, path)
    if not callable(factory):
        raise ConfigError(f"{setting}={path} is a {type(factory).__name__}, and nothing that can be called")
    call = f"({', '.join([*map(named_type, arguments), *(f'{name}={value!r}' for name, value in named.items())])})"
    check_call(f"{setting}={path}", factory, call, *arguments, **named)
    try:
        found = factory(*arguments, **named)
    except VlmAgentsError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{setting}={path}: calling it with {call} fails: {told(error)}") from error
    if lacking := [name for name in needs if not hasattr(found, name)]:
        lacks = ", ".join(lacking)
        raise ConfigError(f"{setting}={path}: it gives {named_type(found)} without {lacks}: see docs/extending.md")
    return found


@contextmanager
def blamed(setting: str, path: str | None) -> Iterator[None]:
    """Turns an error of the block, which runs what `path`, the value of `setting`, gave, into a TrainingError in one
    line. Where `path` is null it is ours, and stays what it is."""
    try:
        yield
    except (VlmAgentsError, MemoryError):
        raise
    except Exception as error:
        if path is None or type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        raise TrainingError(
            f"{setting}={path}: training with what it gives fails: {told(error)}. See docs/extending.md"
        ) from error


def check_call(what: str, factory: Callable[..., Any], call: str, *arguments: Any, **named: Any) -> None:
    """ConfigError where the signature of `factory` doesn't take these arguments, which `call` shows."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of something written in C
        return
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        raise ConfigError(f"{what} takes {signature}, and is called with {call}: {error}") from error


def named_type(value: object) -> str:
    return f"a {type(value).__name__}"


def searched(here: str) -> list[str]:
    """Where modules are looked for, without Python's own library: the working directory first."""
    own = {sysconfig.get_path("stdlib"), str(Path(sysconfig.get_path("stdlib")) / "lib-dynload")}
    entries = [str(Path(entry or here).absolute()) for entry in sys.path]
    return list(dict.fromkeys([here, *(entry for entry in entries if entry not in own and Path(entry).is_dir())]))


def told(error: BaseException) -> str:
    """An error of foreign code in one line, with its place in the user's own files if it came through one."""
    if isinstance(error, VlmAgentsError):
        return harmless(str(error))
    return harmless(": ".join(filter(None, (type(error).__name__, str(error)))) + place(error))


def place(error: BaseException) -> str:
    """` (own_env.py, line 12)`: the innermost line of a file that is neither ours nor installed; empty: none is."""
    installed = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in lines if Path(file).is_file() and not file.startswith(installed)]
    return f" ({os.path.relpath(own[-1][0])}, line {own[-1][1]})" if own else ""
