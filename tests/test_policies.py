"""Who says what, what is marked as chance, and that all randomness is the query's own."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vlm_agents.config import HardwareConfig, ModelConfig, PromptConfig
from vlm_agents.errors import ConfigError
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.models.tiny import build
from vlm_agents.policies import NO_PLAN, ExpertPolicy, ModelPolicy, NoisyPolicy, RandomPolicy
from vlm_agents.prompting import make_format
from vlm_agents.types import Advice, Message, Observation, Query, Reply, Sampling

FORMAT = make_format(PromptConfig("cot_json"))
LEGAL = ("left", "right", "stay")
ADVICE = Advice("the door is on the right", "right", 3)


def query(seed: int = 0, advice: Advice | None = ADVICE, legal: tuple[str, ...] | None = LEGAL) -> Query:
    observation = Observation("a room", legal_actions=legal, advice=advice)
    return Query((Message("user", ("a room",)),), observation, np.random.default_rng(seed))


def said(reply: Reply) -> dict[str, str]:
    return json.loads(reply.text)


class Clerk:
    """Answers each query with its number, as a model would, and counts how many it was asked."""

    name = "clerk"
    format = FORMAT

    def __init__(self) -> None:
        self.asked = 0

    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        assert queries, "nobody asks for nothing"
        self.asked += len(queries)
        return [Reply(str(index), token_ids=(7,), logprobs=(-0.5,), entropy=0.1) for index, _ in enumerate(queries)]

    def value(self, queries: Sequence[Query]) -> list[float]:
        return [2.5] * len(queries)


def test_the_expert_says_its_advice_and_it_is_no_chance():
    (reply,) = ExpertPolicy(FORMAT).reply([query()])
    assert said(reply) == {"thoughts": "the door is on the right", "action": "right"}
    assert reply.source == "expert"


def test_a_lost_expert_moves_at_random_and_says_so():
    lost, sure = ExpertPolicy(FORMAT).reply([query(advice=None), query()])
    assert said(lost)["thoughts"] == NO_PLAN
    assert said(lost)["action"] in LEGAL
    assert lost.source == "random"
    assert sure.source == "expert"


def test_random_moves_are_uniform_and_carry_their_entropy():
    replies = RandomPolicy(FORMAT).reply([query(seed) for seed in range(3000)])
    counts = [sum(said(reply)["action"] == action for reply in replies) for action in LEGAL]
    # 3000 draws at 1/3: mean 1000, standard deviation sqrt(3000 * 2/9) = 25.8; five of them are 129
    assert all(abs(count - 1000) < 129 for count in counts)
    assert all(reply.entropy == math.log(3) and reply.source == "random" for reply in replies)


def test_random_moves_depend_on_the_query_only():
    policy = RandomPolicy(FORMAT)
    together = policy.reply([query(seed) for seed in range(8)])
    alone = [policy.reply([query(seed)])[0] for seed in range(8)]
    assert together == alone
    assert len({reply.text for reply in together}) > 1


def test_random_moves_need_a_list_of_actions():
    with pytest.raises(ConfigError, match="free text"):
        RandomPolicy(FORMAT).reply([query(legal=None)])


def test_noise_replaces_its_share_and_asks_only_for_the_rest():
    clerk = Clerk()
    replies = NoisyPolicy(clerk, 0.3).reply([query(seed) for seed in range(2000)])
    strays = [reply.source for reply in replies].count("random")
    # 2000 draws at 0.3: mean 600, standard deviation sqrt(2000 * 0.21) = 20.5; five of them are 103
    assert abs(strays - 600) < 103
    assert clerk.asked == 2000 - strays
    assert [reply.text for reply in replies if reply.source == "model"] == [str(n) for n in range(clerk.asked)]


@pytest.mark.parametrize(("noise", "asked"), [(0.0, 20), (1.0, 0)])
def test_noise_at_its_ends(noise: float, asked: int):
    clerk = Clerk()
    policy = NoisyPolicy(clerk, noise)
    replies = policy.reply([query(seed) for seed in range(20)])
    assert clerk.asked == asked
    assert [reply.source for reply in replies].count("random") == 20 - asked
    assert policy.name == f"clerk+noise{noise:g}"
    assert policy.value([query()]) == [2.5]


def test_a_model_is_sampled_with_each_querys_own_randomness(tmp_path: Path):
    build(tmp_path, [FORMAT.write("go", action, LEGAL) for action in LEGAL])
    agent = load_agent(ModelConfig("tiny", path=str(tmp_path)), HardwareConfig("cpu"))
    policy = ModelPolicy(HFSampler(agent), FORMAT, Sampling(5))
    replies = policy.reply([query(seed) for seed in (1, 2, 1)])
    assert replies[0].text == replies[2].text != replies[1].text
    assert all(1 <= len(reply.token_ids) == len(reply.logprobs) <= 5 for reply in replies)
    assert not any(reply.source == "random" for reply in replies)
    # the critic is asked the same question when it samples and when an episode was truncated
    assert policy.value([query(), query()]) == pytest.approx([reply.value for reply in replies[:2]], rel=1e-5)
    greedy = ModelPolicy(HFSampler(agent), FORMAT, Sampling(5, greedy=True))
    first, second = greedy.reply([query(1), query(2)])
    assert first.text == second.text
