"""How long does a turn of an agent's code take, and how many are there in a second?

Prints a table in Markdown: the median and the 95th percentile of a start, and of warm turns of text, of a crop, of a
figure and of text and a crop in one; then warm turns per second of `--at-once` sessions.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from vlm_agents.sandbox.session import Result, Sandbox, Session
from vlm_agents.sandbox.settings import SandboxSettings

PICTURE = Image.effect_noise((2000, 1500), 60).convert("RGB")
TURNS = {
    "text": "total = sum(range(1000))\nprint(total)",
    "a crop of 500 x 400": "image_clue_0.crop((100, 100, 600, 500)).show()",
    "text, and a crop made larger": "print(1)\nimage_clue_0.crop((100, 100, 400, 300)).resize((900, 600)).show()",
    "a figure of a crop": "plt.imshow(image_clue_0.crop((0, 0, 500, 400)))\nplt.axis('off')\nplt.show()",
}
EXPECTED_PICTURES = {"text": 0}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def row(what: str, times_ms: list[float]) -> None:
    ninety_fifth = statistics.quantiles(times_ms, n=20)[-1]
    print(f"| {what} | {statistics.median(times_ms):.1f} | {ninety_fifth:.1f} |")


def checked(result: Result, pictures: int = 0) -> None:
    assert result.ended == "done", result
    assert len(result.images) == pictures, result


def start(sandbox: Sandbox, pictures: dict[str, Image.Image]) -> Session:
    session = sandbox.open(pictures)
    checked(session.run("1"))
    return session


def rate(sandbox: Sandbox, code: str, pictures: int, at_once: int, seconds: float) -> float:
    """Warm turns per second, each session in a thread of its own."""
    sessions = [start(sandbox, {"image_clue_0": PICTURE}) for _ in range(at_once)]
    until = time.perf_counter() + seconds

    def play(session: Session) -> int:
        turns = 0
        while time.perf_counter() < until:
            checked(session.run(code), pictures)
            turns += 1
        session.close()
        return turns

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(play, sessions)) / seconds


def memory_mib(pid: int) -> float:
    """Of a process and what it started, each page once."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                total += memory_mib(int(path.parent.name))
        except OSError:
            continue
    shares = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
    return total + next(int(line.split()[1]) for line in shares if line.startswith("Pss:")) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isolation", default="isolated", choices=["isolated", "bubblewrap", "landlock", "rlimits"])
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    asked = parser.parse_args()
    with Sandbox(SandboxSettings(require=asked.isolation)) as sandbox:
        began = time.perf_counter()
        print(f"{sandbox.isolated}; libraries imported within {time.perf_counter() - began:.1f} s\n")
        print("| | p50, ms | p95, ms |\n|---|---|---|")
        sessions: list[Session] = []
        row("start, no picture", [timed(lambda: sessions.append(start(sandbox, {}))) for _ in range(30)])
        bound = {"image_clue_0": PICTURE}
        row(
            "start, a picture of 2000 x 1500",
            [timed(lambda: sessions.append(start(sandbox, bound))) for _ in range(30)],
        )
        used = memory_mib(sandbox._running()._process.pid)
        for session in sessions:
            session.close()
        with sandbox.open(bound) as session:
            for what, code in TURNS.items():
                pictures = EXPECTED_PICTURES.get(what, 1)
                session.run(code)
                times = [timed(lambda c=code, p=pictures: checked(session.run(c), p)) for _ in range(asked.turns)]
                row(f"turn: {what}", times)
        print(f"\n{len(sessions)} sessions and the process that they are forked from: {used:.0f} MiB")
        for what, code in TURNS.items():
            turns = rate(sandbox, code, EXPECTED_PICTURES.get(what, 1), asked.at_once, asked.seconds)
            print(f"{turns:.0f} turns/s ({what}), {asked.at_once} sessions on {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
