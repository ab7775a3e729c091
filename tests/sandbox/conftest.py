import shutil
from collections.abc import Callable, Iterator

import pytest

from vlm_agents.sandbox import landlock
from vlm_agents.sandbox.session import Sandbox
from vlm_agents.sandbox.settings import Isolation, SandboxSettings

Needs = Callable[[Isolation], None]


@pytest.fixture(scope="session")
def needs() -> Needs:
    """Skips a test where the machine lacks this isolation."""
    return _needs


def _needs(isolation: Isolation) -> None:
    if isolation == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap isn't installed")
    if isolation == "landlock" and not landlock.version():
        pytest.skip("this kernel has no Landlock")


@pytest.fixture(scope="session")
def sandboxes() -> Iterator[Callable[[Isolation], Sandbox]]:
    """Sandboxes by their isolation, each started once: the libraries take a second."""
    made: dict[Isolation, Sandbox] = {}

    def sandbox(isolation: Isolation) -> Sandbox:
        if isolation not in made:
            _needs(isolation)
            made[isolation] = Sandbox(SandboxSettings(require=isolation, turn_s=5.0, output_chars=2000, pictures=3))
        return made[isolation]

    yield sandbox
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def sandbox(sandboxes: Callable[[Isolation], Sandbox]) -> Sandbox:
    """The strongest that this machine has."""
    if shutil.which("bwrap"):
        return sandboxes("bubblewrap")
    return sandboxes("landlock" if landlock.version() else "rlimits")
