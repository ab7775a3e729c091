"""Captioned frames, GIFs and the HTML page, from episodes made here."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from vlm_agents.errors import DataError
from vlm_agents.frames import ACCENT, BAD, captioned_frame, episode_gif
from vlm_agents.pictures import Picture
from vlm_agents.report import Curve, Example, Result, Shown, lost, read_curves, strayed, write_report
from vlm_agents.types import Advice, Message, Observation, Parsed, Reply, Step, Trajectory, Turn

HOSTILE = 'naïve 🙂 </script><script>alert(1)</script><!-- "\u2028 \ud800'
RED, BLUE = (tuple(bytes.fromhex(colour[1:])) for colour in (BAD, ACCENT))


def see(shade: int, side: int = 56) -> Observation:
    return Observation("go to the goal", (Picture(Image.new("RGB", (side, side), (0, shade, 0))),), ("left", "forward"))


def make_turn(shade: int = 0, side: int = 56, thought: str = "the goal is ahead", value: float | None = 0.5) -> Turn:
    head, middle = '{"thoughts": "', '", "action": "'
    first = len(head) + len(thought) + len(middle)
    parsed = Parsed("forward", (len(head), len(head) + len(thought)), (first, first + len("forward")))
    now = see(shade, side)
    return Turn(
        now,
        (Message("system", ("Play.",)), Message("user", (*now.images, f"turn {shade}"))),
        Reply(f'{head}{thought}{middle}forward"}}', value=value),
        parsed,
        Step(see(shade + 1, side), 0.25, False, False, False, True, True),
    )


def unparsable_turn(text: str, side: int = 56) -> Turn:
    return replace(make_turn(side=side), reply=Reply(text), parsed=Parsed(None, error="no JSON object in the reply"))


def episode(*turns: Turn) -> Trajectory:
    return Trajectory("MiniGrid-Empty-5x5-v0", 2**63 + 1, "model", turns, "success")


def report(path: Path, *episodes: Trajectory, **changes) -> str:
    plain = {"title": "eval", "sentence": "a run", "episodes": [Shown(episode, "model") for episode in episodes]}
    write_report(path / "report.html", **(plain | changes))
    return (path / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The elements of a page and the content of its JSON block."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.block = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] == [("script", {"type": "application/json", "id": "block"})]:
            self.block += data

    @property
    def data(self) -> dict:
        return json.loads(self.block)


# ---- pictures ------------------------------------------------------------------------------------------------------
# Margins of 16 round picture and caption; the caption is 304 wide; the picture grows by the largest whole factor that
# keeps it within 336, or shrinks to 640: 56 * 6 = 336, 168 * 2 = 336, 200 * 1, 600 * 1, 1280 / 2.
@pytest.mark.parametrize(("side", "shown"), [(56, 336), (168, 336), (200, 200), (600, 600), (1280, 640)])
def test_frame_enlarges_by_whole_factors(side: int, shown: int):
    frame = captioned_frame(make_turn(shade=255, side=side), 0)
    assert frame.size == (shown + 304 + 3 * 16, max(shown, 224) + 2 * 16)
    assert sum(count for count, colour in frame.getcolors(1 << 16) or [] if colour == (0, 255, 0)) == shown * shown


@pytest.mark.parametrize("side", [56, 168])
def test_frame_is_red_only_without_an_action(side: int):
    def colours(turn: Turn) -> set:
        return {colour for _, colour in captioned_frame(turn, 0).getcolors(1 << 16) or []}

    fine, broken = colours(make_turn(side=side)), colours(unparsable_turn(HOSTILE, side))
    assert BLUE in fine
    assert RED not in fine
    assert RED in broken
    assert BLUE not in broken


@pytest.mark.parametrize("thought", ["", "x" * 3000, "many words " * 300, HOSTILE])
def test_caption_of_any_text_stays_inside_its_canvas(thought: str):
    frame = captioned_frame(make_turn(thought=thought), 0)
    assert frame.size == captioned_frame(make_turn(), 0).size
    # White are the gap between picture (ends at 16 + 336) and caption, the right margin, and the lower one; a glyph may
    # lean out of its line by 2 pixels.
    for box in ((352, 0, 366, 368), (674, 0, 688, 368), (352, 354, 688, 368)):
        assert {colour for _, colour in frame.crop(box).getcolors(1 << 16) or []} == {(255, 255, 255)}


@pytest.mark.timeout(20)
def test_caption_of_millions_of_characters_takes_no_time():
    """Only what is shown is measured: one word of 40,000 characters took half a minute."""
    for word in ("x" * 2_000_000, "\u0301" * 2_000_000):
        turn = make_turn(thought=word)
        assert captioned_frame(turn, 0).size == captioned_frame(make_turn(), 0).size
        captioned_frame(replace(turn, observation=Observation(word), parsed=Parsed(word, error=word)), 0)


def test_gif_of_an_env_with_an_endless_name(tmp_path: Path):
    endless = replace(episode(make_turn()), env="e" * 2_000_000, policy="p" * 2_000_000)
    episode_gif(endless, tmp_path / "episode.gif")
    episode_gif(replace(endless, env="e" * 400, policy="p" * 400), tmp_path / "short.gif")
    assert (tmp_path / "episode.gif").read_bytes() == (tmp_path / "short.gif").read_bytes()


def test_a_transparent_frame_is_shown_over_white(tmp_path: Path):
    clear = Picture(Image.new("RGBA", (56, 56), (0, 0, 0, 0)))
    turn = replace(make_turn(), observation=Observation("", (clear,)))
    assert captioned_frame(turn, 0).getpixel((16 + 168, 16 + 168)) == (255, 255, 255)
    data = Page(report(tmp_path, episode(turn))).data
    url = data["images"][data["episodes"][0]["seen"][0][0][0]][0]
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as shown:
        assert shown.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_frame_without_images_shows_the_text():
    turn = replace(make_turn(), observation=Observation("You are in a kitchen."))
    blank = replace(turn, observation=Observation(""))
    assert captioned_frame(turn, 0).size == captioned_frame(blank, 0).size
    assert captioned_frame(turn, 0).tobytes() != captioned_frame(blank, 0).tobytes()


def test_gif_has_a_frame_per_turn_and_the_outcome(tmp_path: Path):
    # Identical turns count too; the largest picture (600) makes the canvas of all: 600 + 304 + 3 * 16, 600 + 2 * 16.
    turns = make_turn(), make_turn(), unparsable_turn(HOSTILE), make_turn(side=600), make_turn(side=30)
    episode_gif(episode(*turns), tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.size == (952, 632)
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert durations == [500] * 5 + [2000]
    assert (tmp_path / "episode.gif").stat().st_size < 60_000


def test_gif_of_an_episode_without_turns(tmp_path: Path):
    died = replace(episode(), stop="env_error", error="the worker died")
    episode_gif(died, tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 1


# ---- the page ------------------------------------------------------------------------------------------------------
def test_page_needs_nothing_else(tmp_path: Path):
    page = Page(report(tmp_path, episode(make_turn())))
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag
        assert tag not in {"link", "iframe", "object", "embed", "base"}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' )]+", text)) == {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    assert "@import" not in text
    assert "url(" not in text
    policy = [a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_model_text_can_not_leave_its_block(tmp_path: Path):
    clean = Page(report(tmp_path, episode(make_turn())))
    hostile = replace(episode(unparsable_turn(HOSTILE), make_turn(thought=HOSTILE)), policy=HOSTILE, error=HOSTILE)
    told = {
        "title": HOSTILE,
        "sentence": "{{data}} {{script}}",
        "facts": {HOSTILE: HOSTILE},
        "metrics": {HOSTILE: 1.0},
        "results": [Result(HOSTILE, (0.5, 0.4, 0.6), {HOSTILE: 1.0})],
        "curves": [Curve(HOSTILE, [(0, 1.0)], HOSTILE)],
        "episodes": [Shown(hostile, HOSTILE, HOSTILE)],
        "examples": [Example((Message("user", (HOSTILE,)),), HOSTILE, HOSTILE)],
    }
    page = Page(report(tmp_path, **told))
    assert page.elements == clean.elements
    assert "<" not in page.block
    assert page.block.isascii()
    assert (page.data["title"], page.data["sentence"]) == (HOSTILE, "{{data}} {{script}}")
    assert "".join(text for _, text in page.data["episodes"][0]["turns"][0]["reply"]) == HOSTILE


def test_each_distinct_frame_and_message_is_embedded_once(tmp_path: Path):
    # Turns see shades 0, 1, 0 and after them 1: two pictures; messages: one system, "turn 0" and "turn 1".
    turns = make_turn(0), make_turn(1), make_turn(0)
    page = report(tmp_path, episode(*turns), episode(*turns))
    data = Page(page).data
    assert page.count("data:image/png;base64,") == len(data["images"]) == 2
    assert len({url for url, _, _ in data["images"]}) == 2
    assert [images for images, _ in data["episodes"][1]["seen"]] == [[0], [1], [0], [1]]
    assert data["messages"] == [["system", ["Play."]], ["user", [0, "turn 0"]], ["user", [1, "turn 1"]]]
    assert [turn["prompt"] for turn in data["episodes"][0]["turns"]] == [[0, 1], [0, 2], [0, 1]]


def test_reply_is_cut_at_its_spans(tmp_path: Path):
    silent = replace(make_turn(), reply=Reply("forward"), parsed=Parsed("forward", None, (0, 7)))
    turns = make_turn(thought="🙂 é"), make_turn(thought=""), silent, unparsable_turn("")
    told = Page(report(tmp_path, episode(*turns))).data["episodes"][0]["turns"]
    head, middle, tail = ["", '{"thoughts": "'], ["", '", "action": "'], ["", '"}']
    assert told[0]["reply"] == [head, ["thought", "🙂 é"], middle, ["action", "forward"], tail]
    assert told[1]["reply"] == [head, middle, ["action", "forward"], tail]
    assert told[2]["reply"] == [["action", "forward"]]
    assert told[3]["reply"] == []
    assert told[3]["error"] == "no JSON object in the reply"


def test_numbers_reach_the_page(tmp_path: Path):
    nan, inf = float("nan"), float("inf")
    data = Page(
        report(
            tmp_path,
            episode(make_turn(value=nan), make_turn(value=None), make_turn(value=0.5)),
            metrics={"eval/success": 0.75, "eval/success_low_greedy_before": 0.5, "eval/return": nan, "own": 1.0},
            curves=[
                Curve("x", [(0, 0.5), (1, nan), (2, inf), (3, 0.7512345678)], "iteration", bounds=[(0, 1)] * 4),
                Curve("all of it lost", [(0, nan)], "iteration"),
            ],
            results=[
                Result("random", (0.1, 0.0, 0.3), {"return": nan}, main=False),
                Result("expert", (1.0, 0.9, 1.0), {"turns": 7.0}),
            ],
        )
    ).data
    panel, own = data["groups"]
    assert panel["columns"] == ["", "greedy, before"]
    assert [(row[0], row[-1]) for row in panel["rows"]] == [
        ("success", [0.75, None]), ("success_low", [None, 0.5]), ("return", [None, None])
    ]  # fmt: skip
    assert panel["rows"][0][1:3] == ["share of episodes", "episodes that ended in success"]
    assert (own["name"], own["rows"]) == ("own", [["", "", "", "", [1.0]]])
    (curve,) = data["curves"]
    assert (curve["points"], curve["bounds"]) == ([[0, 0.5], [3, 0.751235]], [[0, 1], [0, 1]])
    assert data["columns"] == ["return", "turns"]
    assert [result["others"] for result in data["results"]] == [[None, None], [None, 7.0]]
    shown = data["episodes"][0]
    assert [turn["value"] for turn in shown["turns"]] == [None, None, 0.5]
    assert shown["return"] == 0.75  # 3 * 0.25
    assert shown["seed"] == "9223372036854775809"  # 2**63 + 1, beyond what a double holds


def test_page_without_episodes_and_curves(tmp_path: Path):
    data = Page(report(tmp_path)).data
    assert data["episodes"] == data["curves"] == data["results"] == data["groups"] == data["images"] == []


def test_success_by_tag_is_a_table(tmp_path: Path):
    metrics = {"eval/success": 0.5, "eval/success/task/go-to": 0.75, "eval/episodes/task/go-to": 4.0}
    metrics |= {"eval/success/task/pick-up": 0.0, "eval/episodes/task/pick-up": 2.0}
    metrics |= {"eval/success/task/go-to_greedy": 1.0, "eval/success/task/pick-up_greedy": 0.5}
    data = Page(report(tmp_path, metrics=metrics)).data
    rows = [["go-to", 4, [0.75, 1.0]], ["pick-up", 2, [0.0, 0.5]]]
    assert data["tags"] == [{"tag": "task", "columns": ["sampled", "greedy"], "rows": rows}]
    (group,) = data["groups"]
    told = {row[0]: row[1] for row in group["rows"]}
    assert told["success/task/go-to"] == "share of episodes"


def test_bonuses_a_rating_and_parts_in_their_order_are_shown(tmp_path: Path):
    turn = make_turn()
    (picture,) = turn.observation.images
    chat = (Message("user", ("before", picture, "after", picture)),)
    turn = replace(turn, prompt=chat, rating=7.0, bonuses={"invalid": -0.1, "novelty": 0.5})
    data = Page(report(tmp_path, episode(turn))).data
    (shown,) = data["episodes"][0]["turns"]
    assert shown["bonuses"] == [["invalid", -0.1], ["novelty", 0.5]]
    assert shown["reward"] == pytest.approx(0.25 - 0.1 + 0.5)
    assert ["rating", 7.0] in shown["metrics"]
    assert data["messages"][shown["prompt"][0]] == ["user", ["before", 0, "after", 0]]
    assert len(data["images"]) == 2  # with what is seen after the turn


# ---- the expert's way ------------------------------------------------------------------------------------------------
def advised(*story: tuple[str | None, str | None, int | None]) -> Trajectory:
    """An episode of (action, advised action, its distance) a turn; no advice where that action is None."""
    seen = [Observation("", advice=None if said is None else Advice("", said, left)) for _, said, left in story]
    turns = [
        Turn(now, (), Reply(""), Parsed(action), Step(after, 0.0, False, False, False, True, True))
        for (action, _, _), now, after in zip(story, seen, [*seen[1:], Observation("")], strict=True)
    ]
    last = turns[-1]
    return episode(*turns[:-1], replace(last, step=replace(last.step, terminated=True)))


@pytest.mark.parametrize(
    ("story", "where"),
    [
        ([("a", "a", 3), ("a", "a", 2), ("b", "a", 1)], 2),  # its end is no success
        ([("b", "a", 3), ("a", "a", 2), ("a", "a", 1)], None),  # another of several shortest ways
        ([("a", "a", 3), ("b", "a", 2), ("a", "a", 2)], 1),  # no nearer than before
        ([("a", "a", 3), ("b", "a", 2), ("a", None, None)], 1),  # where the expert knows no way
        ([("a", "a", 2), ("a", "a", 2), ("a", "a", 1)], None),  # as advised, though chance had it otherwise
        ([("a", "a", None), ("b", "a", None), ("a", "a", None)], 1),  # an expert that counts no steps
        ([(None, "a", 2), ("a", "a", 2), ("a", "a", 1)], 0),  # no legal action
        ([("b", None, None), ("b", None, None)], None),  # an env without an expert
    ],
)
def test_the_first_turn_that_left_the_experts_way_is_found(tmp_path: Path, story: list, where: int | None):
    assert strayed(advised(*story)) == where
    assert Page(report(tmp_path, advised(*story))).data["episodes"][0]["strayed"] == where


@pytest.mark.parametrize(
    ("story", "where"),
    [
        ([("a", "a", 3), ("b", "a", 2), ("b", "a", 2)], 2),  # the env ended it there
        ([("b", "a", 3), ("b", "a", None), ("a", None, None), ("a", None, None)], 3),  # and there, whatever was before
        ([("b", None, None)], 0),  # without an expert too
    ],
)
def test_the_turn_that_cost_the_success_is_found(tmp_path: Path, story: list, where: int):
    failed = replace(advised(*story), stop="failure")
    assert lost(failed) == where
    assert Page(report(tmp_path, failed)).data["episodes"][0]["lost"] == where
    assert lost(advised(*story)) is None  # a success


def test_where_the_turns_ran_out_the_turn_is_lost_from_which_the_expert_knew_no_way():
    def in_time(*story: tuple[str | None, str | None, int | None]) -> Trajectory:
        *turns, last = advised(*story).turns
        over = replace(last, step=replace(last.step, terminated=False, truncated=True))
        return replace(episode(*turns, over), stop="time_limit")

    assert lost(in_time(("b", "a", 3), ("b", "a", 3))) is None
    assert lost(in_time(("a", "a", 3), ("b", "a", 2), ("a", None, None))) == 1
    assert lost(in_time(("b", "a", 2), ("a", None, None), ("a", "a", 2))) is None  # it was found again


def test_another_way_to_success_is_no_error():
    story = advised(("a", "a", 2), ("b", "a", 1))
    assert strayed(story) == 1
    last = story.turns[-1]
    solved = replace(last, step=replace(last.step, success=True))
    assert strayed(replace(story, turns=(story.turns[0], solved))) is None


# ---- curves --------------------------------------------------------------------------------------------------------
def test_curves_are_read_in_order_and_the_later_of_two_values_counts(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1.0}\n{"step": 5, "b": 2.0, "a": 2}\n{"step": 5, "a": 3.0}\n')
    assert read_curves(path) == {"a": [(0, 1.0), (5, 3.0)], "b": [(5, 2.0)]}


@pytest.mark.parametrize("line", [b'{"step": 1, "a"', b'{"a": 1.0}', b"[1]", b"\xff\xfe", b'{"step": 1, "a": "x"}'])
def test_a_damaged_metrics_line_is_named_and_left_out(tmp_path: Path, caplog, line: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "a": 1.0}\n' + line + b'\n{"step": 2, "a": 3.0}\n')
    assert read_curves(path) == {"a": [(0, 1.0), (2, 3.0)]}
    assert "metrics.jsonl, line 2 is not" in caplog.text


def test_what_was_no_number_is_no_point(tmp_path: Path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": null}\n{"step": 1, "a": 2.0}\n')
    assert read_curves(path) == {"a": [(1, 2.0)]}
    assert not caplog.text


def test_missing_metrics_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        read_curves(tmp_path / "nowhere.jsonl")
