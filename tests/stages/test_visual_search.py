"""Visual search through the stages: what is recorded, learned, trained on and compared, at the smallest size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_agents.chats import read_chats
from vlm_agents.envs.visual_search.env import sandbox_of
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import DataError
from vlm_agents.learn.samples import build
from vlm_agents.models import load_agent
from vlm_agents.sandbox.settings import SandboxSettings
from vlm_agents.stages.bare import elected
from vlm_agents.stages.sft_data import Chat, Chats
from vlm_agents.types import Claim, Observation, Parsed, Reply, Step, Stop, Trajectory, Turn

WORDS = ("env=visual_search", "env.level=tiny", "prompt=tool_call", "prompt.max_reply_tokens=24", "env.max_steps=2")


@pytest.fixture(scope="module", autouse=True)
def one_sandbox():
    """For all runs here: a start takes a second."""
    return sandbox_of(SandboxSettings())


@pytest.fixture(scope="module")
def collected(run_stage, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    return run_stage(folder, "stage=collect", *WORDS, "stage.noise=0", "stage.episodes=6", "stage.num_envs=3")


def test_the_expert_looks_answers_and_is_right(collected: Path) -> None:
    episodes = list(read_episodes(collected))
    assert [(len(one.turns), one.stop) for one in episodes] == [(2, "success")] * 6
    look, answer = episodes[0].turns
    assert (look.step.claim, look.reward, answer.reward) == (None, 0.0, 1.0)
    assert answer.step.claim is not None
    assert answer.step.claim.answer == answer.step.claim.right
    assert answer.step.metrics.items() >= {"tool_calls": 1.0, "tool_pictures": 1.0, "tool_error_rate": 0.0}.items()


def test_its_chats_are_learned_from(run_stage, collected: Path, tmp_path: Path) -> None:
    words = ("stage=preprocess", *WORDS, f"stage.data=[{collected}]", "stage.val_fraction=0.3")
    folder = run_stage(tmp_path / "data", *words)
    rows, held_out = (list(read_chats(folder / f"{split}.parquet")) for split in ("train", "validation"))
    assert len(rows) + len(held_out) == 12  # two turns an episode
    assert held_out
    assert [message["role"] for message in rows[1]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert rows[1]["messages"][3]["content"] == (
        "<tool_response>\n<interpreter>\nImage Result:\n<image_clue_1><image></image_clue_1>\n</interpreter>\n"
        "</tool_response>"
    )
    data = f"stage.data={tmp_path / 'data'}"
    folder = run_stage(tmp_path / "sft", "stage=sft", *WORDS, data, "stage.epochs=1", "stage.batch_size=4")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert (metrics["sft/rows"], metrics["sft/val_rows"]) == (len(rows) / 2, len(held_out) / 2)


def test_turns_of_a_chat_are_one_row_with_the_log_probs_of_each(run_stage, echo_run, collected: Path, tmp_path: Path):
    run_stage(tmp_path, "stage=preprocess", *WORDS, f"stage.data=[{collected}]", "stage.val_fraction=0")
    cfg = echo_run(tmp_path / "x", "stage=eval", *WORDS)
    agent = load_agent(cfg.model, cfg.hardware, None)
    chats = Chats(tmp_path / "train.parquet", agent.renderer)
    apart = [chats[index] for index in range(len(chats))]
    assert chats.problems() == {}
    together = [chats[index] for index in range(len(chats))]
    assert (len(apart), len(together)) == (12, 6)
    assert [row.reply_lengths for row in together] == [
        one.reply_lengths + other.reply_lengths for one, other in zip(apart[::2], apart[1::2], strict=True)
    ]
    assert chats.question(0)[1] == list(read_chats(tmp_path / "train.parquet"))[1]["messages"][-1]["content"]
    with torch.no_grad():
        singly, jointly = agent.score(apart[:4]).logprobs, agent.score(together[:2]).logprobs
    assert torch.allclose(singly, jointly, atol=1e-5)


def test_chats_that_show_other_pictures_stay_apart(run_stage, echo_run, collected: Path, tmp_path: Path) -> None:
    """Of two rows with one text, as of one size; and one behind a row that is left out."""
    run_stage(tmp_path, "stage=preprocess", *WORDS, f"stage.data=[{collected}]", "stage.val_fraction=0")
    agent_cfg = echo_run(tmp_path / "x", "stage=eval", *WORDS)
    renderer = load_agent(agent_cfg.model, agent_cfg.hardware, None).renderer
    chats = Chats(tmp_path / "train.parquet", renderer)
    look, answer = chats.records[:2]
    assert isinstance(look, Chat)
    assert isinstance(answer, Chat)
    chats.records[1] = replace(answer, pictures=(answer.pictures[1], *answer.pictures[1:]))
    chats.records[2] = DataError("broken")
    assert chats.problems() == {2: "broken"}
    chats.leave_out([2])
    assert chats.used == [[0], [1], [3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_model_that_can_not_be_read_is_charged_once_an_episode_and_once_a_turn(run_stage, tmp_path: Path) -> None:
    """An untrained one: every reply, and each episode for its format."""
    words = ("algo=oversample_rank", "algo.group_size=2", "algo.tool_coef=0.1", "algo.format_coef=0.2")
    stage = ("stage=ppo", "stage.iterations=1", "stage.episodes=2", "stage.num_envs=4", "stage.eval_episodes=0")
    folder = run_stage(tmp_path, *stage, *WORDS, *words)
    (first, *_) = read_episodes(folder)
    assert first.stop == "invalid"
    assert [turn.bonuses for turn in first.turns] == [{"invalid": -0.1}, {"invalid": -0.1, "format": -0.2}]


def test_the_model_is_played_without_python_beside_it(run_stage, tmp_path: Path) -> None:
    folder = run_stage(tmp_path, "stage=eval", *WORDS, "stage.episodes=4", "stage.num_envs=4")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["eval/success_bare"] == metrics["eval/success_votes"] == 0.0
    assert 1 <= metrics["eval/votes"] <= 15
    assert metrics["time/panel"] > 0 < metrics["time/panel_bare"]
    assert metrics["eval/success_expert"] == 1.0
    assert "eval/success_random" not in metrics  # what would that be?
    assert "eval/success/category/pattern" in metrics


# ---- one training row an episode -------------------------------------------------------------------------------------
def test_turns_share_a_row_and_what_a_tool_said_is_in_no_loss(collected: Path, echo_run, tmp_path: Path) -> None:
    """As a model would have played it: sampled replies that end with the stop text, and exact prompts."""
    cfg = echo_run(tmp_path, "stage=eval", *WORDS)
    renderer, replayed = load_agent(cfg.model, cfg.hardware, None).renderer, list[Turn]()
    for turn in next(read_episodes(collected)).turns:
        prompt = tuple(
            replace(message, token_ids=tuple(renderer.encode_reply(message.text)[:-1]))  # without the end of turn
            if message.role == "assistant"
            else message
            for message in turn.prompt
        )
        ids = renderer.encode_reply(turn.reply.text)
        ids = ids[:-1] if "</code>" in turn.reply.text else ids
        rendered = tuple(renderer.render(prompt).ids.tolist())
        reply = Reply(turn.reply.text, rendered, tuple(ids), (-1.0,) * len(ids))
        replayed.append(replace(turn, prompt=prompt, reply=reply))
    episode = Trajectory("search", 0, "model", tuple(replayed), "success")
    (sample,) = build([episode], renderer, thought_coef=1.0)
    row = sample.row
    assert len(row.images) == 2
    learned = [renderer.decode(row.input_ids[slice(*span)].tolist()) for span in row.spans]
    assert learned == [turn.reply.text for turn in replayed]
    between = renderer.tokenizer.decode(row.input_ids[row.spans[0][1] : row.spans[1][0]])
    assert between.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n<interpreter>\nImage Result:\n")
    assert between.endswith("</interpreter>\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert np.array_equal(sample.behaviour, [-1.0] * sum(len(turn.reply.token_ids) for turn in replayed))


# ---- votes -----------------------------------------------------------------------------------------------------------
def said(seed: int, answer: str | None, stop: Stop) -> Trajectory:
    claim = None if answer is None else Claim("?", answer, "red", ("blue", "red"))
    step = Step(Observation(""), 0.0, True, False, stop == "success", True, True, claim=claim)
    return Trajectory("search", seed, "model", (Turn(Observation(""), (), Reply(""), Parsed("x"), step),), stop)


def test_the_most_frequent_answer_is_elected() -> None:
    plays = [
        (1, "red", "success"),
        (1, "blue", "failure"),
        (1, " Blue ", "failure"),  # blue has two votes
        (2, "blue", "failure"),
        (2, "red", "success"),
        (2, "RED", "success"),
        (3, None, "invalid"),  # says nothing: one vote decides
        (3, None, "time_limit"),
        (3, "red", "success"),
        (4, None, "invalid"),
        (5, "red", "success"),  # as many: the first
        (5, "blue", "failure"),
        (6, "red", "unscored"),  # nobody knows: no vote, and no question
        (7, "B", "success"),  # spelled otherwise, and one answer
        (7, "(B)", "success"),
        (7, "Red.", "success"),
        (7, "A", "failure"),
        (7, "A", "failure"),
    ]
    assert elected([said(*play) for play in plays]) == [False, True, True, False, True, True]  # pyright: ignore[reportArgumentType]
