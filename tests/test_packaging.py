"""What pyproject says of the package: each dependency is used, and each import is one."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import vlm_agents

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "hydra-core": "hydra"}  # where it isn't the name
# Nothing imports these: others do on our behalf, or a setting names them.
CALLED = {
    "accelerate": "transformers' Trainer, in stages/sft.py",
    "bitsandbytes": "transformers and peft, for model.quantize",
}


ELSEWHERE = "thor_child.py"  # runs in an interpreter of its own, and says what that lacks


def imported(folder: str) -> set[str]:
    """The packages that the code in a folder imports, wherever in a file, beside Python's own and this one."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        if path.name == ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"vlm_agents", "hydra_plugins"}


def modules(requirements: list[str]) -> set[str]:
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in requirements]
    return {MODULES.get(name, name if name in CALLED else name.replace("-", "_")) for name in names}


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    optional = {"tensorboardX", "wandb", "math_verify"}  # tracking=tensorboard, tracking=wandb, and equal formulas
    assert imported("src") | set(CALLED) == modules(PROJECT["dependencies"]) | optional
    assert optional <= modules([*EXTRAS["tensorboard"], *EXTRAS["wandb"], *EXTRAS["math"]])
    assert not imported("src") & set(CALLED)


def test_what_the_tests_import_is_required_too():
    local = {path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert set(EXTRAS) == {
        "alfworld",
        "dev",
        "math",
        "sandbox",
        "serve",
        "tensorboard",
        "wandb",
    }  # none that nothing uses
    required = [requirement for extra in EXTRAS.values() for requirement in extra]
    assert imported("tests") - local <= modules([*PROJECT["dependencies"], *required])


def test_the_package_says_that_it_is_typed():
    assert (Path(vlm_agents.__file__).parent / "py.typed").is_file()
