"""ALFWorld's THOR env, spoken to over a pipe: run by an interpreter that has ai2thor, which this package needn't share.

A line of JSON asks, a line answers: {"game": "<traj_data.json>"} begins a game, {"command": "..."} plays; the answer
has text, commands, won, rate, and the frame as PNG in base64; or error. Nothing of vlm_agents is imported here.
"""

import base64
import importlib.metadata
import importlib.util
import io
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

SIDE = 300  # pixels of a frame, as ALFWorld has it
AI2THOR, BUILD = "2.1.0", "thor-201909061227-Linux64"
CONFIG = {
    "general": {"training_method": "dqn"},
    "rl": {"training": {"max_nb_steps_per_episode": 10**6}},  # the env that asks counts the turns
    "env": {
        "goal_desc_human_anns_prob": 0,
        "thor": {
            "screen_height": SIDE,
            "screen_width": SIDE,
            "smooth_nav": False,
            "save_frames_to_disk": False,
            "save_frames_path": "",
        },
    },
    "controller": {"type": "oracle", "load_receps": True, "debug": False},
}


def missing():
    """What THOR lacks here, in words, or None."""
    for package in ("alfworld", "ai2thor", "cv2"):
        if importlib.util.find_spec(package) is None:
            return f"no {package}: {sys.executable} -m pip install 'alfworld[vis]==0.4.2'"
    versions = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    if (version := versions.get("ai2thor", AI2THOR)) != AI2THOR:
        return f"ai2thor {version}, and ALFWorld needs {AI2THOR}: {sys.executable} -m pip install ai2thor=={AI2THOR}"
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        return f"torchvision can't be imported ({error}): install the one of the same build as torch"
    if not os.environ.get("DISPLAY"):
        return "no DISPLAY: start an X server with GLX, and name it, as in DISPLAY=:0"
    build = Path.home() / ".ai2thor/releases" / BUILD
    if not build.is_dir():
        fetch = f'{sys.executable} -c "from ai2thor.controller import Controller; Controller().start()"'
        return f"no {build}: ai2thor fetches it from the net at its first start: {fetch}"
    return None


class Game:
    """ALFWorld's THOR env without its thread."""

    def __init__(self):
        from alfworld.agents.environment.alfred_thor_env import AlfredThorEnv

        self.thor: Any = AlfredThorEnv.Thor(None, "eval")
        self.thor.init_env(CONFIG)
        version = tuple(int(part) for part in importlib.metadata.version("alfworld").split(".")[:2])
        self.says_put = version < (0, 5)  # its commands say move, and its parser knows put alone

    def play(self, asked):
        if "game" in asked:
            if "scene" not in json.loads(Path(asked["game"]).read_text()):
                return {"error": f"{asked['game']} has no scene: games made here can't be played in THOR"}
            self.thor._done = False
            self.thor.reset(asked["game"])
        else:
            self.thor.step(self.worded(asked["command"]))
        text, _, commands, won, rate, _ = self.thor.get_results()
        return {"text": text, "commands": list(commands), "won": bool(won), "rate": float(rate), "frame": self.frame()}

    def worded(self, command):
        if self.says_put and command.startswith("move "):
            thing, _, place = command[len("move ") :].partition(" to ")
            return f"put {thing} in/on {place}"
        return command

    def frame(self):
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(self.thor.env.last_event.frame).save(png, "PNG")  # RGB here; its get_frames turns it to BGR
        return base64.b64encode(png.getvalue()).decode()


def read(questions):
    """Until who asks has gone, in whatever way: then this process has to go, and Unity's with it, though it hangs."""
    for line in sys.stdin:
        questions.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what THOR prints is no answer
    lacks = missing()
    if lacks:
        answers.write(json.dumps({"error": lacks}) + "\n")
        return
    questions = queue.SimpleQueue()
    threading.Thread(target=read, args=(questions,), daemon=True).start()
    game = Game()
    while True:
        try:
            answer = game.play(json.loads(questions.get()))
        except Exception as error:  # noqa: BLE001 (foreign code: told, and the game is over)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
