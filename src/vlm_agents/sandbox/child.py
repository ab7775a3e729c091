"""A session's process, forked by the zygote: confines itself, then answers requests until nobody asks any more."""

import os
import random
import sys

from PIL import Image

from vlm_agents.sandbox import wire
from vlm_agents.sandbox.confinement import Ground, confine
from vlm_agents.sandbox.notebook import Notebook

CHANNEL = 3  # the file descriptor to who opened the session
MOST_HEADER = 64 << 20  # bytes of a request


def live(ground: Ground, folder: str, memory_bytes: int) -> None:
    """Confine this process and serve; ends with the process."""
    status = 1
    try:
        os.environ.update(TMPDIR=folder, HOME=folder)
        _write(wire.packed({"confined": _confined(ground, folder, memory_bytes)}))
        _seed()
        _serve(Notebook(ground.settings))
        status = 0
    except EOFError:
        status = 0
    finally:
        os._exit(status)


def _confined(ground: Ground, folder: str, memory_bytes: int) -> str:
    try:
        confine(ground, folder, memory_bytes)
    except OSError as error:
        _write(wire.packed({"refused": str(error)}))
        raise
    return ground.isolation


def _seed() -> None:
    """Sessions draw alike, so that a run can be repeated."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def _serve(notebook: Notebook) -> None:
    while True:
        request = wire.header(_read, MOST_HEADER)
        for name, width, height in request["pictures"]:
            notebook.names[name] = Image.frombytes("RGB", (width, height), _read(3 * width * height))
        shown, error = notebook.run(request["code"])
        parts = [part if isinstance(part, str) else list(part.size) for part in shown]
        answer = {"id": request["id"], "parts": parts, "error": error}
        _write(wire.packed(answer, (part.tobytes() for part in shown if not isinstance(part, str))))


def _read(count: int) -> bytearray:
    return wire.filled(count, lambda view: os.readv(CHANNEL, [view]))


def _write(pieces: list[bytes]) -> None:
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(CHANNEL, view) :]
