"""Imports go down only, and each big dependency stays behind its one door. Read from the source, lazy ones too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlm_agents

PACKAGE = Path(vlm_agents.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top down. A part may import what lies below it, and what shares its line and its bar-separated cell.
LAYERS = """
__main__
command_line chain completion hydra_errors | compare tables charts standings sweeps
worker
preflight launch
stages run
rollout | server
policies episodes outcomes summary llava_data env_pool report frames chats inputs rater referee vllm_sampler
envs experts | prompting | models | learn | tracking backends stores | checkpoints | remote endpoint answers handover
lineage weights snapshot
config tensors | processes
sandbox | verdicts blocks
types upgrades errors imports files marks pictures progress versions metrics cores seeds draws ratings intervals
world stopping stopwatch
"""
CELLS = [[cell.split() for cell in line.split("|")] for line in LAYERS.strip().splitlines()]

# A dependency, and the only files or folders that may import it.
DOORS = {
    "hydra": ["chain.py", "command_line.py", "completion.py", "hydra_errors.py", "config"],
    "omegaconf": ["chain.py", "command_line.py", "completion.py", "hydra_errors.py", "config"],
    "mlflow": ["backends.py", "stores.py"],
    "tensorboardX": ["backends.py"],
    "wandb": ["backends.py"],
    "deepspeed": ["learn/zero.py", "learn/zero_settings.py"],
    "transformers": ["models", "stages/sft.py"],
    "peft": ["models"],
    "bitsandbytes": ["models"],
    "datasets": [],  # others read what we write with it
    "pyarrow": ["chats.py", "envs/visual_search/parquet.py", "models/tiny.py"],
    "minigrid": ["envs", "experts"],
    "gymnasium": ["envs", "env_pool.py"],
    "httpx2": ["endpoint.py"],
    "huggingface_hub": ["models/sources.py"],
    "scipy": ["intervals.py"],
    "math_verify": ["verdicts.py"],
    "skimage": [],  # imported by name, inside of a sandbox
    "matplotlib": ["charts.py", "sandbox"],
}


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, under its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:  # `from vlm_agents import run` imports the module vlm_agents.run
                yield f"{node.module}.{alias.name}" if node.module == "vlm_agents" else node.module


def part_of(name: str) -> str:
    return name.split(".")[1]


def place(part: str) -> tuple[int, int]:
    for level, cells in enumerate(CELLS):
        for column, cell in enumerate(cells):
            if part in cell:
                return level, column
    raise AssertionError(f"'{part}' has no place in the layers: add it to tests/test_layers.py and to the design")


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_down_only(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert not list(imports(path))
        return
    own = relative(path).removesuffix(".py").split("/")[0]
    level, column = place(own)
    for name in imports(path):
        if name.startswith("vlm_agents."):
            other_level, other_column = place(part_of(name))
            assert other_level > level or (other_level, other_column) == (level, column), f"{own} imports {name}"


def test_every_place_is_taken() -> None:
    parts = {part for cells in CELLS for cell in cells for part in cell}
    assert parts == {relative(path).removesuffix(".py").split("/")[0] for path in MODULES} - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_each_dependency_has_its_door(path: Path) -> None:
    for name in imports(path):
        for door in [DOORS[name.split(".")[0]]] if name.split(".")[0] in DOORS else []:
            allowed = any(relative(path) == where or relative(path).startswith(f"{where}/") for where in door)
            assert allowed, f"{relative(path)} imports {name}, which belongs into {', '.join(door)}"


def test_what_an_episode_is_made_of_needs_no_torch() -> None:
    parts = ["types", "errors", "files", "config", "envs", "experts", "prompting", "episodes", "report", "run", "chain"]
    parts += ["preflight", "stages.collect", "stages.eval"]  # with a scripted or a remote policy
    statements = "; ".join(f"import vlm_agents.{part}" for part in parts)
    modules = [relative(path) for path in MODULES if relative(path).split("/")[0] in ("envs", "experts", "prompting")]
    statements += "".join(f"; import vlm_agents.{m.removesuffix('.py').replace('/', '.')}" for m in modules)
    code = f"{statements}; import sys; print({{'torch', 'transformers', 'mlflow'}} & set(sys.modules) or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1:] in ([], [""])
