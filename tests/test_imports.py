"""Import paths in settings: each way to get one wrong is one line that says what to do."""

import sys
from pathlib import Path

import pytest

from vlm_agents.errors import ConfigError, DataError, TrainingError
from vlm_agents.imports import attribute, blamed, made

MODULE = """
import sys
class Box:
    def __init__(self, size=3): self.size = size
    def put(self): ...
def full(): raise ValueError("no room\\x1b[2J")
def leaves(): sys.exit(4)
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "boxes_of_a_test.py").write_text(MODULE)
    (tmp_path / "broken_of_a_test.py").write_text("import nothing_of_a_test")
    (tmp_path / "raising_of_a_test.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "boxes_of_a_test", raising=False)  # of another test's folder
    return tmp_path


def test_a_path_is_looked_for_in_the_working_directory() -> None:
    """Though Python itself wouldn't: this process was started elsewhere."""
    assert made("env.factory", "boxes_of_a_test:Box", size=5, needs=("put",)).size == 5
    assert attribute("x", "boxes_of_a_test:Box.put").__name__ == "put"


@pytest.mark.parametrize(
    ("path", "arguments", "said"),
    [
        ("boxes_of_a_test", {}, "write package.module:attribute"),
        ("boxes_of_a_test:", {}, "write package.module:attribute"),
        ("no_such.thing:make", {}, "there is no module no_such in {folder}, "),
        ("no_such.thing:make", {}, ": start where it lies (the first of these is the working directory), put"),
        ("broken_of_a_test:make", {}, "broken_of_a_test imports nothing_of_a_test, which isn't installed"),
        ("raising_of_a_test:make", {}, "importing raising_of_a_test fails: ZeroDivisionError: division by zero ("),
        ("boxes_of_a_test:Bx", {}, "boxes_of_a_test has no Bx. Did you mean 'Box'?"),
        ("boxes_of_a_test:number", {}, "is a int, and nothing that can be called"),
        ("boxes_of_a_test:Box", {"width": 3}, "takes (size=3), and is called with (width=3)"),
        ("boxes_of_a_test:Box", {}, "it gives a Box without take"),
        ("boxes_of_a_test:full", {}, "fails: ValueError: no room\\x1b[2J (boxes_of_a_test.py, line 6)"),
        ("boxes_of_a_test:leaves", {}, "fails: SystemExit: 4 (boxes_of_a_test.py, line 7)"),
    ],
)
def test_what_is_wrong_is_one_line(path: str, arguments: dict, said: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        made("env.factory", path, needs=("put", "take"), **arguments)
    assert str(raised.value).startswith(f"env.factory={path}: ") or path.endswith(("number", "Box"))
    assert said.format(folder=folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_fails_later_in_what_it_gave_is_one_line_too(folder: Path) -> None:
    full = attribute("algo.factory", "boxes_of_a_test:full")
    told = r"^algo.factory=a:b: training .* fails: ValueError: .*, line 6\)\. See docs"
    with pytest.raises(TrainingError, match=told), blamed("algo.factory", "a:b"):
        full()
    with pytest.raises(ValueError, match="no room"), blamed("algo.factory", None):
        full()  # ours
    for error in (DataError("a full disk"), MemoryError()):
        with pytest.raises(type(error)), blamed("algo.factory", "a:b"):
            raise error
