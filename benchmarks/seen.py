"""How many held-out starts were in the demonstrations: `python benchmarks/seen.py outputs/x/collect outputs/x/eval`.

Held-out seeds are never trained on, but a small game deals the same hand under many seeds. Two starts count as the same
if the expert's first thought of both, which names what it sees, is; a third argument is a regular expression for the
part of it that counts, `"sorted ([0-9 ]+)"` for the cards of Points24 in whatever order. Episodes of whose start the
expert says no such thing, as of a hand that nothing can be made of, are left out. What the shipped weights or PPO had
seen besides isn't known here.
"""

import re
import sys
from pathlib import Path

from vlm_agents.episodes import read_episodes
from vlm_agents.metrics import wilson_interval


def starts(folder: Path, what_counts: str) -> list[tuple[str, bool]]:
    """Of each episode, how it began and whether it was solved."""
    found = []
    for episode in read_episodes(folder, pictures=False):
        if not episode.turns:
            continue
        advice = episode.turns[0].observation.advice
        if match := advice and re.search(what_counts, advice.thought):
            found.append((match[match.re.groups], episode.success))  # the group, or all of it
    return found


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    demonstrations, evaluation = map(Path, sys.argv[1:3])
    what_counts = sys.argv[3] if len(sys.argv) > 3 else ".*"
    known = {start for start, _ in starts(demonstrations, what_counts)}
    held_out = starts(evaluation, what_counts)
    print(f"{len(held_out)} held-out episodes begin in {len({start for start, _ in held_out})} ways")
    for name, wanted in (("in", True), ("not in", False)):
        solved = [success for start, success in held_out if (start in known) == wanted]
        if solved:
            low, high = wilson_interval(sum(solved), len(solved))
            share, success = len(solved) / len(held_out), sum(solved) / len(solved)
            print(f"{share:.3f} {name} the demonstrations: success {success:.3f} [{low:.3f}, {high:.3f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
