"""An env whose episodes end with an answer that a referee has to judge: `env=custom env.factory=quiz_env:make`."""

from PIL import Image

from vlm_agents.envs.base import out_of_turn
from vlm_agents.pictures import Picture
from vlm_agents.types import Claim, Observation, Step

COLORS = {"red": "crimson", "blue": "navy"}  # and another word for each


class Quiz:
    """One question a seed. `words`: the answer is one of four; else it is whatever is said."""

    name = "Quiz"
    instructions = "Answer the question."

    def __init__(self, words: bool) -> None:
        self.words = (*COLORS, *COLORS.values()) if words else None
        self.right = ""

    def reset(self, seed: int) -> Observation:
        self.right = list(COLORS)[seed % 2]
        return self.seen(self.right)

    def step(self, action: str | None) -> Step:
        if not self.right:
            raise out_of_turn(self.name)
        claim = Claim("What colour is it?", action or "", self.right, source="quiz", reward=2.0)
        self.right, legal = "", action is not None and (self.words is None or action in self.words)
        return Step(self.seen("black"), 0.0, True, False, False, legal, True, claim=claim)

    def seen(self, color: str) -> Observation:
        return Observation("What colour?", (Picture(Image.new("RGB", (28, 28), color)),), self.words, state_key=color)

    def close(self) -> None:
        pass


def make(words: bool) -> Quiz:
    return Quiz(words)
