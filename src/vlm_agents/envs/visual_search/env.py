"""Visual search: a question on a picture too large to be seen whole, and Python to cut out and enlarge what matters.

An action is Python in a fence, as Markdown has it, or `\\boxed{the answer}`; any other text is an answer too. Whether
an answer is right is for the referee to say: the last step holds a claim.
"""

import multiprocessing
from functools import cache
from weakref import WeakValueDictionary

from PIL import Image

from vlm_agents.blocks import unboxed, unfenced
from vlm_agents.config import VisualSearchConfig
from vlm_agents.envs.base import out_of_turn, state_key
from vlm_agents.envs.visual_search.generator import LEVELS
from vlm_agents.envs.visual_search.scene import Scene
from vlm_agents.envs.visual_search.sources import Files, made_up
from vlm_agents.pictures import Picture
from vlm_agents.progress import say
from vlm_agents.sandbox.session import Result, Sandbox, Session
from vlm_agents.sandbox.settings import SandboxSettings
from vlm_agents.types import Claim, Observation, Step

TOOL = (
    "You answer a question on pictures. Python has them in their own size, as PIL images {name}_0 and so on; np, Image "
    "and plt are there. What your code prints or shows comes back, pictures under the next names of image_clue. "
    "Variables stay."
)
NO_TOOL = "You answer a question on pictures. There is no Python here: answer at once."
UNREADABLE = "Write Python to be run, or the answer."
ANSWER = "Write the answer."
WITHOUT = "There is no Python here. Answer the question."
THIN = 50  # sides of a picture: models' processors refuse one of 200, and reducing rounds
_SANDBOXES: WeakValueDictionary[SandboxSettings, Sandbox] = WeakValueDictionary()


class VisualSearch:
    """One question an episode, at most `max_steps` turns."""

    def __init__(self, cfg: VisualSearchConfig) -> None:
        self.cfg, self.name = cfg, cfg.id
        self._ask = (
            Files(cfg.id, cfg.data, cfg.eval_data, cfg.pictures, cfg.skip_bad) if cfg.files else made_up(cfg.level)
        )
        self._sandbox = sandbox_of(SandboxSettings(**vars(cfg.sandbox))) if cfg.tool else None
        self._hinted = "image_hint" if cfg.picture_in == "runtime" else "image_clue"
        self.instructions = TOOL.format(name=self._hinted) if cfg.tool else NO_TOOL
        self.scene: Scene | None = None
        self._session: Session | None = None
        self._running = False

    def reset(self, seed: int) -> Observation:
        self.close()
        self.question, self.scene = self._ask(seed)
        self._pictures = [load() for load in self.question.pictures]
        self._played: list[str] = []
        self._calls = self._errors = self._shown = 0
        self._seconds = 0.0
        self.turns, self._running = 0, True
        if self._sandbox is not None:
            self._session = self._sandbox.open(
                {f"{self._hinted}_{place}": picture.image for place, picture in enumerate(self._pictures)}
            )
        tags = {"category": self.question.category, "source": self.question.source}
        text = Composed()
        for place, picture in enumerate(self._pictures):
            text.line("")
            if self.cfg.picture_in == "prompt":
                self._show(text, place, picture, self._whole_side)
            else:
                text.say(f"{self._hinted}_{place}")
            text.say(f" Image Width: {picture.size[0]}; Image Height: {picture.size[1]}")
        text.line(self.question.asked)
        return text.observation(self._key, {name: value for name, value in tags.items() if value})

    def step(self, action: str | None) -> Step:
        if not self._running:
            raise out_of_turn(self.name)
        self.turns += 1
        before, text, code = self._key, Composed(), unfenced(action or "")
        broken = legal = False
        if not (action or "").strip():
            text.say(UNREADABLE if self._session else ANSWER)
        elif code is None:
            return self._answered(str(action))
        elif self._session is None:
            text.say(WITHOUT)
        else:
            legal, broken = True, self._run(code, text)
            self._played.append(code)
        terminated = broken and self.cfg.on_error == "end"
        truncated = not terminated and self.turns == self.cfg.max_steps
        return self._step(text, before, legal=legal, terminated=terminated, truncated=truncated)

    def close(self) -> None:
        self._running = False
        if self._session is not None:
            self._session.close()
            self._session = None

    def _answered(self, action: str) -> Step:
        question, before = self.question, self._key
        inside = unboxed(action)
        answer = action.strip() if inside is None else inside
        claim = Claim(question.text, answer, question.answer, question.options, question.source)
        self._played.append(f"answer: {answer}")
        return self._step(Composed(), before, legal=True, terminated=True, claim=claim)

    def _step(
        self,
        text: "Composed",
        before: str,
        *,
        legal: bool,
        terminated: bool = False,
        truncated: bool = False,
        claim: Claim | None = None,
    ) -> Step:
        seen = text.observation(self._key)
        self._running = not (terminated or truncated)
        if not self._running and self._session is not None:
            self._session.close()
        changed = self._key != before
        return Step(seen, 0.0, terminated, truncated, False, legal, changed, self._metrics, claim)

    def _run(self, code: str, text: "Composed") -> bool:
        """Run code and tell what came of it. Did it go wrong?"""
        assert self._session is not None
        result = self._session.run(code)
        self._calls += 1
        self._errors += result.error is not None
        self._seconds += result.seconds
        self._tell(result, text)
        return result.error is not None

    def _tell(self, result: Result, text: "Composed") -> None:
        assert self._session is not None
        left_out = 0
        for part in (*result.parts, *([result.error] if result.error else [])):
            if isinstance(part, str):
                if part.strip():
                    text.line(f"Text Result:\n{part.strip()}")
            elif self._shown == self.cfg.max_pictures:
                left_out += 1
            else:
                self._shown += 1
                place, picture = len(self._pictures), Picture(part)
                self._pictures.append(picture)
                self._session.bind({f"image_clue_{place}": picture.image})
                text.line("Image Result:\n")
                self._show(text, place, picture, self.side)
        if left_out:
            text.line(f"At most {self.cfg.max_pictures} pictures are shown: {left_out} left out.")
        elif not text:
            text.line("Nothing was printed or shown.")

    def _show(self, text: "Composed", place: int, picture: Picture, side: int | None) -> None:
        width, height = picture.size
        text.say(f"<image_clue_{place}>")
        if max(width, height) > THIN * min(width, height):
            text.say(f"too thin to be shown: {width}x{height} pixels")
        else:
            text.show(reduced(picture, side))
        text.say(f"</image_clue_{place}>")

    @property
    def side(self) -> int | None:
        """The longest side with which a picture is shown."""
        return self.cfg.side or (LEVELS[self.cfg.level].shown if self.scene else None)

    @property
    def _whole_side(self) -> int | None:
        """That of what is asked about: in a made-up scene it never shows the answer."""
        return min(self.side or self.scene.hidden_up_to, self.scene.hidden_up_to) if self.scene else self.side

    @property
    def _key(self) -> str:
        return state_key(self.question.ident, *self._played)

    @property
    def _metrics(self) -> dict[str, float]:
        found = {"tool_calls": float(self._calls), "tool_pictures": float(self._shown)}
        if self._calls:
            found |= {"tool_error_rate": self._errors / self._calls, "seconds_tool": self._seconds / self._calls}
        return found


class Composed:
    """Text with pictures in it, put together piece by piece."""

    def __init__(self) -> None:
        self._text, self._pictures, self._places = "", list[Picture](), list[int]()

    def __bool__(self) -> bool:
        return bool(self._text)

    def say(self, words: str) -> None:
        self._text += words

    def line(self, words: str) -> None:
        """On a line of its own."""
        self._text += "\n" * bool(self._text) + words

    def show(self, picture: Picture) -> None:
        self._pictures.append(picture)
        self._places.append(len(self._text))

    def observation(self, key: str, tags: dict[str, str] | None = None) -> Observation:
        return Observation(self._text, tuple(self._pictures), None, key, None, tags or {}, tuple(self._places))


def reduced(picture: Picture, side: int | None) -> Picture:
    """The picture with at most `side` pixels on its longer side, by a filter that averages: what is hidden from afar
    would be seen in single pixels."""
    width, height = picture.size
    if side is None or max(width, height) <= side:
        return picture
    scale = side / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Picture(picture.image.resize(size, Image.Resampling.LANCZOS))


def sandbox_of(settings: SandboxSettings) -> Sandbox:
    """The one of this process with these settings. ConfigError where the machine has no isolation that they accept."""
    sandbox = _SANDBOXES.get(settings)
    if sandbox is None:
        sandbox = _SANDBOXES[settings] = Sandbox(settings)
        _tell_isolation(sandbox.isolated)
    return sandbox


@cache
def _tell_isolation(isolated: str) -> None:
    if multiprocessing.parent_process() is None:  # else each worker would
        say(f"the agent's Python is kept in by {isolated}")
