"""What is written is what is read; what is broken is named; what was whole stays whole."""

import dataclasses
import json
import logging
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_agents.episodes import EpisodeWriter, read_episodes
from vlm_agents.errors import DataError
from vlm_agents.pictures import Picture
from vlm_agents.types import Advice, Message, Observation, Parsed, Reply, Step, Trajectory, Turn


def frame(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(12, 10, 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels))


def observation(seed: int) -> Observation:
    advice = Advice('a "plan"\nwith lines', "left", 2) if seed % 2 else None
    return Observation(f"room {seed} \u2028 é", (frame(seed),), ("left", "right"), f"key{seed}", advice)


def turn(seed: int) -> Turn:
    now, odd = observation(seed), seed % 2 == 1
    logprobs = tuple(np.float32(x).item() for x in np.random.default_rng(seed).normal(size=50))
    earlier = Message("assistant", ("before",), token_ids=(5, 6))
    return Turn(
        observation=now,
        prompt=(Message("system", ("rules",)), earlier, Message("user", ("look", *now.images, " here"))),
        reply=Reply("hm \U0001f600", (1, 2), (3,) * 50, logprobs, 0.1, 1.5, "length"),
        parsed=Parsed("left", (1, 4), (6, 9)) if seed % 2 else Parsed(None, error="no JSON"),
        step=Step(
            observation(seed + 1), 0.1 + 0.2, False, seed % 2 == 1, False, True, seed % 2 == 0, {"progress": 0.5}
        ),
        rating=2.5 if odd else None,
        bonuses={} if odd else {"invalid": -0.1},
    )


def trajectory(seed: int, turns: int = 2) -> Trajectory:
    return Trajectory("room", seed, "model", tuple(turn(seed + i) for i in range(turns)), "time_limit", math.pi)


EPISODES = [trajectory(0), trajectory(3, turns=3), Trajectory("room", 9, "model", (), "env_error", error="it died")]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with three episodes."""
    writer = EpisodeWriter(tmp_path)
    for episode in EPISODES:
        writer.append(episode)
    return tmp_path


def lines(run_dir: Path) -> list[bytes]:
    return (run_dir / "episodes.jsonl").read_bytes().splitlines(keepends=True)


def test_what_is_written_is_what_is_read(run_dir: Path):
    assert list(read_episodes(run_dir)) == EPISODES


def test_episodes_are_read_without_their_pictures(run_dir: Path):
    def told(episode: Trajectory) -> list:
        return [episode.seed, episode.stop, *((turn.reply, turn.parsed, turn.step.reward) for turn in episode.turns)]

    for picture in (run_dir / "images").iterdir():
        picture.unlink()
    read = list(read_episodes(run_dir, pictures=False))
    assert [told(episode) for episode in read] == [told(episode) for episode in EPISODES]
    frames = {id(picture) for episode in read for turn in episode.turns for picture in turn.observation.images}
    assert len(frames) == 1
    (run_dir / "episodes.jsonl").write_text('{"seed": 3}\n')
    with pytest.raises(DataError, match=r"episodes\.jsonl:1: not an episode"):
        next(read_episodes(run_dir, pictures=False))


def test_equal_frames_are_one_file_and_one_object(run_dir: Path):
    # episode 0 shows rooms 0, 1, 2; episode 3 rooms 3, 4, 5, 6: seven frames, each in several places
    assert len(list((run_dir / "images").glob("*.png"))) == 7
    (first, *_) = read_episodes(run_dir)
    assert first.turns[0].step.observation.images[0] is first.turns[1].observation.images[0]
    assert first.turns[0].observation.images[0] is first.turns[0].prompt[2].parts[1]


def test_frames_of_equal_bytes_but_other_shape_or_palette_are_told_apart(tmp_path: Path):
    grey = Image.frombytes("L", (6, 4), bytes(range(24)))
    wide = Image.frombytes("L", (4, 6), bytes(range(24)))
    warm, cold = (Image.frombytes("P", (6, 4), bytes(range(24))) for _ in range(2))
    warm.putpalette(list(range(72)))
    cold.putpalette(list(range(100, 172)))
    images = tuple(map(Picture, (grey, wide, warm, cold)))
    turns = (dataclasses.replace(turn(0), observation=Observation("four", images)),)
    EpisodeWriter(tmp_path).append(Trajectory("room", 0, "model", turns, "failure"))
    (episode,) = read_episodes(tmp_path)
    loaded = episode.turns[0].observation.images
    assert loaded == images
    assert len({picture.key for picture in loaded}) == 4
    for before, after in zip((grey, wide, warm, cold), loaded, strict=True):
        assert (after.image.mode, after.image.tobytes()) == ("RGB", before.convert("RGB").tobytes())


def test_a_second_writer_appends_and_rewrites_no_image(run_dir: Path):
    before = {path.name: path.stat().st_mtime_ns for path in (run_dir / "images").iterdir()}
    EpisodeWriter(run_dir).append(EPISODES[0])
    assert list(read_episodes(run_dir)) == [*EPISODES, EPISODES[0]]
    assert {path.name: path.stat().st_mtime_ns for path in (run_dir / "images").iterdir()} == before


def test_an_unfinished_last_line_is_dropped_with_a_warning(run_dir: Path, caplog: pytest.LogCaptureFixture):
    path = run_dir / "episodes.jsonl"
    path.write_bytes(b"".join(lines(run_dir)) + b'{"env": "ro')
    with caplog.at_level(logging.WARNING):
        assert list(read_episodes(run_dir)) == EPISODES
        writer = EpisodeWriter(run_dir)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:4: skipped an unfinished last line",
        f"{path}: dropped 11 bytes of an unfinished last line",
    ]
    writer.append(EPISODES[1])
    assert list(read_episodes(run_dir)) == [*EPISODES, EPISODES[1]]


def test_a_picture_that_a_crash_left_empty_is_written_again(run_dir: Path):
    for path in (run_dir / "images").iterdir():
        path.write_bytes(b"")
    EpisodeWriter(run_dir, anew=True).append(*EPISODES)
    assert list(read_episodes(run_dir)) == EPISODES


def test_a_writer_can_start_anew(run_dir: Path):
    writer = EpisodeWriter(run_dir, anew=True)
    writer.append(EPISODES[2])
    writer.sync()
    assert list(read_episodes(run_dir)) == [EPISODES[2]]


@pytest.mark.parametrize(
    "broken",
    [b'{"env": "room", "se\n', b"\xff\xfe\n", b"[]\n", b'{"env": "room"}\n', b'{"colour": "red"}\n', b"\n"],
)
def test_a_corrupted_line_is_named(run_dir: Path, broken: bytes):
    first, _, third = lines(run_dir)
    (run_dir / "episodes.jsonl").write_bytes(first + broken + third)
    episodes = read_episodes(run_dir)
    assert next(episodes) == EPISODES[0]
    with pytest.raises(DataError, match=r"episodes\.jsonl:2: not an episode .* Delete this line"):
        next(episodes)


def at(*keys: str | int) -> Callable[[dict, Any], None]:
    """Sets what lies there in an episode."""

    def change(episode: dict, value: Any) -> None:
        *path, last = keys
        for key in path:
            episode = episode[key]
        episode[last] = value

    return change


TURN = ("turns", 0)
IMAGE = (*TURN, "observation", "images", 0, "picture")


WRONG = [
    (at("env"), 5, "5 is no str"),
    (at("seed"), "5", "'5' is no int"),
    (at("seed"), True, "True is no int"),
    (at("seed"), 1.0, "1.0 is no int"),
    (at("seed"), 1 << 63, "9223372036854775808 is no int"),
    (at("stop"), "won", "'won' is no "),
    (at("bootstrap"), math.nan, "nan is no float"),
    (at("bootstrap"), -(10**400), "is no float"),
    (at("turns"), {}, "{} is no tuple"),
    (at("turns", 0), None, "None is no Turn"),
    (at(*TURN, "prompt"), "text", "'text' is no tuple"),
    (at(*TURN, "prompt", 0, "role"), "boss", "'boss' is no "),
    (at(*TURN, "reply", "text"), ["a"], "['a'] is no str"),
    (at(*TURN, "reply", "logprobs"), [0.0, math.inf], "is no tuple"),
    (at(*TURN, "reply", "token_ids"), [1, [2]], "is no tuple"),
    (at(*TURN, "parsed", "action_span"), [1], "[1] is no tuple"),
    (at(*TURN, "step", "reward"), None, "None is no float"),
    (at(*TURN, "step", "terminated"), 1, "1 is no bool"),
    (at(*TURN, "step", "metrics"), {"success": "yes"}, "is no Mapping"),
    (at(*IMAGE), 7, "7 names no image"),
    (at(*IMAGE[:-1]), "0123456789abcdef", "is no Picture"),
    (at(*IMAGE), "../images/0123456789abcdef", "such a name is 16 hex digits"),
    (at(*IMAGE), "0123456789ABCDEF", "such a name is 16 hex digits"),
]


@pytest.mark.parametrize(("change", "value", "said"), WRONG, ids=[said for *_, said in WRONG])
@pytest.mark.parametrize("pictures", [True, False])
def test_a_wrong_type_is_named_with_its_line(
    run_dir: Path, change: Callable[[dict, Any], None], value: Any, said: str, pictures: bool
):
    first, second, third = lines(run_dir)
    episode = json.loads(second)
    change(episode, value)
    (run_dir / "episodes.jsonl").write_bytes(first + json.dumps(episode).encode() + b"\n" + third)
    with pytest.raises(DataError) as refused:
        list(read_episodes(run_dir, pictures))
    assert str(refused.value).startswith(f"{run_dir}/episodes.jsonl:2: not an episode (")
    assert said in str(refused.value)


def test_a_line_that_nests_too_deeply_is_named(run_dir: Path):
    (run_dir / "episodes.jsonl").write_text('{"env": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=r"episodes\.jsonl:1: not an episode"):
        list(read_episodes(run_dir))


@pytest.mark.parametrize("harm", ["missing", "cut", "empty", "bomb", "pipe"])
def test_a_broken_image_is_named_with_the_line_that_wants_it(run_dir: Path, harm: str):
    (second,) = (episode for episode in read_episodes(run_dir) if episode.seed == 3)
    names = {path: Image.open(path).tobytes() for path in (run_dir / "images").iterdir()}
    (path,) = (
        path for path, pixels in names.items() if pixels == second.turns[2].observation.images[0].image.tobytes()
    )
    del second
    if harm in ("missing", "pipe"):
        path.unlink()
        if harm == "pipe":
            os.mkfifo(path)
    elif harm == "bomb":
        Image.new("1", (10_000, 10_000)).save(path)  # 12 kB
    else:
        path.write_bytes(path.read_bytes()[: 60 if harm == "cut" else 0])
    with pytest.raises(DataError, match=rf"episodes\.jsonl:2: can't read image {path} "):
        list(read_episodes(run_dir))


def test_a_folder_without_episodes_names_their_writers(tmp_path: Path):
    with pytest.raises(DataError, match=r"no .*episodes\.jsonl: it is written by stage=collect"):
        next(read_episodes(tmp_path))


def test_a_full_disk_leaves_the_earlier_episodes_intact(run_dir: Path):
    writer = EpisodeWriter(run_dir)
    size = (run_dir / "episodes.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))  # the line then fits only in part
    try:
        with pytest.raises(DataError, match=r"can't write .*episodes\.jsonl"):
            writer.append(EPISODES[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (run_dir / "episodes.jsonl").stat().st_size == size
    writer.append(EPISODES[0])
    assert list(read_episodes(run_dir)) == [*EPISODES, EPISODES[0]]


def test_a_number_that_json_lacks_is_refused_before_anything_is_written(run_dir: Path):
    with pytest.raises(ValueError, match="Out of range float"):
        EpisodeWriter(run_dir).append(dataclasses.replace(EPISODES[0], bootstrap=math.nan))
    assert list(read_episodes(run_dir)) == EPISODES


# ---- earlier versions ------------------------------------------------------------------------------------------------
VERSION_1 = Path(__file__).parent / "episodes_of_version_1"


def test_each_line_says_its_version(run_dir: Path):
    assert [json.loads(line)["version"] for line in lines(run_dir)] == [2] * 3
    episode = json.loads(lines(run_dir)[1]) | {"version": 3, "turns": "in another way"}
    (run_dir / "episodes.jsonl").write_bytes(lines(run_dir)[0] + json.dumps(episode).encode() + b"\n")
    told = r"episodes\.jsonl:2: an episode of layout 3, and this vlm_agents reads those up to 2: install the version"
    with pytest.raises(DataError, match=told):
        list(read_episodes(run_dir))
    (run_dir / "episodes.jsonl").write_text(json.dumps(episode | {"version": "new"}) + "\n")
    with pytest.raises(DataError, match=r"episodes\.jsonl:1: not an episode \(.*'new' is no version"):
        list(read_episodes(run_dir))


def test_episodes_of_version_1_are_read():
    """Two episodes of Echo as that version wrote them: an expert's with two random moves, rated; and a model's, none of
    whose replies was legal (env.invalid_penalty=0.1), with history=full."""
    expert, model = read_episodes(VERSION_1)
    assert (expert.policy, expert.seed, expert.member, expert.stop, expert.tags) == (
        "expert+noise0.3", 804401681, 0, "failure", {},
    )  # fmt: skip
    assert [turn.reply.source for turn in expert.turns] == ["random", "random", "expert"]
    assert [turn.rating for turn in expert.turns] == [10.0, 0.0, 10.0]
    assert [(turn.step.success, turn.step.legal, turn.step.changed) for turn in expert.turns] == [
        (False, True, True)
    ] * 3
    assert all(turn.step.metrics == {} == turn.bonuses for turn in (*expert.turns, *model.turns))
    assert expert.total_reward == pytest.approx(2 / 3)
    first = expert.turns[0]
    assert first.prompt[1].parts == (first.observation.images[0], "Turn 1 of 3. Name the colour.")
    assert first.observation.images[0].key == "94eced65c6fa1453"  # the file's name, then as now
    assert {turn.reply.source for turn in model.turns} == {"model"}
    assert [(turn.rating, turn.step.legal, turn.parsed.choices) for turn in model.turns] == [(None, False, {})] * 2
    assert model.total_reward == pytest.approx(-0.2)
    assert model.turns[0].reply.token_ids == (362, 19, 386, 19, 601, 382, 382, 589, 297, 2)
    assert model.turns[1].prompt[2].token_ids == model.turns[0].reply.token_ids
    assert model.turns[1].observation.images[0] is model.turns[1].prompt[-1].parts[0]


def test_what_is_written_behind_episodes_of_version_1_is_read_with_them(tmp_path: Path):
    shutil.copytree(VERSION_1, tmp_path, dirs_exist_ok=True)
    before = list(read_episodes(tmp_path))
    EpisodeWriter(tmp_path).append(*before)
    assert list(read_episodes(tmp_path)) == [*before, *before]
    assert len(list((tmp_path / "images").iterdir())) == 5  # none is written under another name
