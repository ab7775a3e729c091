"""What came of each held-out episode: `panel.jsonl`, one line an episode of a training run's panel.

It is what comparisons pair runs by. An evaluation has that in its recorded episodes already, so there is one reader for
both. No pictures, no words: those few episodes that a person looks at are the record's.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlm_agents.episodes import read_episodes
from vlm_agents.errors import DataError
from vlm_agents.files import append_line
from vlm_agents.types import Trajectory

log = logging.getLogger(__name__)

PANEL = "panel.jsonl"
# Who played, by the name in the record, as the metrics of the panel end.
VARIANTS = {"model": "", "model_greedy": "_greedy", "random": "_random", "expert": "_expert"}
FIELDS = {"step": int, "variant": str, "seed": int, "success": bool, "return": float, "turns": int, "stop": str}


class Outcome(NamedTuple):
    """Of one episode; `step` is after how many iterations it was played, `variant` as in the names of metrics."""

    step: int
    variant: str
    seed: int
    success: bool
    total_reward: float
    turns: int
    stop: str


def outcome(step: int, variant: str, episode: Trajectory) -> Outcome:
    total, turns = episode.total_reward, len(episode.turns)
    return Outcome(step, variant, episode.seed, episode.success, total, turns, episode.stop)


def append_outcome(folder: Path, step: int, episode: Trajectory) -> None:
    """Add an episode of the panel to the run directory's record; DataError when the disk is full."""
    values = outcome(step, VARIANTS[episode.policy], episode)
    append_line(folder / PANEL, json.dumps(dict(zip(FIELDS, values, strict=True))))


def read_outcomes(folder: Path, trained: bool) -> list[Outcome]:
    """Of the held-out episodes of a finished run: `trained` by stage=ppo, else of stage=eval. Of an episode that is
    there twice the last counts. DataError where the run kept none.

    Of an evaluation it is those that its own policy played sampled, at step 0 and without a variant. A line that
    somebody damaged is left out with a warning.
    """
    if not trained:
        episodes = read_episodes(folder, pictures=False, skip_damaged=True)
        found = (outcome(0, "", episode) for episode in episodes)
    elif (folder / PANEL).is_file():
        found = _panel(folder / PANEL)
    else:
        raise DataError(f"no {PANEL}: stage.eval_episodes was 0, or an older version trained it; stage=eval plays it")
    return list({(one.step, one.variant, one.seed): one for one in found}.values())


def _panel(path: Path) -> Iterator[Outcome]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["success"], bool):  # any text would count as one
                raise TypeError
            yield Outcome(*(kind(record[name]) for name, kind in FIELDS.items()))
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            log.warning("%s, line %d is no episode of a panel: left out", path, number)
