"""Is there anything to learn from in an iteration's episodes? Read off replies and rewards alone; knows no model.

PPO learns from differences: what came after a turn against what the critic, or the other turns, led to expect. So there
is nothing to learn from where

* every reply was illegal: no action of the policy ever reached the env, so whatever rewards differ by isn't its doing;
* no two episodes differ: at each turn that they share they had the same reward, and they came to the same discounted
  return. A critic that isn't flat yet still gives such turns advantages, and they are normalised like any others, so
  the weights do move: by the critic's errors, not by what was played.

Rewards are those that are trained on, with `env.invalid_penalty` and `algo.novelty`'s bonus: a success rate of 0 is no
lack where they differ. One episode alone differs from none, yet a critic compares it with those of earlier iterations:
it counts as something. That there is a difference doesn't say that it can be learned from: seeds may be all that it is.
"""

from collections.abc import Mapping, Sequence

from vlm_agents.config import RunConfig
from vlm_agents.learn.batch import usable
from vlm_agents.progress import say
from vlm_agents.types import Trajectory

TOLERANCE = 1e-6  # of rewards and returns
METRIC = "ppo/nothing_to_learn"
QUOTED = 60  # characters of a reply


def figures(trajectories: Sequence[Trajectory], gamma: float) -> dict[str, float]:
    """`ppo/nothing_to_learn`, 1 or 0, of an iteration's episodes with the rewards that are trained on."""
    episodes = usable(trajectories)
    return {METRIC: float(all_illegal(episodes) or all_alike(episodes, gamma))}


def all_illegal(episodes: Sequence[Trajectory]) -> bool:
    return all(turn.parsed.action is None for episode in episodes for turn in episode.turns)


def all_alike(episodes: Sequence[Trajectory], gamma: float) -> bool:
    """Are there two episodes or more, and does none differ from another in its rewards?"""
    if len(episodes) < 2:
        return False
    rewards = [[turn.step.reward for turn in episode.turns] for episode in episodes]
    returns = [sum(gamma**at * reward for at, reward in enumerate(row)) for row in rewards]
    shared = [[row[at] for row in rewards if at < len(row)] for at in range(max(map(len, rewards)))]
    return all(max(column) - min(column) <= TOLERANCE for column in (returns, *shared))


class Watch:
    """Looks at every iteration of a run, and says once, in a line, that there is nothing to learn from."""

    def __init__(self, cfg: RunConfig, iterations: int) -> None:
        self.cfg, self.iterations = cfg, iterations
        self.lacked = 0  # iterations in a row
        self.told = False

    def look(self, iteration: int, metrics: Mapping[str, float], trajectories: Sequence[Trajectory]) -> None:
        """To be called after each iteration, counted from 0.

        It takes two in a row, or the run's last, until it is said: a rare success may just not have come yet.
        """
        self.lacked = self.lacked + 1 if metrics[METRIC] else 0
        if self.told or not self.lacked or (self.lacked < 2 and iteration + 1 < self.iterations):
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
            lack = (
                f"none of an iteration's {len(episodes)} episodes differs from another in its rewards; {solved} "
                f"succeeded, with return {episodes[0].total_reward:.2f}"
            )
        say(f"nothing to learn from: {lack}. What helps: {'; '.join(self.remedies(episodes))}. Training goes on")

    def remedies(self, episodes: Sequence[Trajectory]) -> list[str]:
        """What may mend it, from what helps most."""
        temperature = f"model.temperature={self.cfg.model.temperature:g}"
        first = "train with stage=sft first, and give its run as stage.init"
        if all_illegal(episodes):
            return [first, "another prompt=", f"a temperature lower than {temperature}"]
        if all(episode.success for episode in episodes):
            return ["a harder env: this one is solved"]
        illegal = any(turn.parsed.action is None for episode in episodes for turn in episode.turns)
        penalty = ["env.invalid_penalty=0.1, for some replies are illegal"]
        more = [f"more episodes than stage.episodes={len(episodes)}", f"a temperature higher than {temperature}"]
        return [*(penalty if illegal and not self.cfg.env.invalid_penalty else []), first, *more, "an easier env"]


def conclude(metrics: Mapping[str, float]) -> None:
    """Say at the end of a run that it stayed so, by the metrics of its last iteration."""
    if metrics.get(METRIC):
        say("to the end there was nothing to learn from, as said above: the model is no better for it")
