"""The env of visual search: what is shown, what code gives, what an answer claims, and questions from files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlm_agents.config import VisualSearchConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.envs import make_env
from vlm_agents.envs.visual_search.env import VisualSearch, reduced
from vlm_agents.errors import DataError, EnvError
from vlm_agents.experts import Advised, NoExpert
from vlm_agents.experts.visual_search import Guesser, VisualSearchExpert
from vlm_agents.pictures import Picture
from vlm_agents.seeds import panel_seeds
from vlm_agents.types import Claim, Observation, Step


def env_of(**settings: object) -> VisualSearch:
    return VisualSearch(VisualSearchConfig(**{"level": "tiny", **settings}))  # pyright: ignore[reportArgumentType]


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def words(seen: Observation) -> str:
    """What is read, with sizes for pictures."""
    return "".join(part if isinstance(part, str) else f"[{part.size[0]}x{part.size[1]}]" for part in seen.parts)


def test_what_is_asked_is_shown_reduced_and_named() -> None:
    env = env_of()
    seen = env.reset(3)
    assert env.scene is not None
    size = env.scene.size
    assert size == (1000, 1000)
    assert words(seen) == (
        "<image_clue_0>[84x84]</image_clue_0> Image Width: 1000; Image Height: 1000\n"
        f"{env.scene.text}\n(A) horizontal\n(B) vertical\n(C) checked\n(D) plain"
    )
    assert seen.tags == {"category": "pattern", "source": "visual_search"}
    assert seen.legal_actions is None
    assert env.scene.answer not in env.instructions
    assert env_of(side=2000).reset(3).images[0].size == (84, 84)  # whatever is set: the answer stays hidden


def test_code_gives_text_and_pictures_in_their_order_and_variables_live() -> None:
    env = env_of(side=100)
    env.reset(0)
    first = env.step(fenced("cut = image_clue_0.crop((0, 0, 300, 200))\nprint('one')\ncut.show()\nprint('two')"))
    assert words(first.observation) == (
        "Text Result:\none\nImage Result:\n<image_clue_1>[100x67]</image_clue_1>\nText Result:\ntwo"
    )
    assert (first.legal, first.changed, first.terminated, first.truncated) == (True, True, False, False)
    second = env.step(fenced("image_clue_1.size, cut.size"))  # what was shown is bound, in its own size
    assert words(second.observation) == "Text Result:\n((300, 200), (300, 200))"
    assert words(env.step(fenced("x = 1")).observation) == "Nothing was printed or shown."
    metrics = dict(env.step(fenced("1 / 0")).metrics)
    assert metrics.pop("seconds_tool") > 0
    assert metrics == {"tool_calls": 4, "tool_pictures": 1, "tool_error_rate": 1 / 4}
    env.close()


def test_an_error_is_told_or_ends_the_episode() -> None:
    for on_error in ("tell", "end"):
        env = env_of(on_error=on_error)
        env.reset(0)
        step = env.step(fenced("print('so far')\nimage_clue_0.cut()"))
        assert words(step.observation).startswith("Text Result:\nso far\nText Result:\nTraceback")
        assert "no attribute 'cut'" in words(step.observation)
        assert (step.terminated, step.success, step.claim) == (on_error == "end", False, None)
        env.close()


def test_an_answer_is_a_claim() -> None:
    env = env_of()
    env.reset(3)
    assert env.scene is not None
    scene = env.scene
    step = env.step("\\boxed{checked}")
    claim = Claim(scene.text, "checked", scene.answer, ("horizontal", "vertical", "checked", "plain"), "visual_search")
    assert step.claim == claim
    assert (step.terminated, step.success, step.reward) == (True, False, 0.0)
    with pytest.raises(EnvError, match="no episode is running"):
        env.step("\\boxed{checked}")
    env.reset(3)
    assert replace(env.step(" checked "), observation=step.observation) == step  # as other formats have it


def test_limits_are_told() -> None:
    env = env_of(max_pictures=2, max_steps=2)
    env.reset(0)
    step = env.step(fenced("for x in (1, 2, 3):\n    image_clue_0.resize((x, x)).show()"))
    assert words(step.observation) == (
        "Image Result:\n<image_clue_1>[1x1]</image_clue_1>\nImage Result:\n<image_clue_2>[2x2]</image_clue_2>\n"
        "At most 2 pictures are shown: 1 left out."
    )
    step = env.step(None)
    assert words(step.observation) == "Write Python to be run, or the answer."
    assert (step.legal, step.changed, step.truncated) == (False, False, True)
    env.close()


def test_without_the_tool_code_is_not_run() -> None:
    env = env_of(tool=False)
    env.reset(0)
    step = env.step(fenced("image_clue_0.show()"))
    assert (words(step.observation), step.legal, step.terminated) == (
        "There is no Python here. Answer the question.",
        False,
        False,
    )
    assert env.step("plain").claim is not None


def test_a_picture_may_be_in_python_alone() -> None:
    env = env_of(picture_in="runtime")
    seen = env.reset(0)
    assert seen.images == ()
    assert words(seen).startswith("image_hint_0 Image Width: 1000; Image Height: 1000\n")
    assert "image_hint_0" in env.instructions
    assert words(env.step(fenced("image_hint_0.size")).observation) == "Text Result:\n(1000, 1000)"
    env.close()


def test_envs_of_a_process_share_a_sandbox_and_no_variables() -> None:
    one, other = env_of(), env_of()
    one.reset(0)
    other.reset(1)
    one.step(fenced("secret = 7"))
    assert "NameError" in words(other.step(fenced("secret")).observation)
    assert one._sandbox is other._sandbox
    one.reset(2)
    assert "NameError" in words(one.step(fenced("secret")).observation)  # a new episode, a new process
    one.close()
    other.close()


def test_equal_seeds_give_equal_episodes_in_worker_processes_too() -> None:
    cfg = VisualSearchConfig(level="tiny")
    code = fenced("image_clue_0.crop((0, 0, 333, 333)).resize((84, 84)).show()")

    def play(workers: bool) -> list[Step]:
        with EnvPool(lambda: make_env(cfg), 2, workers) as envs:
            envs.reset({0: 5, 1: 6})
            played = [envs.step({0: code, 1: code}), envs.step({0: "plain", 1: "checked"})]
        return [step for each in played for step in each.values() if isinstance(step, Step)]

    here, there = play(workers=False), play(workers=True)
    assert len(here) == 4
    assert [step.observation for step in here] == [step.observation for step in there]
    assert [step.claim for step in here] == [step.claim for step in there]


def test_a_picture_that_models_refuse_is_told_of() -> None:
    env = env_of()
    env.reset(0)
    step = env.step(fenced("image_clue_0.crop((0, 0, 1000, 2)).show()\nimage_clue_0.crop((0, 0, 100, 2)).show()"))
    assert words(step.observation) == (
        "Image Result:\n<image_clue_1>too thin to be shown: 1000x2 pixels</image_clue_1>\n"
        "Image Result:\n<image_clue_2>[84x2]</image_clue_2>"
    )
    env.close()


def test_the_expert_is_there_where_it_can_see(files: dict[str, str]) -> None:
    for lacking in ({"data": [files["train.json"]]}, {"picture_in": "runtime"}, {"max_pictures": 0}):
        with pytest.raises(NoExpert, match="an expert of made-up scenes"):
            VisualSearchExpert(env_of(**lacking))
    VisualSearchExpert(env_of(max_pictures=0, tool=False))


def test_a_guesser_answers_at_once_and_is_right_by_chance() -> None:
    """One of four options: of 200 questions 50 by the mean, and 32 to 68 with three standard deviations of 6.1."""
    game = env_of(level="tiny")
    env = Advised(game, Guesser(game))
    right = 0
    for seed in range(200):
        advice = env.reset(seed).advice
        assert advice
        claim = env.step(advice.action).claim
        assert claim
        right += claim.answer == claim.right
    assert 32 <= right <= 68


def test_a_reduced_picture_keeps_its_shape() -> None:
    picture = Picture(Image.new("RGB", (400, 100)))
    assert reduced(picture, 100).size == (100, 25)
    assert reduced(picture, 400) is picture


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Rows of PyVision-RL's kind, and of V*'s."""
    for place in range(3):
        Image.new("RGB", (60, 40 + place)).save(tmp_path / f"{place}.png")
    rows = [{"id": f"q{i}", "question": f"How many {i}?", "answer": str(i), "image_path": f"{i}.png"} for i in range(3)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    lines = [{"question_id": i, "text": f"Which {i}?", "label": "A", "image": f"{i}.png"} for i in range(3)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {name: str(tmp_path / name) for name in ("train.json", "held.jsonl")}


def test_a_panel_asks_each_held_out_question_once_and_training_none(files: dict[str, str]) -> None:
    env = env_of(data=[files["train.json"]], eval_data=[files["held.jsonl"]], side=30)
    panel = [words(env.reset(seed)) for seed in panel_seeds(env.name, 3)]
    head = "<image_clue_0>[30x{}]</image_clue_0> Image Width: 60; Image Height: {}\nWhich {}?"
    assert panel == [head.format(height // 2, height, index) for index, height in enumerate((40, 41, 42))]
    asked = {words(env.reset(seed)).splitlines()[-1] for seed in range(40)}
    assert asked == {"How many 0?", "How many 1?", "How many 2?"}


def test_files_that_lack_or_are_no_questions_are_named(files: dict[str, str], tmp_path: Path) -> None:
    train, held = files["train.json"], files["held.jsonl"]
    with pytest.raises(DataError, match=r"env.eval_data names no file: set env.eval_data="):
        env_of(data=[train]).reset(panel_seeds("vlm_agents/VisualSearch-v0", 1)[0])
    with pytest.raises(DataError, match=r"train.json is in env.data and in env.eval_data"):
        env_of(data=[train], eval_data=[held, train])
    with pytest.raises(DataError, match=r"notes.txt is no file of questions: their names end in .json, .jsonl, "):
        env_of(data=[str(tmp_path / "notes.txt")])
    with pytest.raises(DataError, match=r"no .*gone.json: env.data and env.eval_data name files"):
        env_of(eval_data=[held], data=[str(tmp_path / "gone.json")])
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match=r"there is none in .*empty.json"):
        env_of(data=[str(tmp_path / "empty.json")]).reset(0)


def test_broken_rows_end_it_or_are_left_out(files: dict[str, str], tmp_path: Path, caplog) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps([{"id": 1}, *json.loads(Path(files["train.json"]).read_text())]))
    with pytest.raises(DataError, match=r"broken.json, row 0: "):
        env_of(data=[str(path)]).reset(0)
    env = env_of(data=[str(path)], skip_bad=True)
    assert len({words(env.reset(seed)) for seed in range(40)}) == 3
    assert "broken.json, row 0: " in caplog.text
