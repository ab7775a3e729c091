"""Scenes: the same everywhere, held out by what lies where, unreadable from afar, and solved by the expert's code."""

import hashlib
import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_agents.envs.visual_search.env import reduced
from vlm_agents.envs.visual_search.font import GLYPHS, glyph
from vlm_agents.envs.visual_search.generator import CHARACTERS, DIGITS, LEVELS, TASKS, generate, is_held_out
from vlm_agents.envs.visual_search.scene import (
    DOTS,
    HIDDEN,
    LEGIBLE,
    PATTERNS,
    SPECKLE,
    Card,
    Scene,
    detail_tile,
    face_of,
)
from vlm_agents.errors import ConfigError
from vlm_agents.experts.visual_search import Saying, place, solve, view
from vlm_agents.pictures import Picture
from vlm_agents.seeds import TRAINING_SEEDS, held_out

SMALL = ("tiny", "easy", "medium")  # quickly drawn
HELD_OUT = TRAINING_SEEDS + 1


def one_of_each_task() -> Iterator[Scene]:
    """The first scene of each task of each level."""
    for level, rules in LEVELS.items():
        for task in rules.tasks:
            seed = next(seed for seed in range(200) if generate(level, seed).category == task)
            yield generate(level, seed)


SCENES = list(one_of_each_task())
EACH = pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.level}-{scene.category}")


# ---- what it is ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("level", "identity", "pixels"),
    [
        ("tiny", 18247300980339021618, "5db93cd8d0e2655e"),
        ("easy", 13139831793789315128, "f346df1af721c4d6"),
        ("medium", 12299980623027988154, "997f500e8cb87b11"),
        ("hard", 1318648139660475351, "9481950af9b32659"),
        ("extreme", 4844688741218564252, "47724d920ded074e"),
    ],
)
def test_a_level_and_a_seed_are_one_scene_everywhere(level: str, identity: int, pixels: str) -> None:
    """Known from one machine; a version of Pillow that draws otherwise would be seen here."""
    scene = generate(level, 3)
    assert scene == generate(level, 3) != generate(level, 4)
    assert scene.identity == identity
    assert hashlib.sha256(scene.draw().tobytes()).hexdigest()[:16] == pixels


def test_each_level_keeps_its_bounds() -> None:
    for level, rules in LEVELS.items():
        for seed in range(60):
            scene = generate(level, seed)
            assert all(rules.sides[0] <= side <= rules.sides[1] for side in scene.size)
            assert min(scene.size) >= 1000
            assert max(scene.size) <= 4000
            assert scene.category in rules.tasks
            assert min(rules.cards[0], TASKS[scene.category][1]) <= len(scene.cards) <= rules.cards[1]
            assert rules.shapes[0] <= len(scene.shapes) <= rules.shapes[1]
            assert scene.hidden_up_to >= rules.shown


def test_nothing_lies_on_anything_or_outside() -> None:
    for level in LEVELS:
        for seed in range(30):
            scene = generate(level, seed)
            boxes = [thing.box for thing in (*scene.cards, *scene.shapes)]
            for index, (left, top, right, bottom) in enumerate(boxes):
                assert 0 <= left < right <= scene.size[0]
                assert 0 <= top < bottom <= scene.size[1]
                for other in boxes[:index]:
                    assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_an_unknown_level_is_told() -> None:
    with pytest.raises(ConfigError, match=r"no level 'tinny'; known: tiny, easy, .* Did you mean 'tiny'"):
        generate("tinny", 0)


def test_a_scene_of_2000_pixels_is_drawn_at_once() -> None:
    """150 ms are allowed, and it takes 5 to 15: the best of five, for the machine may do other things, too."""
    scene = replace(generate("hard", 0), size=(2000, 2000))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        generate("hard", 0)
        scene.draw()
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.15


def test_the_font_has_different_letters_of_one_size() -> None:
    assert {glyph(character).shape for character in GLYPHS} == {(7, 5)}
    assert len({glyph(character).tobytes() for character in GLYPHS}) == len(GLYPHS) == 36


# ---- held out --------------------------------------------------------------------------------------------------------
def test_no_scene_of_a_training_seed_is_held_out() -> None:
    """By what lies in which cell: not even a scene that differs in pixels or in its answer alone."""
    for level in SMALL:
        identities: list[set[int]] = []
        for first in (0, TRAINING_SEEDS):
            scenes = [generate(level, seed) for seed in range(first, first + 400)]
            assert all(is_held_out(scene) == held_out(scene.seed) for scene in scenes)
            identities.append({scene.identity for scene in scenes})
        assert min(map(len, identities)) > 300
        assert not identities[0] & identities[1]


def test_the_identity_is_what_lies_where() -> None:
    scene = generate("hard", 0)
    card = scene.cards[0]
    left, top, right, bottom = card.box
    nudged = replace(card, box=(left + 1, top, right + 1, bottom), detail="Z")
    same = replace(scene, cards=(nudged, *scene.cards[1:]), seed=9, text="?", answer="!", ground=(0, 0, 0))
    assert same.identity == scene.identity
    assert replace(scene, shapes=scene.shapes[::-1]).identity == scene.identity
    other = "red" if card.color != "red" else "blue"
    for changed in (replace(card, color=other), replace(card, cell=(card.cell[0], (card.cell[1] + 1) % scene.cells))):
        assert replace(scene, cards=(changed, *scene.cards[1:])).identity != scene.identity


# ---- the answer is right ---------------------------------------------------------------------------------------------
def expected_answer(scene: Scene) -> str:
    """Worked out from question and cards alone."""
    if match := re.search(r"the (\w+) card", scene.text):
        (card,) = [card for card in scene.cards if card.color == match[1]] if scene.category != "position" else [None]
        if card is not None:
            return str(len(card.detail)) if scene.category == "dots" else card.detail
    if match := re.search(r"the letter (\w)", scene.text):
        return str(sum(card.detail == match[1] for card in scene.cards))
    if match := re.search(r"Is the card (\w) .* the card (\w)\?", scene.text):
        one, other = (next(card for card in scene.cards if card.detail == letter).box for letter in match.groups())
        if "left of" in scene.options:
            return "left of" if one[0] < other[0] else "right of"
        return "above" if one[1] < other[1] else "below"
    (odd,) = [card for card in scene.cards if [other.detail for other in scene.cards].count(card.detail) == 1]
    return odd.color


@pytest.mark.parametrize("level", LEVELS)
def test_every_answer_is_right_and_no_answer_is_usual(level: str) -> None:
    answers: dict[str, list[str]] = {}
    for seed in range(300):
        scene = generate(level, seed)
        assert scene.answer == expected_answer(scene)
        if scene.options:
            assert scene.answer in scene.options
            assert len(set(scene.options)) == len(scene.options)
        answers.setdefault(scene.category, []).append(scene.answer)
    for category, given in answers.items():  # of n answers a policy that always says the same gets 1/n
        most = max(map(given.count, given)) / len(given)
        assert most < {"pattern": 0.35, "position": 0.5, "tally": 0.4}.get(category, 0.3), category


def test_the_right_option_stands_anywhere() -> None:
    scenes = [scene for seed in range(300) if (scene := generate("hard", seed)).category == "text"]
    places = [scene.options.index(scene.answer) for scene in scenes]
    assert {places.count(place) > len(scenes) / 8 for place in range(4)} == {True}


# ---- the answer can't be seen from afar, and is seen in what the expert shows ----------------------------------------
def alternatives(scene: Scene) -> list[Image.Image]:
    """The scene with one detail after the other on the first card that matters."""
    card = scene.must_see[0]
    if scene.kind == "pattern":
        details = list(PATTERNS)
    elif scene.kind == "dots":
        details = [DOTS[:count] for count in range(1, 10, 2)]
    else:
        letters = DIGITS if scene.category == "digit" else "LWTCXE"  # little ink and much, at the left and at the right
        details = [letter * len(card.detail) for letter in letters]
    return [with_detail(scene, card, detail).draw() for detail in details]


def with_detail(scene: Scene, card: Card, detail: str) -> Scene:
    return replace(scene, cards=tuple(replace(c, detail=detail) if c is card else c for c in scene.cards))


def small(picture: Image.Image, side: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """As a model is shown it: cut, and reduced or enlarged to `side` on its longer side."""
    cut = picture if box is None else picture.crop(box)
    scale = side / max(cut.size)
    return np.asarray(cut.resize((round(cut.width * scale), round(cut.height * scale)))).astype(int)


@EACH
def test_no_answer_is_seen_from_afar_and_each_is_in_the_expert_s_cut(scene: Scene) -> None:
    """Of 255 levels no pixel of the whole changes by more than 20, whatever the detail; in the cut 40 and more, and
    that between any two details."""
    pictures, side = alternatives(scene), scene.hidden_up_to
    whole = np.stack([np.asarray(reduced(Picture(picture), side).image).astype(int) for picture in pictures])
    assert (whole.max(0) - whole.min(0)).max() <= 20
    box = view(scene, scene.must_see[0], LEVELS[scene.level].shown)
    cuts = [small(picture, LEVELS[scene.level].shown, box) for picture in pictures]
    assert min(np.abs(one - other).max() for index, one in enumerate(cuts) for other in cuts[:index]) >= 40


def probed(level: str, category: str, details: Sequence[str], count: int) -> float:
    """How often a classifier names the detail of the card that matters, having been shown `count` other scenes and
    where the card is: Gaussian, of how the reduced face varies along rows and columns and of its pixels."""
    seeds = (seed for seed in range(100_000) if generate(level, seed).category == category)
    drawn = [(detail, face_from_afar(next(seeds), level, detail)) for _ in range(count) for detail in details]
    names, faces = np.array([name for name, _ in drawn]), np.array([face for _, face in drawn])
    known = len(names) * 2 // 3
    faces = (faces - faces[:known].mean(0)) / faces[:known].std(0)
    scores = []
    for detail in details:
        seen = faces[:known][names[:known] == detail]
        spread = np.cov(seen.T) / 2 + np.diag(seen.var(0)) / 2 + np.eye(seen.shape[1]) / 20
        apart = faces[known:] - seen.mean(0)
        scores.append(-(apart @ np.linalg.inv(spread) * apart).sum(1) - np.linalg.slogdet(spread)[1])
    return float((np.array(details)[np.argmax(scores, 0)] == names[known:]).mean())


def inside_face(scene: Scene, side: int) -> tuple[int, int, int, int]:
    """Where all is grey of the card that matters, in a scene that is reduced to `side`."""
    left, top, right, bottom = (place * side / max(scene.size) for place in face_of(scene.must_see[0].box))
    return int(left) + 2, int(top) + 2, int(right) - 1, int(bottom) - 1


def reduced_face(scene: Scene, side: int) -> np.ndarray:
    """What `reduced` shows there, and no more of the scene: reducing all of it takes most of a test's time."""
    left, top, right, bottom = inside_face(scene, side)
    size = right - left, bottom - top
    across, down = (pixels / round(pixels * side / max(scene.size)) for pixels in scene.size)
    box = left * across, top * down, right * across, bottom * down
    return np.asarray(scene.picture().image.getchannel(0).resize(size, Image.Resampling.LANCZOS, box=box)).astype(float)


@pytest.mark.parametrize("level", LEVELS)
def test_a_face_alone_is_reduced_as_within_its_scene(level: str) -> None:
    for scene in (generate(level, seed) for seed in range(3)):
        side = scene.hidden_up_to
        left, top, right, bottom = inside_face(scene, side)
        whole = np.asarray(reduced(scene.picture(), side).image)
        assert (reduced_face(scene, side) == whole[top:bottom, left:right, 0]).all()


def face_from_afar(seed: int, level: str, detail: str) -> np.ndarray:
    scene = generate(level, seed)
    card = scene.must_see[0]
    scene = with_detail(scene, card, detail * (len(card.detail) if scene.kind == "text" else 1))
    face = reduced_face(scene, scene.hidden_up_to)
    lines = [face.mean(1), face.mean(0)]
    steps = [np.diff(face, axis=0), np.diff(face, axis=1), *(np.diff(line, 2) for line in lines)]
    varies = [face.std(), *(line.std() for line in lines), *(np.abs(step).mean() for step in steps)]
    pixels = Image.fromarray(face.astype(np.float32)).resize((6, 6), Image.Resampling.BILINEAR)
    return np.concatenate([np.log(np.array(varies) + 0.01), (np.asarray(pixels) - face.mean()).ravel()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "category", "details", "count", "guess"),
    [
        ("tiny", "pattern", PATTERNS, 450, 1 / 4),
        ("easy", "pattern", PATTERNS, 450, 1 / 4),
        ("medium", "digit", ("1", "8"), 180, 1 / 2),
        ("medium", "dots", (DOTS[:1], DOTS), 180, 1 / 2),
        ("hard", "text", ("L", "W"), 120, 1 / 2),
    ],
)
def test_no_classifier_reads_it_from_afar(
    level: str, category: str, details: Sequence[str], count: int, guess: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was made for that, and is told where the card is: it does hardly better than a guess. Without speckles
    it reads patterns and letters; digits and dots leave little."""
    most = guess + 0.13
    assert probed(level, category, details, count) < most
    monkeypatch.setattr("vlm_agents.envs.visual_search.scene.SPECKLE", dict.fromkeys(SPECKLE, 0))
    assert category in ("digit", "dots") or probed(level, category, details, count) > most


def test_shown_larger_it_is_seen() -> None:
    """The bound bites: with strokes of 1.2 pixels the patterns of a scene differ by far more than 20 levels."""
    scene = generate("tiny", 0)
    assert scene.hidden_up_to == 84  # 0.42 * 1000 / 5
    side = round(LEGIBLE * 1000 / scene.stroke)
    whole = np.stack([small(picture, side) for picture in alternatives(scene)])
    assert (whole.max(0) - whole.min(0)).max() >= 60


@pytest.mark.parametrize(
    ("kind", "details"),
    [("pattern", PATTERNS), ("dots", ("a", "aei", DOTS)), ("text", (*CHARACTERS, "ABCD"))],
)
def test_every_detail_has_the_mean_of_the_card(kind: str, details: tuple[str, ...]) -> None:
    for detail in details:
        assert abs(detail_tile(kind, detail, 20).mean()) < 0.5  # pyright: ignore[reportArgumentType]
    assert set(HIDDEN) == {"pattern", "dots", "text"}


# ---- the expert ------------------------------------------------------------------------------------------------------
def shown_by(saying: Saying, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    shown: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self))
    exec(saying.code, {"image_clue_0": picture})
    return shown


@EACH
def test_the_expert_s_code_shows_each_card_that_matters(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    shown_side = LEVELS[scene.level].shown
    look, last = solve(scene, shown_side)
    assert last.answer == scene.answer
    assert not look.answer
    shown = shown_by(look, scene.draw(), monkeypatch)
    assert len(shown) == len(scene.must_see)
    for picture, card in zip(shown, scene.must_see, strict=True):
        assert max(picture.size) == shown_side
        left, top, right, bottom = view(scene, card, shown_side)
        assert left <= card.box[0] < card.box[2] <= right
        assert top <= card.box[1] < card.box[3] <= bottom
        assert scene.stroke * shown_side / max(right - left, bottom - top) >= LEGIBLE


def test_what_it_says_on_a_tiny_scene() -> None:
    """Few programs: one a cell. The nine cells are 333 pixels wide."""
    scene = generate("tiny", 3)
    column, row = scene.cards[0].cell
    box = (column * 333, row * 333, column * 333 + 333, row * 333 + 333)
    look, last = solve(scene)
    assert look.thought == (
        f"I see {said(scene)}. The {scene.cards[0].color} card is at ({column},{row})."  # its cell is a third, too
    )
    assert look.action == f"```python\nimage_clue_0.crop({box}).resize((84, 84)).show()\n```"
    assert (last.thought, last.action) == (f"The pattern on it is {scene.answer}.", f"\\boxed{{{scene.answer}}}")
    assert len({solve(generate("tiny", seed))[0].code for seed in range(200)}) == 9


def said(scene: Scene) -> str:
    """All that lies there, from the upper left on, row by row."""
    things = [(card.cell, f"{card.color} card") for card in scene.cards]
    things += [(shape.cell, f"{shape.color} {shape.kind}") for shape in scene.shapes]
    inorder = sorted(things, key=lambda thing: (thing[0][1], thing[0][0]))
    return ", ".join(f"{words} ({cell[0]},{cell[1]})" for cell, words in inorder)


def test_where_there_is_much_the_card_alone_is_named() -> None:
    scene = next(scene for seed in range(99) if (scene := generate("hard", seed)).category == "text")
    card = scene.must_see[0]
    assert solve(scene)[0].thought == f"The {card.color} card is at {place(scene, card)}."


@pytest.mark.parametrize(("box", "words"), [((0, 0, 9, 9), "(0,0)"), ((495, 0, 505, 9), "(1,0)")])
def test_a_place_in_thirds(box: tuple[int, int, int, int], words: str) -> None:
    scene = generate("tiny", 0)
    assert place(scene, replace(scene.cards[0], box=box)) == words


def test_a_scene_is_a_question_whose_picture_is_drawn_when_called_for() -> None:
    scene = generate("easy", 7)
    question = scene.question()
    assert question.asked == f"{scene.text}\n(A) horizontal\n(B) vertical\n(C) checked\n(D) plain"
    assert question.boxes == (scene.cards[0].box,)
    file = io.BytesIO()
    question.pictures[0]().image.save(file, "PNG")
    assert Image.open(file).size == (1200, 1200)
