import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_programs import PROGRAMS, drill, hunt
from PIL import Image

from vlm_agents.errors import ConfigError, EnvError
from vlm_agents.sandbox import launcher
from vlm_agents.sandbox.session import Sandbox
from vlm_agents.sandbox.settings import Isolation, SandboxSettings

KINDS: list[Isolation] = ["bubblewrap", "landlock"]
Needs = Callable[[Isolation], None]
RED = Image.new("RGB", (40, 30), "red")


@pytest.mark.parametrize("isolation", KINDS)
def test_variables_live_from_turn_to_turn_and_pictures_go_both_ways(
    sandboxes: Callable[[Isolation], Sandbox], isolation: Isolation
) -> None:
    with sandboxes(isolation).open({"image_clue_0": RED}) as session:
        first = session.run(
            "x = image_clue_0.size\nprint('before')\nimage_clue_0.crop((0, 0, 7, 5)).show()\nprint('after')"
        )
        second = session.run("x")
    assert (first.ended, first.error, first.isolated) == ("done", None, isolation)
    assert [part if isinstance(part, str) else part.size for part in first.parts] == ["before\n", (7, 5), "after\n"]
    assert first.images[0].getpixel((6, 4)) == (255, 0, 0)
    assert second.text == "(40, 30)\n"


def test_sessions_share_no_names_and_no_files(sandbox: Sandbox) -> None:
    with sandbox.open() as one, sandbox.open() as other:
        one.run("x = 1; open('x', 'w').write('1'); import os; os.environ['x'] = '1'")
        found = other.run("import os\nprint('x' in globals(), os.listdir(), os.environ.get('x'))")
    assert found.text == "False [] None\n"


def test_a_timeout_ends_the_process_and_binds_the_pictures_again() -> None:
    with Sandbox(SandboxSettings(require="any", turn_s=0.3)) as sandbox:
        with sandbox.open({"image_clue_0": RED}) as session:
            session.bind({"image_clue_1": RED.resize((2, 3))})
            assert session.run("x = 1").ended == "done"
            late = session.run("import time\ntry:\n    time.sleep(0.5)\nfinally:\n    print('late')")
            then = session.run("print('x' in globals(), image_clue_0.size, image_clue_1.size)")
        assert (late.ended, late.parts) == ("timeout", ())
        assert late.error == (
            "TimeoutError: the code ran for more than 0.3 s and was ended. Python was started anew, all variables are "
            "lost. These pictures are bound again: image_clue_0, image_clue_1."
        )
        assert 0.3 <= late.seconds < 3
        assert (then.text, then.ended) == ("False (40, 30) (2, 3)\n", "done")  # not the late answer


def test_a_process_that_ends_is_told_apart(sandbox: Sandbox) -> None:
    with sandbox.open() as session:
        gone = session.run("import os\nos._exit(3)")
        killed = session.run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
        assert session.run("print(1)").text == "1\n"
    assert gone.ended == killed.ended == "died"
    assert str(gone.error).startswith("The process ended (exit status 3). Python was started anew")
    assert str(killed.error).startswith("The process ended (signal 9).")


@pytest.mark.slow
def test_cpu_time_and_the_folder_have_their_limits(needs: Needs) -> None:
    needs("landlock")
    settings = SandboxSettings(require="landlock", cpu_s=2, turn_s=20.0, tmp_files=50)
    with Sandbox(settings) as sandbox, sandbox.open() as session:
        spun = session.run("while True: pass")
        full = session.run("import time\nfor n in range(100): open(str(n), 'w').close()\ntime.sleep(10)")
        assert session.run("import os\nprint(os.listdir())").text == "[]\n"
    assert (spun.ended, full.ended) == ("cpu", "tmp")
    assert str(spun.error).startswith("The process used its 2 s of CPU time and was ended. Python was started anew")
    assert str(full.error).startswith("The process wrote more than 64 MiB or 50 files and was ended.")


@pytest.mark.parametrize("words", ["a b", "1x", ""])
def test_a_picture_needs_a_name(sandbox: Sandbox, words: str) -> None:
    with pytest.raises(ConfigError, match="must be a name of Python"):
        sandbox.open({words: RED})


def test_threads_have_turns_at_once(sandbox: Sandbox) -> None:
    said: dict[int, list[str]] = {}

    def play(number: int) -> None:
        with sandbox.open() as session:
            session.run(f"x = {number}")
            said[number] = [session.run("x += 10; print(x)").text for _ in range(5)]

    threads = [threading.Thread(target=play, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {n: [f"{n + 10 * turn}\n" for turn in range(1, 6)] for n in range(8)}


def test_a_dead_zygote_is_replaced(sandbox: Sandbox) -> None:
    session = sandbox.open({"image_clue_0": RED})
    session.run("x = 1")
    before = sandbox._running()._process
    tree = _tree(before.pid)
    for pid in tree[1::-1]:  # with bubblewrap: its first process inside, with which all others there end, and its own
        os.kill(pid, signal.SIGKILL)
    before.wait(10)
    while any(map(_runs, tree)):
        time.sleep(0.01)
    gone = session.run("print(x)")
    back = session.run("print(image_clue_0.size)")
    session.close()
    assert gone.ended == "died"
    assert back.text == "(40, 30)\n"
    assert sandbox._running()._process.pid != before.pid


PARENT = """
import sys, time
from vlm_agents.sandbox.session import Sandbox
from vlm_agents.sandbox.settings import SandboxSettings
sandbox = Sandbox(SandboxSettings(require=sys.argv[1], turn_s=60))
first = sandbox.open()
first.run("open('file', 'w').write('1')")
print(sandbox._running()._process.pid, flush=True)
sandbox.open().run("while True: pass")
"""


@pytest.mark.parametrize("isolation", KINDS)
def test_a_killed_parent_leaves_nothing(needs: Needs, isolation: Isolation, tmp_path: Path) -> None:
    needs(isolation)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", PARENT, isolation]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        zygote = int(parent.stdout.readline())
        group = set(_tree(zygote))
        deadline = time.monotonic() + 10
        while len(group) < (5 if isolation == "bubblewrap" else 3) and time.monotonic() < deadline:
            group = set(_tree(zygote))  # bubblewrap's two, the zygote, two sessions
        assert len(group) == (5 if isolation == "bubblewrap" else 3)
        assert len(os.listdir(tmp_path)) == (isolation == "landlock")
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(_runs, group)) or os.listdir(tmp_path):
        assert time.monotonic() < deadline, (group, os.listdir(tmp_path))
        time.sleep(0.02)


def _tree(root: int) -> list[int]:
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(root)], capture_output=True, text=True, check=False)
    return [root, *(pid for child in map(int, children.stdout.split()) for pid in _tree(child))]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_another_process_has_its_own() -> None:
    sandbox = Sandbox(SandboxSettings(turn_s=3.0))
    assert pickle.loads(pickle.dumps(sandbox)).settings == sandbox.settings


def test_a_closed_session_runs_nothing(sandbox: Sandbox) -> None:
    session = sandbox.open()
    session.close()
    with pytest.raises(EnvError, match="closed"):
        session.run("1")


def test_what_cant_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_MAIN", "import sys; sys.exit('no such luck')  # {path}")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        ConfigError, match=r"require=isolated can't be met.*no command bwrap.*landlock: no such luck.*any"
    ):
        Sandbox().isolated  # noqa: B018


def test_the_command_prints_json(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("print('hi')\nImage.new('L', (5, 5)).show()\n1 / 0")
    command = [sys.executable, "-m", "vlm_agents.sandbox", str(program), "--require", "any"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert set(told) == {"text", "images", "error", "isolated", "seconds"}
    assert (told["text"], told["images"]) == ("hi\n", 1)
    assert told["error"].endswith("ZeroDivisionError: division by zero\n")


def test_the_command_names_the_file_that_it_cant_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.py"
    latin.write_bytes(b"print('\xe9')")
    for program in (latin, tmp_path / "gone.py"):
        done = subprocess.run(
            [sys.executable, "-m", "vlm_agents.sandbox", str(program)], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: can't read {program} (")


@pytest.mark.parametrize("isolation", KINDS[:1])
def test_hostile_programs_are_contained(needs: Needs, isolation: Isolation) -> None:
    needs(isolation)
    few = (
        "fork",
        "memory bomb",
        "reads the target's file",
        "/proc",
        "TCP",
        "signals to others",
        "ptrace",
        "namespaces",
    )
    few += ("io_uring", "os._exit", "a forged answer", "an answer prepared for the next turn", "a link to the target")
    programs = [program for program in PROGRAMS if program.name in few]
    assert len(programs) == len(few)
    assert drill(isolation, programs) == []


@pytest.mark.slow
@pytest.mark.parametrize("isolation", KINDS)
def test_all_hostile_programs_are_contained(needs: Needs, isolation: Isolation) -> None:
    needs(isolation)
    assert len(PROGRAMS) >= 80
    assert drill(isolation) == []


def test_the_drill_sees_what_gets_out() -> None:
    """rlimits alone let files be read: the drill that finds nothing in isolation finds it there."""
    (program,) = [program for program in PROGRAMS if program.name == "reads the target's file"]
    (failure,) = drill("rlimits", [program])
    assert failure.startswith("reads the target's file: it got out")


@pytest.mark.slow
@pytest.mark.parametrize("isolation", KINDS)
def test_no_secret_leaks_between_sessions(needs: Needs, isolation: Isolation) -> None:
    needs(isolation)
    tally = hunt(isolation, 400, seed=1)
    assert tally.leaks == []
    assert tally.own > 200  # a hunt does find what is there


def test_no_secret_leaks_between_a_few_sessions() -> None:
    tally = hunt("any", 12)
    assert tally.leaks == []
    assert tally.own > 5
