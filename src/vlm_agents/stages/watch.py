"""Tells whoever trains by reward that there is nothing to learn from, and what may help. What that means, and finds it,
is `learn.signal`.
"""

from collections.abc import Mapping, Sequence

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.learn.samples import usable
from vlm_agents.learn.signal import METRIC, all_illegal
from vlm_agents.learn.update import PREFIX
from vlm_agents.metrics import worsened
from vlm_agents.progress import say
from vlm_agents.stages.remedies import demonstrations, success_remedy, tell_shortcoming
from vlm_agents.types import Trajectory

NOTHING = f"{PREFIX}{METRIC}"
QUOTED = 60  # characters of a reply


class Watch:
    """Looks at every iteration of a run, and says once, in a line, that there is nothing to learn from."""

    def __init__(self, cfg: RunConfig, lacked: int = 0, told: bool = False) -> None:
        self.cfg = cfg
        self.lacked, self.told = lacked, told  # iterations in a row; both go on with the run

    def look(self, metrics: Mapping[str, float], trajectories: Sequence[Trajectory], only: bool) -> None:
        """To be called after each iteration; `only`: the run has no other.

        It takes two in a row until it is said: a rare success may just not have come yet.
        """
        self.lacked = self.lacked + 1 if metrics[NOTHING] else 0
        if self.told or not self.lacked or (self.lacked < 2 and not only):
            return
        self.told = True
        episodes = usable(trajectories)
        if all_illegal(episodes):
            turn = episodes[0].turns[0]
            text = " ".join(turn.reply.text.split())
            shown = f"{text[:QUOTED]}..." if len(text) > QUOTED else text
            lack = f"every reply is illegal, such as {shown!r} ({turn.parsed.error})"
        else:
            solved = sum(episode.success for episode in episodes)
            among = "another of its start" if f"{PREFIX}varied_groups" in metrics else "another"
            lack = (
                f"algo.filters keep none of an iteration's {len(episodes)} episodes"
                if metrics.get(f"{PREFIX}kept") == 0
                else f"none of an iteration's {len(episodes)} episodes differs from {among} in its rewards"
            )
            lack += f"; {solved} succeeded, the first came to a return of {episodes[0].total_reward:.2f}"
        say(f"nothing to learn from: {lack}. What helps: {'; '.join(self.remedies(episodes))}. Training goes on")

    def remedies(self, episodes: Sequence[Trajectory]) -> list[str]:
        """What may mend it, from what helps most."""
        temperature = f"model.temperature={self.cfg.model.temperature:g}"
        first = demonstrations(self.cfg)
        if all_illegal(episodes):
            return [*first, f"a temperature lower than {temperature}"]
        if all(episode.success for episode in episodes):
            return ["a harder env: this one is solved"]
        illegal = any(turn.parsed.action is None for episode in episodes for turn in episode.turns)
        penalty = ["env.invalid_penalty=0.1, for some replies are illegal"]
        stage, algo = self.cfg.stage, self.cfg.algo
        assert isinstance(stage, PpoConfig)
        assert algo is not None
        plays = f", more plays of a start than algo.group_size={algo.group_size}" if algo.group_size > 1 else ""
        more = [
            f"more episodes than stage.episodes={stage.episodes}{plays}",
            f"a temperature higher than {temperature}",
        ]
        more += success_remedy(self.cfg, sum(episode.success for episode in episodes))
        return [*(penalty if illegal and not self.cfg.env.invalid_penalty else []), *first, *more, "an easier env"]


def conclude(cfg: RunConfig, metrics: Mapping[str, float]) -> None:
    """Say at the end of a run what its last iteration lacked, or else what its panel lacks."""
    if worse := worsened(metrics):
        lr = f"algo.lr={cfg.algo.lr:g}, " if cfg.algo else ""
        say(f"training made it worse: {worse}. What helps: a rate lower than {lr}algo.target_kl=0.05, more episodes")
    if metrics.get(NOTHING):
        say("in its last iteration there was nothing to learn from")
    else:
        tell_shortcoming(cfg, metrics)
