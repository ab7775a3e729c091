"""A schematic picture of a household, drawn from the game's facts: no photograph, and none of THOR's frames.

A tile for each receptacle: framed where the agent is, a bar on top where it is shut, half a bar where it was opened.
Below, past a line, what is in sight: the objects in or on the receptacles that the agent is at, unless they are shut.
In the last row, what it holds. Each kind of thing has a pattern of its own in two colours; from 56 pixels a tile on its
name is written, too. Marks in an object's corners: hot, cool, clean, turned on.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from vlm_agents.envs.alfworld.pddl import State
from vlm_agents.pictures import Picture
from vlm_agents.seeds import stable_hash

CELLS = 4  # of a pattern's side
NAMED = 56  # pixels of a tile from which on it has room for a name
GROUND, LINE = (245, 245, 240), (40, 40, 40)
MARKS = {"ishot": (220, 60, 40), "iscool": (60, 120, 230), "isclean": (60, 180, 90), "istoggled": (250, 210, 40)}
DARK = ((150, 60, 50), (60, 90, 150), (70, 120, 60), (130, 80, 140), (150, 110, 40), (60, 120, 130), (90, 90, 90))
LIGHT = ((245, 200, 190), (190, 210, 245), (200, 230, 190), (230, 200, 240), (245, 225, 170), (190, 230, 235))


def draw(state: State, names: Mapping[str, str], tile: int) -> Picture:
    """[rows*tile columns*tile 3] the household, `tile` pixels a thing."""
    spots = {place: spot for _, place, spot in state.with_predicate("receptacleatlocation")}
    places = sorted(spots, key=lambda place: _order(names, place))
    here = {spot for _, _, spot in state.with_predicate("atlocation")}
    shut = {place for _, place in state.with_predicate("openable")}
    opened = {place for _, place in state.with_predicate("opened")} & shut
    shut -= opened
    inside = [(thing, place) for _, thing, place in state.with_predicate("inreceptacle")]
    seen = [thing for thing, place in inside if spots.get(place) in here and place not in shut]
    held = [thing for _, _, thing in state.with_predicate("holds")]

    columns = max(2, math.ceil(math.sqrt(len(places))))
    rows, sight = math.ceil(len(places) / columns), max(1, math.ceil(len(seen) / columns))
    picture = Image.new("RGB", (columns * tile, (rows + sight + 1) * tile), GROUND)
    for index, place in enumerate(places):
        drawn = _receptacle(names[place], tile, spots[place] in here, place in shut, place in opened)
        picture.paste(drawn, _at(index, columns, tile))
    for index, thing in enumerate(sorted(seen, key=lambda thing: _order(names, thing))):
        picture.paste(_object(state, names, thing, tile), _at(index + rows * columns, columns, tile))
    for thing in held:
        picture.paste(_object(state, names, thing, tile), _at((rows + sight) * columns, columns, tile))
    lines = ImageDraw.Draw(picture)
    for row in (rows, rows + sight):
        lines.line((0, row * tile, columns * tile, row * tile), LINE, max(1, tile // 28))
    return Picture(picture)


def _at(index: int, columns: int, tile: int) -> tuple[int, int]:
    return index % columns * tile, index // columns * tile


def _order(names: Mapping[str, str], name: str) -> tuple[str, int]:
    kind, _, number = names[name].partition(" ")
    return kind, int(number or 0)


def _receptacle(name: str, tile: int, here: bool, shut: bool, opened: bool) -> Image.Image:
    picture = _tile(name, tile, tile // 7).copy()
    pen, bar = ImageDraw.Draw(picture), max(2, tile // 9)
    if shut or opened:
        pen.rectangle((0, 0, tile - 1 if shut else tile // 2, bar - 1), LINE)
    if here:
        pen.rectangle((0, 0, tile - 1, tile - 1), outline=(230, 40, 40), width=max(2, tile // 14))
    return picture


def _object(state: State, names: Mapping[str, str], thing: str, tile: int) -> Image.Image:
    picture = _tile(names[thing], tile, tile // 4).copy()
    pen, side = ImageDraw.Draw(picture), max(3, tile // 6)
    for index, (mark, color) in enumerate(MARKS.items()):
        if (mark, thing) in state.facts:
            x, y = (index % 2) * (tile - side), (index // 2) * (tile - side)
            pen.rectangle((x, y, x + side - 1, y + side - 1), color)
    return picture


@lru_cache(maxsize=1024)
def _tile(name: str, tile: int, inset: int) -> Image.Image:
    """The pattern of a thing's kind, and its name where there is room."""
    kind, _, number = name.strip().partition(" ")
    picture = Image.new("RGB", (tile, tile), GROUND)
    inner = tile - 2 * inset
    named = tile >= NAMED
    place = inset, inset - (tile // 14 if named else 0)
    picture.paste(_pattern(kind).resize((inner, inner), Image.Resampling.NEAREST), place)
    if named:
        words = f"{kind[: tile // 6 - 3]} {number}"
        ImageDraw.Draw(picture).text((tile // 2, tile - tile // 9), words, LINE, anchor="ms", font_size=10)
    return picture


@lru_cache(maxsize=512)
def _pattern(kind: str) -> Image.Image:
    """[4 4 3] a pattern that is the kind's own, symmetrical from left to right."""
    bits = stable_hash("schematic", kind)
    dark, light = DARK[bits % len(DARK)], LIGHT[bits // 7 % len(LIGHT)]
    half = np.array([(bits >> (16 + place)) & 1 for place in range(CELLS * CELLS // 2)]).reshape(CELLS, CELLS // 2)
    whole = np.concatenate([half, half[:, ::-1]], axis=1)[..., None]
    return Image.fromarray(np.where(whole == 1, dark, light).astype(np.uint8))
