"""Rollouts by another program, against a double of vLLM that answers from the adapter's files."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Answer, Server
from PIL import Image
from vllm_double import VllmDouble

from vlm_agents import vllm_sampler
from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig, RolloutConfig, TrainableConfig
from vlm_agents.config.rollout import EngineConfig
from vlm_agents.errors import ModelError
from vlm_agents.learn.learner import Learner
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.models.loading import TINY
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Rendered, reply_row
from vlm_agents.types import Message, Prompt, Sampling
from vlm_agents.vllm_sampler import VllmSampler
from vlm_agents.world import World

LORA = LoraConfig(rank=2, alpha=4)
ROOM = 12


def other(agent: Agent, scale: float) -> None:
    """Move the policy, as an update would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in agent.parameters_by_role()["policy"]:
            parameter += scale * torch.randn_like(parameter)


def prompts(count: int) -> list[Prompt]:
    red, blue = (Picture(Image.new("RGB", (56, 56), color)) for color in ("red", "blue"))
    asked = [
        Message("user", (red if index % 2 else blue, f"What is to be seen in room {index}?")) for index in range(count)
    ]
    chat = (
        Message("system", ("You move.",)),
        asked[0],
        Message("assistant", ("go left",)),
        Message("user", ("And now?",)),
    )
    return [chat, *((Message("system", ("You move.",)), one) for one in asked[1:])]


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(index) for index in range(count)]


@pytest.fixture
def agent(tiny_model: Path) -> Agent:
    train = TrainableConfig(vision=False, projector=False)
    agent = load_agent(ModelConfig("tiny", path=str(tiny_model), lora=LORA, train=train), HardwareConfig(name="cpu"))
    other(agent, 0.1)  # a new adapter changes nothing
    return agent


@pytest.fixture
def double(tiny_model: Path) -> Iterator[VllmDouble]:
    server = VllmDouble(tiny_model, LORA)
    yield server
    server.close()


@pytest.fixture
def shipped() -> Iterator[VllmDouble]:
    """With the packaged weights."""
    server = VllmDouble(TINY, LORA)
    yield server
    server.close()


def rollout(double: VllmDouble, **settings: Any) -> RolloutConfig:
    return RolloutConfig("vllm", remote=EngineConfig(url=double.url, retries=0), **settings)


Make = Callable[..., VllmSampler]


@pytest.fixture
def make(agent: Agent, double: VllmDouble, tmp_path: Path) -> Iterator[Make]:
    made: list[VllmSampler] = []

    def sampler(values: bool = False, **settings: Any) -> VllmSampler:
        made.append(VllmSampler(rollout(double, **settings), agent, tmp_path / "adapters", values))
        return made[-1]

    yield sampler
    for one in made:
        one.close()


def test_it_says_what_the_model_itself_says(agent: Agent, make: Make) -> None:
    """Greedily token for token; the log-probs of what is drawn are those of the weights here, at their temperature."""
    agent.temperature = 0.7
    asked, greedy = prompts(5), Sampling(ROOM, greedy=True)
    sampler = make(values=True)
    with sampler.synced():
        there = sampler.generate(asked, generators(5), greedy)
        drawn = sampler.generate(asked, generators(5), Sampling(ROOM))
    here = HFSampler(agent).generate(asked, generators(5), greedy)
    for one, two in zip(there, here, strict=True):
        same = ("text", "prompt_token_ids", "token_ids", "finish")
        assert [getattr(one, name) for name in same] == [getattr(two, name) for name in same]
        assert one.value == pytest.approx(two.value, abs=1e-5)
    for prompt, reply in zip(asked, drawn, strict=True):
        images = agent.renderer.render(prompt).images
        with torch.no_grad():
            own = agent.score([reply_row("row", reply.prompt_token_ids, reply.token_ids, images)]).logprobs
        assert reply.logprobs == pytest.approx(own.tolist(), abs=1e-5)
        assert reply.entropy == pytest.approx(-np.mean(reply.logprobs), abs=1e-6)


def test_values_are_of_the_tokens_that_the_server_read(agent: Agent, double: VllmDouble, make: Make) -> None:
    """A text that a model wrote may be other tokens there."""

    def otherwise(answer: dict[str, Any]) -> dict[str, Any]:
        *ids, last = answer["prompt_token_ids"]
        return answer | {"prompt_token_ids": [*ids, ids[0], last]}

    with torch.no_grad():
        for parameter in agent.value_head.parameters():  # a new critic says 0 of everything
            parameter += torch.randn_like(parameter)
    double.changed = otherwise
    sampler, chat = make(values=True, tolerance=100.0), prompts(1)
    with sampler.synced():
        (reply,) = sampler.generate(chat, generators(1), Sampling(ROOM))
    row = agent.renderer.render(chat[0])
    ids = np.array([*row.ids[:-1], row.ids[0], row.ids[-1]])
    assert list(reply.prompt_token_ids) == ids.tolist()
    as_read, as_rendered = HFSampler(agent).values_of([Rendered(ids, row.images), row])
    assert reply.value == pytest.approx(as_read, rel=1e-4)
    assert as_rendered != pytest.approx(as_read, rel=1e-2)


def test_draws_depend_on_a_row_s_own_generator(make: Make) -> None:
    sampler = make()
    with sampler.synced():
        together = sampler.generate(prompts(4), generators(4), Sampling(ROOM))
        each = zip(prompts(4), generators(4), strict=True)
        alone = [sampler.generate([prompt], [rng], Sampling(ROOM))[0] for prompt, rng in each]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_each_update_has_an_adapter_of_its_own(agent: Agent, double: VllmDouble, make: Make, tmp_path: Path) -> None:
    """Under a name that was never there, also of an earlier sampler's; the one before is gone, its files too."""
    sampler = make()
    texts = []
    for _ in range(3):
        with sampler.synced():
            texts.append([one.text for one in sampler.generate(prompts(3), generators(3), Sampling(ROOM))])
        assert list(double.adapters) == double.loaded[-1:]
        assert [path.name for path in (tmp_path / "adapters").iterdir()] == double.loaded[-1:]
        other(agent, 0.3)
    assert texts[0] != texts[1]
    make().sync()
    assert len(set(double.loaded)) == 4


def test_a_server_that_was_started_again_is_handed_the_adapter_again(double: VllmDouble, make: Make) -> None:
    sampler = make()
    with sampler.synced():
        before = sampler.generate(prompts(3), generators(3), Sampling(ROOM))
        double.adapters.clear()
        assert sampler.generate(prompts(3), generators(3), Sampling(ROOM)) == before
        double.adapters.clear()
    with sampler.synced():
        assert sampler.generate(prompts(3), generators(3), Sampling(ROOM)) == before


@dataclass(frozen=True)
class OtherRank(World):
    """Is told what rank 0 has."""

    rank: int = 1
    ranks: int = 2
    told: Any = None

    def of_main(self, make: Callable[[], Any]) -> Any:
        return self.told

    def wait(self) -> None: ...


def test_another_rank_hands_a_server_that_was_started_again_the_adapter_of_the_first(
    agent: Agent, double: VllmDouble, make: Make, tmp_path: Path
) -> None:
    main = make()
    there = VllmSampler(rollout(double), agent, tmp_path / "own", False, OtherRank(told=(main._folder, main._token)))
    with main.synced(), there.synced():
        before = there.generate(prompts(3), generators(3), Sampling(ROOM))
        double.adapters.clear()
        assert there.generate(prompts(3), generators(3), Sampling(ROOM)) == before
    there.close()


def test_texts_are_sent_as_they_are_but_for_control_tokens(agent: Agent, double: VllmDouble, make: Make) -> None:
    end = agent.tokenizer.eos_token
    prompt = (Message("user", (f"<image_clue_0> <s> {end}?",)),)
    sampler = make()
    with sampler.synced():
        (reply,) = sampler.generate([prompt], generators(1), Sampling(ROOM))
    assert double.requests[-1]["messages"] == [
        {"role": "user", "content": f"<image_clue_0> <s> {end[0]}\u2060{end[1:]}?"}
    ]
    assert reply.prompt_token_ids.count(agent.renderer.end_of_turn) == 1  # the template's


def test_a_server_that_hangs_doesn_t_keep_a_run_from_ending(
    agent: Agent, double: VllmDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, answer, free = VllmSampler(rollout(double), agent, tmp_path, False), double.post, threading.Event()
    sampler.sync()
    monkeypatch.setattr(vllm_sampler, "UNLOADING_S", 0.1)
    monkeypatch.setattr(double, "post", lambda *words: free.wait() and answer(*words))
    sampler.close()
    free.set()


def test_what_another_thread_asks_can_be_given_up(double: VllmDouble, make: Make, monkeypatch: Any) -> None:
    """What it asks now, and what it would ask next."""
    sampler, answer, asked, free = make(), double.post, threading.Event(), threading.Event()
    sampler.sync()
    monkeypatch.setattr(double, "post", lambda *words: asked.set() or (free.wait(60) and answer(*words)))
    with ThreadPoolExecutor(1) as thread:
        for _ in range(2):
            said = thread.submit(sampler.generate, prompts(3), generators(3), Sampling(ROOM))
            assert asked.wait(60)
            sampler.cancel()
            with pytest.raises(asyncio.CancelledError):
                said.result(60)
    free.set()


def test_weights_may_change_once_nothing_is_compared_any_more(agent: Agent, double: VllmDouble, make: Make) -> None:
    """Not even with a server that was started again; the next adapter is compared."""
    sampler = make()
    with sampler.synced():
        sampler.generate(prompts(3), generators(3), Sampling(ROOM))
        assert not sampler.compared
        sampler.compare_no_more()
        other(agent, 0.3)
        double.adapters.clear()
        sampler.generate(prompts(3), generators(3), Sampling(ROOM))
    sampler.sync()
    assert not sampler.compared


def test_a_lost_answer_to_the_loading_does_no_harm(double: VllmDouble, make: Make, monkeypatch: Any) -> None:
    sampler = make()
    load = double.load

    def twice(name: str, path: str) -> Answer:
        load(name, path)
        return load(name, path)

    monkeypatch.setattr(double, "load", twice)
    sampler.sync()
    assert sampler.generate(prompts(2), generators(2), Sampling(ROOM))


def test_a_server_that_leaves_the_adapter_out_is_noticed(agent: Agent, double: VllmDouble, make: Make) -> None:
    """Though what the adapter changes is far less than the tolerance."""
    for parameter in agent.parameters_by_role()["policy"]:
        parameter.data *= 0.3
    sampler = make()
    sampler.sync()
    (there,) = double.adapters.values()
    with there.reference(), pytest.raises(ModelError, match="the server plays without the adapter"):
        sampler.generate(prompts(3), generators(3), Sampling(ROOM))


def test_another_model_there_is_noticed_at_once(agent: Agent, double: VllmDouble, make: Make) -> None:
    sampler = make()
    sampler.sync()
    other(agent, 0.3)  # the server has the adapter of before
    with pytest.raises(ModelError, match=r"nats a token from those computed here, more than rollout.tolerance=0.1"):
        sampler.generate(prompts(3), generators(3), Sampling(ROOM))
    forgiving = make(tolerance=100.0)
    forgiving.sync()
    other(agent, 0.3)
    forgiving.generate(prompts(3), generators(3), Sampling(ROOM))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda answer: answer | {"prompt_token_ids": answer["prompt_token_ids"][::2]}, "the pictures of a prompt are"),
        (
            lambda answer: answer | {"prompt_token_ids": [5, *answer["prompt_token_ids"]]},
            "the server reads a prompt as",
        ),
        (lambda answer: {"choices": answer["choices"]}, "what came back is no chat completion.*it has to be vLLM"),
        (lambda answer: answer | {"choices": [answer["choices"][0] | {"token_ids": []}]}, "no chat completion"),
        (lambda answer: answer | {"choices": [answer["choices"][0] | {"logprobs": None}]}, "no chat completion"),
        (
            lambda answer: answer | {"choices": [answer["choices"][0] | {"finish_reason": "abort"}]},
            "no chat completion",
        ),
    ],
)
def test_answers_that_are_none(double: VllmDouble, make: Make, change: Any, error: str) -> None:
    double.changed = change
    sampler = make()
    sampler.sync()
    with pytest.raises(ModelError, match=error):
        sampler.generate(prompts(3)[1:], generators(2), Sampling(ROOM))


def test_a_server_that_takes_no_adapters(double: VllmDouble, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double, "post", lambda *words: Server.post(double, *words))
    with pytest.raises(ModelError, match=r"load_lora_adapter: status 404.*stage=serve stage.lora_rank="):
        make().sync()


WORDS = ("stage=ppo", "env=minigrid", "env.max_steps=3", "algo.correction=truncate", "model/lora=adapter")
WORDS += (
    "algo.count_coef=0.1",
    "model.lora.rank=2",
    "model.lora.alpha=4",
    "rollout=vllm",
    "hardware.threads=1",
    "tracking=jsonl",
)


@pytest.mark.slow  # the double answers one request after the other
@pytest.mark.parametrize("algo", [("algo=grpo", "algo.group_size=4"), ("algo=ppo", "algo.value_warmup=0")])
def test_training_by_it(cli: Callable[..., int], shipped: VllmDouble, algo: tuple[str, ...]) -> None:
    """The policy that plays is the one that is trained, in every iteration, though each moves it far."""
    double = shipped
    words = (*WORDS, *algo, f"rollout.remote.url={double.url}", "name=there", "algo.lr=3e-3")
    words += ("stage.iterations=2", "stage.episodes=4", "stage.num_envs=4", "stage.eval_episodes=1", "seed=3")
    assert cli(*words) == 0
    lines = [json.loads(line) for line in Path("outputs/there/ppo/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "ppo/mismatch_kl" in line]
    assert [line["ppo/mismatch_kl"] < 1e-6 for line in trained] == [True] * 2
    assert [line["ppo/ratio_at_start"] == pytest.approx(1, abs=1e-4) for line in trained] == [True] * 2
    assert all(line["ppo/policy_grad_norm"] > 0.01 for line in trained)
    assert all(line["time/swap"] > 0 for line in trained)
    assert not double.adapters
    assert len(double.loaded) == 4  # two iterations and two panels
    assert not list(Path("outputs/there/ppo/rollout").iterdir())


@pytest.mark.slow
def test_a_server_plays_on_while_it_is_learned_from(
    cli: Callable[..., int], shipped: VllmDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each iteration but the first was played by the weights before the last update; its ratios begin at 1 all the
    same, as they are of the newest weights."""
    double, learn, asked = shipped, Learner.learn, list[int]()

    def learned(*words: Any) -> dict[str, float]:
        before, end = len(double.requests), time.monotonic() + 60
        found = learn(*words)
        followed = len(asked) < 2  # the last has none after it
        while followed and len(double.requests) == before and time.monotonic() < end:
            time.sleep(0.01)
        asked.append(len(double.requests) - before)
        return found

    monkeypatch.setattr(Learner, "learn", learned)
    words = (*WORDS, "algo=grpo", "algo.group_size=4", f"rollout.remote.url={double.url}", "name=eager", "algo.lr=1e-2")
    words += ("stage.iterations=3", "stage.episodes=4", "stage.num_envs=4", "stage.eval_episodes=1", "seed=3")
    assert cli(*words, "stage.staleness=1", "env.max_steps=6") == 0
    lines = [json.loads(line) for line in Path("outputs/eager/ppo/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "ppo/mismatch_kl" in line]
    assert [line["rollout/staleness"] for line in trained] == [0, 1, 1]
    assert [line["ppo/mismatch_kl"] < 1e-6 for line in trained] == [True, False, False]
    assert [line["ppo/ratio_at_start"] == pytest.approx(1, abs=1e-4) for line in trained] == [True] * 3
    assert [count > 0 for count in asked] == [True, True, False]
    assert not double.adapters


def test_the_agent_of_a_server_is_not_exact(agent: Agent, make: Make) -> None:
    """Log-probs of another program aren't taken for those of the update."""
    assert agent.exact
    make()
    assert not agent.exact
