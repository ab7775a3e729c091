"""ALFWorld played by words: what TextWorld tells, a schematic picture of what is in sight, and rewards."""

from PIL import Image

from vlm_agents.config import AlfWorldConfig
from vlm_agents.envs.alfworld.game import Game
from vlm_agents.envs.alfworld.games import games
from vlm_agents.envs.alfworld.thor import Thor, ThorWorld
from vlm_agents.envs.alfworld.world import NOTHING, World
from vlm_agents.envs.base import out_of_turn
from vlm_agents.pictures import Picture
from vlm_agents.types import Observation, Step

RULES = (
    "You are in a household and have a task. Go to receptacles, open them, take and move objects, and use what is "
    "there. Only what the game understands now is an action."
)
WELCOME, TASK = "-=", "Your task is to:"  # begin the paragraphs of a game's intro that tell nothing, and the task
HELP = "help"  # a command that lists kinds of commands


class AlfWorld:
    """One game an episode. `world` is the game, which experts read and nobody else does."""

    def __init__(self, cfg: AlfWorldConfig) -> None:
        self.cfg, self.name, self.instructions = cfg, cfg.id, RULES
        self._game = games(cfg)
        self._thor: Thor | None = None
        self._running = False

    def reset(self, seed: int) -> Observation:
        game = self._game(seed)
        self.world = self._begun(game)
        paragraphs = [one for one in self.world.text.split("\n\n") if not one.startswith(WELCOME)]
        self._task = "\n".join(one for one in paragraphs if one.startswith(TASK))
        self._said = "\n".join(one for one in paragraphs if not one.startswith(TASK)).strip()
        self._rate = self.world.rate
        self.turns, self._running = 0, True
        self._key = self.world.key
        return self._observe({"task": game.kind, "game": game.ident})

    def step(self, action: str | None) -> Step:
        if not self._running:
            raise out_of_turn(self.name)
        self.turns += 1
        legal, before, rate = action in self._legal, self._key, self._rate
        if legal:
            self.world.step(str(action))
        self._said = self.world.text if legal else NOTHING
        self._key, self._rate = self.world.key, self.world.rate
        won = self.world.won
        gained = self._rate if self.cfg.compat == "rl4vlm" else self._rate - rate
        truncated = not won and self.turns == self.cfg.max_steps
        self._running = not (won or truncated)
        reward = self.cfg.success_reward * won + self.cfg.goal_reward * gained
        metrics = {"goal_conditions": self._rate}
        return Step(self._observe({}), reward, won, truncated, won, legal, self._key != before, metrics)

    def close(self) -> None:
        self._running = False
        if self._thor is not None:
            self._thor.close()
            self._thor = None

    @property
    def _legal(self) -> tuple[str, ...]:
        return tuple(command for command in self.world.commands if command != HELP)

    def _begun(self, game: Game) -> World | ThorWorld:
        if self.cfg.thor is None:
            return World(game)
        self._thor = self._thor or Thor(self.cfg.thor)
        return ThorWorld(game, self._thor)

    def _observe(self, tags: dict[str, str]) -> Observation:
        shows = self.cfg.observation
        images = () if shows == "text" else (self.world.picture(self.cfg.tile_size),)
        if shows == "blank":
            images = tuple(Picture(Image.new("RGB", picture.size)) for picture in images)
        text = "" if shows in ("image", "blank") else self._said
        return Observation(text, images, self._legal, self._key, tags=tags, task=self._task)
