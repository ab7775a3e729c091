"""A scripted expert of one's own, of the env in own_env.py: `env.expert=examples.own_expert:Guide`."""

from examples.own_env import Corridor
from vlm_agents.types import Advice


class Guide:
    """It is made with the env that it advises, and reads its state, which no policy sees."""

    def __init__(self, env: Corridor) -> None:
        self.env = env

    def start(self) -> Advice | None:
        """After each reset."""
        return self.advise()

    def follow(self, action: str | None) -> Advice | None:
        """After each turn, whatever was played. None would say that there is no way to success any more."""
        return self.advise()

    def advise(self) -> Advice:
        me, goal = self.env.place, self.env.goal
        side = "right" if goal > me else "left"
        return Advice(f"red {me}, green {goal}, so {side}", side, distance=abs(goal - me))
