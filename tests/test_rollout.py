"""The loop: who is asked when, what a turn costs, why episodes end; and the pool: envs that raise, die or hang."""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from weakref import ref

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from vlm_agents.config import MiniGridConfig, PromptConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.envs import make_env
from vlm_agents.envs.base import Env, check_contract, out_of_turn
from vlm_agents.errors import DataError, EnvError, TooLongError, TrainingError
from vlm_agents.learn.shaping import penalised
from vlm_agents.pictures import Picture
from vlm_agents.policies import NoisyPolicy, RandomPolicy
from vlm_agents.prompting import PromptFormat, make_format
from vlm_agents.rollout import collect
from vlm_agents.seeds import Deal
from vlm_agents.summary import Tags, by_tag, summarise
from vlm_agents.types import Advice, Observation, Parsed, Prompt, Query, Reply, Step, Stop, Trajectory, Turn

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test file by name

FORMAT = make_format(PromptConfig("cot_json"))
PENALTY = 0.25
BAD_SEED = 3
Fault = Literal["raise", "exit", "interrupt", "leave", "kill", "hang", "never starts"]


class Walk:
    """A corridor with a pit at -1 and an exit at `seed`; every step right is worth 1. Four turns at most.

    In the episode of BAD_SEED, a `fault` strikes at the second step; "never starts" strikes at every reset.
    """

    name = "Walk"
    instructions = "Walk to the exit. Actions: left, right."

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.running = False

    def reset(self, seed: int) -> Observation:
        if self.fault == "never starts":
            raise ValueError("no corridor")
        self.seed, self.place, self.turn, self.running = seed, 0, 0, True
        return self.look()

    def step(self, action: str | None) -> Step:
        if not self.running:
            raise out_of_turn(self.name)
        self.turn += 1
        if self.seed == BAD_SEED and self.turn == 2:
            self.strike()
        move = {"left": -1, "right": 1}.get(action or "", 0)
        self.place += move
        success = self.place == self.seed
        terminated = success or self.place < 0
        truncated = not terminated and self.turn == 4
        self.running = not (terminated or truncated)
        moved, progress = move != 0, {"progress": self.place / 10}
        return Step(self.look(), float(move > 0), terminated, truncated, success, moved, moved, progress)

    def close(self) -> None:
        self.running = False

    def look(self) -> Observation:
        return Observation(f"at {self.place}", legal_actions=("left", "right"), state_key=str(self.place))

    def strike(self) -> None:
        match self.fault:
            case "raise":
                raise ValueError("boom")
            case "exit":
                sys.exit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "leave":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(60)


class Tidy(Walk):
    """Leaves a file behind for each env that is closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def close(self) -> None:
        tempfile.mkstemp(dir=self.folder)


class Says:
    """Says the same words whenever asked; remembers the batches."""

    name = "parrot"

    def __init__(self, text: str, prompt_format: PromptFormat = FORMAT) -> None:
        self.text, self.format = text, prompt_format
        self.batches: list[int] = []
        self.valued: list[Query] = []

    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        self.batches.append(len(queries))
        return [Reply(self.text)] * len(queries)

    def value(self, queries: Sequence[Query]) -> list[float]:
        assert queries, "nobody asks for nothing"
        self.valued += queries
        return [10.0 + len(self.valued)] * len(queries)


RIGHT, LEFT = FORMAT.write("go", "right", None), FORMAT.write("go", "left", None)


def play(
    policy: Says | RandomPolicy | NoisyPolicy,
    seeds: Sequence[int],
    make: Callable[[], Env] = Walk,
    num_envs: int = 2,
    workers: bool = False,
    timeout_s: float = 30.0,
) -> list[Trajectory]:
    return list(playing(policy, seeds, make, num_envs, workers, timeout_s))


def playing(
    policy: Says | RandomPolicy | NoisyPolicy,
    seeds: Sequence[int],
    make: Callable[[], Env],
    num_envs: int,
    workers: bool = False,
    timeout_s: float = 30.0,
) -> Iterator[Trajectory]:
    with EnvPool(make, num_envs, workers, timeout_s) as envs:
        yield from penalised(collect(envs, policy, [Deal(seed) for seed in seeds], run_seed=7), PENALTY)


def minigrid() -> Env:
    return make_env(MiniGridConfig(id="MiniGrid-Empty-Random-5x5-v0", max_steps=8, tile_size=8))


# ---- the loop --------------------------------------------------------------------------------------------------------
def test_the_test_env_keeps_the_contract():
    check_contract(Walk)


def test_an_episode_records_what_was_seen_said_and_done():
    (episode,) = play(Says(RIGHT), [2])
    assert (episode.env, episode.seed, episode.policy, episode.stop) == ("Walk", 2, "parrot", "success")
    assert [turn.observation.text for turn in episode.turns] == ["at 0", "at 1"]
    assert [turn.step.observation.text for turn in episode.turns] == ["at 1", "at 2"]
    assert [turn.prompt[-1].text for turn in episode.turns] == ["at 0", "at 1\nBefore: right"]
    assert [turn.parsed.action for turn in episode.turns] == ["right", "right"]
    assert episode.total_reward == 2.0


def test_trajectories_come_in_the_order_of_seeds_each_as_soon_as_it_can():
    policy = Says(RIGHT)
    # two slots: 1 takes turn 1; beside it 4 takes turns 1-4, while 1 and 2 take turns 2 and 3-4
    seen = [(episode.seed, len(policy.batches)) for episode in playing(policy, [1, 4, 1, 2], Walk, 2)]
    assert seen == [(1, 1), (4, 4), (1, 4), (2, 4)]


def test_nothing_is_decoded_for_episodes_that_are_over():
    policy = Says(RIGHT)
    play(policy, [3, 1], num_envs=5)
    assert policy.batches == [2, 1, 1]


def test_an_invalid_reply_costs_its_penalty_and_moves_nothing():
    (episode,) = play(Says("I can't decide"), [2])
    assert [turn.step.observation.text for turn in episode.turns] == ["at 0"] * 4
    assert [turn.parsed.error for turn in episode.turns] == ["no JSON"] * 4
    assert [turn.reward for turn in episode.turns] == [-PENALTY] * 4
    assert [(turn.step.reward, turn.bonuses) for turn in episode.turns] == [(0.0, {"invalid": -PENALTY})] * 4
    assert not any(turn.step.legal for turn in episode.turns)
    assert episode.stop == "invalid"


@pytest.mark.parametrize(
    ("text", "seed", "stop"),
    [(RIGHT, 4, "success"), (LEFT, 4, "failure"), (RIGHT, 9, "time_limit"), ("", 9, "invalid")],
)
def test_why_an_episode_stops_and_that_only_truncation_bootstraps(text: str, seed: int, stop: Stop):
    policy = Says(text)
    (episode,) = play(policy, [seed])
    truncated = stop in ("time_limit", "invalid")
    assert episode.stop == stop
    assert episode.bootstrap == (11.0 if truncated else 0.0)  # Says values its first query at 11
    assert len(policy.valued) == truncated
    if truncated:
        assert policy.valued[0].prompt[-1].text.startswith(episode.turns[-1].step.observation.text)
        assert policy.valued[0].prompt[-1].text.count(";") == 3  # four past turns


def test_one_reply_in_the_format_makes_a_time_limit_of_it():
    class Mumbles(Says):
        def reply(self, queries: Sequence[Query]) -> list[Reply]:
            return [Reply(RIGHT if query.observation.text == "at 0" else "mumble") for query in queries]

    (episode,) = play(Mumbles(""), [9])
    assert episode.stop == "time_limit"
    assert episode.total_reward == 1.0 - 3 * PENALTY


def test_the_bootstraps_of_a_batch_are_one_call():
    policy = Says(RIGHT)
    episodes = play(policy, [8, 1, 9], num_envs=3)
    assert [episode.bootstrap for episode in episodes] == [12.0, 0.0, 12.0]  # two queries in one batch: 10 + 2


def test_outcomes_depend_neither_on_the_number_of_slots_nor_on_the_company():
    policy = NoisyPolicy(RandomPolicy(FORMAT), 0.5)
    seeds = list(range(100, 112))
    alone = [play(policy, [seed], minigrid, num_envs=1)[0] for seed in seeds]
    assert play(policy, seeds, minigrid, num_envs=5) == alone
    assert play(policy, seeds[::-1], minigrid, num_envs=20) == alone[::-1]
    assert len({tuple(turn.parsed.action for turn in episode.turns) for episode in alone}) > 6


def test_the_run_seed_decides_what_chance_does():
    with EnvPool(minigrid, 2) as envs:
        runs = [
            list(collect(envs, RandomPolicy(FORMAT), [Deal(5), Deal(6)], run_seed=run_seed)) for run_seed in (0, 0, 1)
        ]
    assert runs[0] == runs[1] != runs[2]


def test_members_of_a_seed_are_different_plays_of_the_same_start():
    deals = [Deal(5, member) for member in range(4)] + [Deal(5)]
    with EnvPool(minigrid, 2) as envs:
        group = list(collect(envs, RandomPolicy(FORMAT), deals, run_seed=0))
    assert [(episode.seed, episode.member) for episode in group] == deals
    assert len({episode.turns[0].observation.state_key for episode in group}) == 1
    assert len({tuple(turn.parsed.action for turn in episode.turns) for episode in group}) == 4
    assert group[4] == group[0]


class Refused:
    """A format whose second prompt holds what no model takes."""

    stop, parse, write = (), FORMAT.parse, FORMAT.write

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        if history:
            raise DataError("the model's image processor takes no picture of 336x1 pixels")
        return FORMAT.prompt(instructions, history, now)


def test_what_no_model_can_be_asked_costs_its_episode_alone():
    (episode,) = play(Says(RIGHT, Refused()), [3])
    assert (episode.stop, len(episode.turns)) == ("env_error", 1)
    assert episode.error == (
        "seed 3, turn 1: no model can be asked this: the model's image processor takes no picture of 336x1 pixels"
    )


class Short:
    """A format for a model that takes no more than `turns` past turns."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        if len(history) > self.turns:
            raise TooLongError("too many turns")
        return FORMAT.prompt(instructions, history, now)

    stop, parse, write = (), FORMAT.parse, FORMAT.write


class Values(Says):
    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        return [Reply(self.text, value=0.5 + len(self.batches)) for _ in queries]


def test_a_prompt_that_is_too_long_ends_its_own_episode_only(caplog: pytest.LogCaptureFixture):
    with EnvPool(Walk, 2) as envs:
        deals = [Deal(9), Deal(1), Deal(2)]
        long, *others = collect(envs, Values(RIGHT, Short(1)), deals, run_seed=0)
    assert [episode.stop for episode in others] == ["success", "success"]
    assert (long.stop, len(long.turns), long.success) == ("too_long", 2, False)
    assert long.error == "seed 9, turn 2: too many turns"
    assert long.error in caplog.text
    assert long.bootstrap == 0.0  # it failed: nothing comes after
    metrics = summarise([long, *others])
    assert metrics["rollout/too_long_rate"] == metrics["rollout/success"] / 2 == pytest.approx(1 / 3)
    assert metrics["rollout/env_errors"] == 0


def test_where_even_the_first_prompt_is_too_long_nothing_is_played():
    with EnvPool(Walk, 2) as envs:
        (episode,) = collect(envs, Says(RIGHT, Short(-1)), [Deal(9)], run_seed=0)
    assert (episode.stop, episode.turns, episode.bootstrap) == ("too_long", (), 0.0)
    assert summarise([episode])["rollout/too_long_rate"] == 1.0


def test_a_time_limit_is_one_though_its_value_can_t_be_asked():
    with EnvPool(Walk, 1) as envs:
        (episode,) = collect(envs, Values(RIGHT, Short(3)), [Deal(9)], run_seed=0)
    assert (episode.stop, len(episode.turns), episode.bootstrap, episode.error) == ("time_limit", 4, 0.5, None)


def test_tags_are_those_of_the_first_observation():
    class Tagged(Walk):
        def look(self) -> Observation:
            return replace(super().look(), tags={"turn": str(self.turn)})

    (episode,) = play(Says(RIGHT), [2], Tagged)
    assert episode.tags == {"turn": "0"}


def test_what_a_reply_leaves_to_chance_is_drawn_from_the_episode_s_own_randomness():
    scores = make_format(PromptConfig("action_scores", score_temperature=4.0))
    says = Says('{"scores": {"left": 3, "right": 4}}', scores)
    with EnvPool(Walk, 2) as envs:
        deals = [Deal(9, member) for member in range(20)]
        group = list(collect(envs, says, deals, run_seed=0))
        (alone,) = collect(envs, says, deals[7:8], run_seed=0)
    drawn = [turn.parsed for episode in group for turn in episode.turns]
    assert {parsed.action for parsed in drawn} == {"left", "right"}
    # softmax(3/4, 4/4): 1 / (1 + e^(1/4)) = 0.4378
    assert drawn[0].choices == pytest.approx({"left": 0.437823, "right": 0.562177}, rel=1e-5)
    assert alone.turns == group[7].turns


def test_errors_of_the_policy_propagate():
    class Broken(Says):
        def reply(self, queries: Sequence[Query]) -> list[Reply]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        play(Broken(""), [1])


def test_a_wrong_id_fails_at_once_and_in_plain_words():
    with pytest.raises(EnvError, match=r"MiniGrid-Emty-5x5-v0.*Did you mean"):
        EnvPool(partial(make_env, MiniGridConfig(id="MiniGrid-Emty-5x5-v0")), 2, workers=True)


# ---- the summary -----------------------------------------------------------------------------------------------------
def turn(state: str, action: str | None, reward: float = 0.0, reply: Reply | None = None, **flags: bool) -> Turn:
    seen = Observation(state, state_key=state)
    step = Step(
        Observation("A", state_key="A"),
        reward,
        flags.get("terminated", False),
        flags.get("truncated", False),
        success=False,
        legal=action is not None,
        changed=True,
    )
    return Turn(seen, (), reply or Reply(""), Parsed(action), step)


def episode(*turns: Turn, stop: Stop) -> Trajectory:
    return Trajectory("hand", 0, "hand", turns, stop)


def test_the_summary_worked_by_hand():
    sampled = Reply("x", token_ids=(1, 2, 3), logprobs=(-1.0,) * 3, entropy=0.5, finish="length")
    drawn = Reply("x", entropy=0.7, source="random")
    circling = [turn("A", "l"), turn("B", "r"), turn("A", "l"), turn("A", None), turn("A", None, truncated=True)]
    straight = [turn("A", "l", 0.5, sampled), turn("B", "l", reply=drawn), turn("C", "l", 1.0, terminated=True)]
    died = Trajectory("hand", 0, "hand", (turn("A", "l", 99.0),), "env_error", error="boom")
    metrics = summarise([episode(*circling, stop="time_limit"), died, episode(*straight, stop="success")], "eval")
    assert metrics == pytest.approx(
        {
            "eval/success": 1 / 2,
            "eval/return": (0.0 + 1.5) / 2,
            "eval/positive_return": 1 / 2,
            "eval/episode_length": (5 + 3) / 2,
            "eval/time_limit_rate": 1 / 2,
            "eval/too_long_rate": 0,
            "eval/failure_rate": 0,
            "eval/all_invalid_rate": 0,
            "eval/env_errors": 1,
            "eval/unscored": 0,
            "eval/invalid_rate": 2 / 8,
            "eval/loop_rate": 2 / 8,  # the second (A, l) and the second (A, None); A, B, C with l are three states
            "eval/random_rate": 1 / 8,
            "eval/truncated_rate": 1 / 8,
            "eval/reply_tokens": 3,
            "eval/repeated_token_rate": 0.0,  # three tokens have no run of four
            "eval/entropy": 0.5,
        },
        rel=1e-12,
    )


def test_how_episodes_ended_is_counted():
    stops: list[Stop] = ["success", "failure", "failure", "invalid", "time_limit"]
    metrics = summarise([episode(turn("A", "l", truncated=stop == "time_limit"), stop=stop) for stop in stops])
    names = ("success", "failure_rate", "all_invalid_rate", "time_limit_rate")
    assert [metrics[f"rollout/{name}"] for name in names] == pytest.approx([1 / 5, 2 / 5, 1 / 5, 1 / 5])


def test_steps_over_the_experts_count_solved_episodes_only():
    def took(turns: int, distance: int | None, stop: Stop = "success") -> Trajectory:
        advice = None if distance is None else Advice("there", "go", distance)
        return episode(*[replace(turn("A", "go"), observation=Observation("A", advice=advice))] * turns, stop=stop)

    # 6/4 and 3/3; the failure, the one without a distance and the one that began at the goal don't count
    episodes = [took(6, 4), took(3, 3), took(90, 3, "failure"), took(9, None), took(5, 0)]
    assert summarise(episodes)["rollout/steps_over_expert"] == pytest.approx((1.5 + 1.0) / 2)
    assert "rollout/steps_over_expert" not in summarise(episodes[2:])


def test_an_env_s_own_metrics_are_averaged_over_episodes():
    episodes = play(Says(RIGHT), [1, 2, 9])  # Walk says how far it came: 1, 2 and 4 tenths
    assert summarise(episodes)["rollout/progress"] == pytest.approx((0.1 + 0.2 + 0.4) / 3)
    last = episodes[0].turns[-1]
    said = replace(last, step=replace(last.step, metrics={"goal": 0.5, "return": 99.0}))
    metrics = summarise([replace(episodes[0], turns=(said,)), episodes[1]])
    assert metrics["rollout/goal"] == 0.5  # of those that give it
    assert metrics["rollout/return"] == pytest.approx((1 + 2) / 2)  # what has a meaning here keeps it


def test_success_by_tag():
    """Tags of an env with two kinds of task, each episode in a file of its own."""
    tags, names = Tags(), ("go_to", "pick up!", "go_to", "go_to")
    for number, (task, stop) in enumerate(zip(names, ("success", "failure", "too_long", "env_error"), strict=True)):
        tags.count(replace(episode(stop=stop), tags={"task type": task, "file": f"{number}.pddl"}))
    for number in range(17):
        tags.count(replace(episode(stop="failure"), tags={"file": f"more/{number}"}))
    assert tags.figures() == {
        "eval/success/task-type/go-to": 1 / 2,
        "eval/episodes/task-type/go-to": 2,
        "eval/success/task-type/pick-up": 0,
        "eval/episodes/task-type/pick-up": 1,
    }
    panels = tags.figures() | {f"{name}_greedy": value for name, value in tags.figures().items()}
    assert by_tag(panels) == {"task-type": {"go-to": (0.5, 2), "pick-up": (0.0, 1)}} == by_tag(panels, "_greedy")


def test_the_summary_keeps_no_episode():
    frames: list[ref[Picture]] = []

    def passing() -> Iterator[Trajectory]:
        for _ in range(5):
            frame = Picture(Image.new("RGB", (8, 8)))
            frames.append(ref(frame))
            yield episode(replace(turn("A", "go"), observation=Observation("A", (frame,))), stop="success")
            del frame
            assert sum(frame() is not None for frame in frames) == 1

    assert summarise(passing())["rollout/success"] == 1.0


def test_the_summary_of_scripted_replies_has_no_token_metrics():
    metrics = summarise(play(Says(RIGHT), [1, 2]))
    assert {"rollout/entropy", "rollout/reply_tokens"}.isdisjoint(metrics)
    assert all(np.isfinite(list(metrics.values())))


@pytest.mark.parametrize("errors", [[], ["boom"]])
def test_a_summary_of_nothing_is_refused(errors: list[str]):
    died = [replace(episode(stop="env_error"), error=error) for error in errors]
    with pytest.raises(TrainingError, match=rf"none of {len(errors)} episodes.*{'boom' if errors else 'none'}"):
        summarise(died)


# ---- the pool --------------------------------------------------------------------------------------------------------
def test_workers_and_this_process_play_the_same_episodes():
    seeds = list(range(8))
    policy = RandomPolicy(FORMAT)
    here = play(policy, seeds, minigrid, num_envs=3)
    assert play(policy, seeds, minigrid, num_envs=3, workers=True) == here
    assert not multiprocessing.active_children()


def at(words: str) -> str:
    """The place of this line of this file, as an error has it; not of code that a worker was sent by value."""
    lines = [line.strip() for line in Path(__file__).read_text().splitlines()]
    return f" ({os.path.relpath(__file__)}, line {lines.index(words) + 1})"


FAULTS = [
    ("raise", False, "ValueError: boom" + at('raise ValueError("boom")')),
    ("raise", True, "ValueError: boom"),
    ("exit", False, "SystemExit: 3" + at("sys.exit(3)")),
    ("exit", True, "SystemExit: 3"),
    ("interrupt", True, "KeyboardInterrupt"),
    ("leave", True, "its worker process died (exit code 3)"),
    ("kill", True, "its worker process died (exit code -9)"),
    ("hang", True, "no answer within env.timeout_s=1 s"),
]


@pytest.mark.parametrize(("fault", "workers", "error"), FAULTS)
def test_a_broken_env_costs_its_own_episode_only(fault: Fault, workers: bool, error: str):
    seeds = [4, BAD_SEED, 2, 4, 9, BAD_SEED, 1]
    sound = play(Says(RIGHT), seeds)
    begun = time.monotonic()
    harmed = play(Says(RIGHT), seeds, partial(Walk, fault), workers=workers, timeout_s=1.0 if fault == "hang" else 30.0)
    for expected, found in zip(sound, harmed, strict=True):
        if expected.seed == BAD_SEED:
            told = f"Walk, seed {BAD_SEED}: {error}"
            expected = replace(expected, turns=expected.turns[:1], stop="env_error", error=told)
        assert found == replace(expected, bootstrap=found.bootstrap)  # Says numbers its values
    assert time.monotonic() - begun < 15.0
    assert not multiprocessing.active_children()


def test_the_user_s_interrupt_ends_the_run():
    with pytest.raises(KeyboardInterrupt):
        play(Says(RIGHT), [BAD_SEED], partial(Walk, "interrupt"))


class Answers(Walk):
    """Answers the second step of BAD_SEED's episode with something else."""

    def __init__(self, spoil: Callable[[Step], object]) -> None:
        super().__init__()
        self.spoil = spoil

    def step(self, action: str | None) -> Step:
        step = super().step(action)
        return self.spoil(step) if self.seed == BAD_SEED and self.turn == 2 else step  # type: ignore[return-value]


def metric(**values: object) -> Callable[[Step], Step]:
    return lambda step: replace(step, metrics={**step.metrics, **values})  # type: ignore[dict-item]


def field(**values: object) -> Callable[[Step], Step]:
    return lambda step: replace(step, **values)  # type: ignore[arg-type]


def shown(**values: object) -> Callable[[Step], Step]:
    return lambda step: replace(step, observation=replace(step.observation, **values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (field(reward=float("nan")), "the reward is nan, no finite number"),
        (field(reward=np.float32("inf")), "the reward is np.float32(inf), no finite number"),
        (field(reward=None), "the reward is None, no finite number"),
        (field(reward="1"), "the reward is '1', no finite number"),
        (field(reward=10**400), "OverflowError: int too large to convert to float"),
        (field(terminated=None), "terminated is None, neither True nor False"),
        (field(truncated=2), "truncated is 2, neither True nor False"),
        (field(metrics=None), "metrics is None, no mapping of names to numbers"),
        (metric(progress=float("nan")), "metrics['progress'] is nan, no finite number"),
        (metric(progress=None), "metrics['progress'] is None, no finite number"),
        (field(success=0.5), "success is 0.5, neither True nor False"),
        (field(legal=1.0), "legal is 1.0, neither True nor False"),
        (field(changed=None), "changed is None, neither True nor False"),
        (shown(tags={"task": 1}), "tags['task'] is 1, no text"),
        (shown(tags="red"), "tags is 'red', no mapping of names to texts"),
        (field(observation="at 1"), "the observation is 'at 1', no Observation"),
        (shown(text=b"at 1"), "the text is b'at 1', no text"),
        (shown(text="a\ud83d"), "the text has half a surrogate pair at character 1, no text for a tokenizer"),
        (shown(state_key=1), "state_key is 1, no text"),
        (shown(legal_actions="left"), "legal_actions is 'left', neither a tuple of texts nor None"),
        (shown(legal_actions=("left", 1)), "a legal action is 1, no text"),
        (shown(images=None), "images is None, no tuple of pictures"),
        (shown(images=("a.png",)), "a picture is 'a.png', no vlm_agents.pictures.Picture"),
        (shown(images=(Picture(Image.new("RGB", (0, 5))),)), "a picture is (0, 5), without a pixel"),
        (
            shown(advice=Advice("a\udc00", "left")),
            "the advised thought has half a surrogate pair at character 1, no te",
        ),
        (lambda _: None, "what came of the step is None, no Step"),
        (lambda step: (step.observation, 1.0, False, False, {}), "what came of the step is (Observation(text='at 2'"),
    ],
)
def test_an_answer_that_is_none_costs_its_own_episode_only(spoil: Callable[[Step], object], error: str):
    sound = play(Says(RIGHT), [4, 2])
    first, broken, last = play(Says(RIGHT), [4, BAD_SEED, 2], partial(Answers, spoil))
    assert [replace(episode, bootstrap=0.0) for episode in (first, last)] == [
        replace(episode, bootstrap=0.0) for episode in sound
    ]
    assert (broken.stop, len(broken.turns)) == ("env_error", 1)
    assert (broken.error or "").startswith(f"Walk, seed {BAD_SEED}: {error}")
    metrics = summarise([first, broken, last])
    assert (metrics["rollout/env_errors"], metrics["rollout/return"]) == (1.0, (4 + 2) / 2)


def test_a_reset_that_answers_as_gymnasium_does_is_an_env_error():
    class Gymnasium(Walk):
        def reset(self, seed: int) -> Observation:
            return super().reset(seed), {}  # type: ignore[return-value]

    (episode,) = play(Says(RIGHT), [2], Gymnasium)
    assert (episode.stop, episode.turns) == ("env_error", ())
    assert (episode.error or "").startswith("Walk, seed 2: the observation is (Observation(text='at 0'")


def test_an_answer_in_numpy_s_types_is_made_plain():
    picture = Picture(Image.new("RGBA", (2, 1)))  # all transparent: white to a viewer
    odd = [
        field(reward=np.float32(0.5), terminated=np.bool_(True), truncated=np.bool_(True)),
        field(success=np.bool_(True)),
        metric(progress=np.float16(0.5)),
        shown(images=[picture], legal_actions=["left"], text=np.str_("at 2")),
    ]

    def spoil(step: Step) -> Step:
        for change in odd:
            step = change(step)
        return step

    (episode,) = play(Says(RIGHT), [BAD_SEED], partial(Answers, spoil))
    step = episode.turns[-1].step
    assert (episode.stop, episode.bootstrap) == ("success", 0.0)
    assert (step.reward, step.terminated, step.truncated) == (0.5, True, False)  # it ended: nothing is cut off
    assert (step.success, step.metrics) == (True, {"progress": 0.5})
    plain = {
        type(value)
        for value in (step.reward, step.terminated, step.success, *step.metrics.values(), step.observation.text)
    }
    assert plain == {float, bool, str}
    assert step.observation.legal_actions == ("left",)
    assert [(seen.image.mode, seen.image.getpixel((1, 0))) for seen in step.observation.images] == [
        ("RGB", (255, 255, 255))
    ]


def test_what_an_env_says_cannot_command_the_terminal(caplog: pytest.LogCaptureFixture):
    def spoil(step: Step) -> Step:
        raise ValueError("\x1b[2Jgone")

    (episode,) = play(Says(RIGHT), [BAD_SEED], partial(Answers, spoil))
    assert episode.error == f"Walk, seed {BAD_SEED}: ValueError: \\x1b[2Jgone" + at('raise ValueError("\\x1b[2Jgone")')
    assert "\x1b" not in caplog.text


class Stuck(Walk):
    """Can't be closed."""

    def close(self) -> None:
        sys.exit("stuck")


@pytest.mark.parametrize("workers", [False, True])
def test_an_env_that_cannot_be_closed_loses_nothing_that_was_played(workers: bool):
    assert [episode.stop for episode in play(Says(RIGHT), [1, 2], Stuck, workers=workers)] == ["success"] * 2
    assert not multiprocessing.active_children()


def test_an_env_that_cannot_be_made_is_one_line():
    with pytest.raises(EnvError) as raised:
        EnvPool(lambda: sys.exit(3), 1)
    assert str(raised.value) == "the env can't be made: SystemExit: 3" + at("EnvPool(lambda: sys.exit(3), 1)")


@pytest.mark.parametrize("workers", [False, True])
def test_envs_are_closed_at_the_end(tmp_path: Path, workers: bool):
    with EnvPool(partial(Tidy, tmp_path), 3, workers) as envs:
        envs.reset({0: 5, 1: 6, 2: 7})
        envs.step({1: "right"})
    assert len(list(tmp_path.iterdir())) == 3  # those of the slots: nobody makes one only to ask its name


def test_the_traceback_of_an_env_is_logged_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        play(Says(RIGHT), [BAD_SEED, BAD_SEED], partial(Walk, "raise"))
    boom = "ValueError: boom" + at('raise ValueError("boom")')
    assert [record.getMessage() for record in caplog.records] == [f"Walk, slot {n}: {boom}" for n in (0, 1)]
    assert caplog.text.count('raise ValueError("boom")') == 1


@pytest.mark.parametrize("workers", [False, True])
def test_the_pool_gives_up_on_a_slot_that_fails_four_times_in_a_row(workers: bool):
    ended: list[Trajectory] = []
    with pytest.raises(EnvError, match=r"slot 0 failed 4 times in a row .* ValueError: no corridor"):
        ended.extend(playing(Says(RIGHT), range(9), partial(Walk, "never starts"), 1, workers))
    assert [(episode.stop, episode.turns) for episode in ended] == [("env_error", ())] * 3
    assert not multiprocessing.active_children()


def test_failures_with_finished_steps_between_them_never_end_the_run():
    episodes = play(Says(RIGHT), [BAD_SEED] * 6, partial(Walk, "raise"), num_envs=1)
    assert [episode.stop for episode in episodes] == ["env_error"] * 6


def test_a_worker_that_dies_between_two_calls_is_found_out():
    with EnvPool(Walk, 1, workers=True) as envs:
        envs.reset({0: 5})
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        answer = envs.step({0: "right"})[0]
        assert isinstance(answer, EnvError)
        assert str(answer) == "its worker process died (exit code -9)"
        assert isinstance(envs.reset({0: 5})[0], Observation)
