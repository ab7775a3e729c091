"""A game of ALFWorld in THOR, whose frames are photographs of a kind: played by `thor_child` in an interpreter that has
it. THOR's world isn't TextWorld's: receptacles differ in number, and a few games can't be won there."""

import base64
import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_agents.envs.alfworld.game import Game
from vlm_agents.envs.base import state_key
from vlm_agents.errors import DataError, EnvError
from vlm_agents.pictures import Picture, read_picture

CHILD = Path(__file__).with_name("thor_child.py")
PATIENCE = 10.0  # seconds that the process has to end in, once its pipe is closed


class Thor:
    """The process that plays, one game at a time."""

    def __init__(self, python: str) -> None:
        """EnvError where there is no such interpreter."""
        try:
            self._process = subprocess.Popen(
                [python, str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # it ends its whole group, Unity's process too, when its pipe is closed
            )
        except OSError as error:
            raise EnvError(f"env.thor={python} can't be run ({error.strerror}): name a Python with ai2thor") from error

    def ask(self, **question: str) -> dict[str, Any]:
        """EnvError where THOR lacks something, or ends."""
        assert self._process.stdin
        assert self._process.stdout
        if self._process.stdin.closed:
            raise EnvError("THOR's process has ended: make the env anew")
        with suppress(OSError):  # it ended, and may have said why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError as error:
            self.close()
            raise EnvError(
                f"THOR's process ended (exit code {self._process.returncode}); what it printed stands above, and if it "
                "is nothing, env.thor is no Python"
            ) from error
        if not isinstance(answer, dict):
            raise EnvError(f"THOR's process answers {line!r:.60}, which is no valid answer")
        if "error" in answer:
            raise EnvError(f"THOR: {answer['error']}")
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with suppress(OSError):  # what was asked of a process that has ended is still to be written
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        with suppress(ProcessLookupError):  # what it left behind, where it couldn't end its group itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class ThorWorld:
    """What `World` is to a game of text."""

    def __init__(self, game: Game, thor: Thor) -> None:
        self.game, self._thor = game, thor
        self._played: list[str] = []
        self._take(thor.ask(game=str(game.source)))

    def step(self, command: str) -> bool:
        self._played.append(command)
        self._take(self._thor.ask(command=command))
        return True

    @property
    def key(self) -> str:
        """What was done says where one is; nobody else can tell."""
        return state_key(self.game.ident, self._played)

    def picture(self, tile: int) -> Picture:
        """[300 300 3] THOR's frame, whatever the tile."""
        return self._frame

    def _take(self, answer: dict[str, Any]) -> None:
        try:
            self.text, self.won, self.rate = str(answer["text"]), bool(answer["won"]), float(answer["rate"])
            self.commands = tuple(sorted({str(command).strip() for command in answer["commands"]}))
            self._frame = Picture(read_picture(base64.b64decode(answer["frame"])))
        except (KeyError, TypeError, ValueError, DataError) as error:
            raise EnvError(f"THOR's process answers {answer!r:.60}, which is no valid answer: {error}") from error
