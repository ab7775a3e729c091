from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlm_agents.errors import ModelError
from vlm_agents.models import Agent, HFSampler
from vlm_agents.models.drafts import CONTEXT
from vlm_agents.models.sampler import draw
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row
from vlm_agents.types import Message, Part, Prompt, Reply, Sampling

Load = Callable[..., Agent]
EndSoon = Callable[[Agent], Agent]
MakeRow = Callable[..., Row]
RowOf = Callable[[Prompt, Reply], Row]
ValuesOf = Callable[..., Tensor]
ROOM = 24  # tokens a reply


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, index]) for index in range(count)]


def sample(agent: Agent, prompts: Sequence[Prompt], seed: int = 0, greedy: bool = False) -> list[Reply]:
    return HFSampler(agent).generate(prompts, generators(len(prompts), seed), Sampling(ROOM, greedy=greedy))


def generated(agent: Agent, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Greedy replies of transformers' own `generate`, up to and including the end of turn."""
    rendered = [agent.renderer.render(prompt) for prompt in prompts]
    width = max(len(row.ids) for row in rendered)
    ids = torch.full((len(rendered), width), agent.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rendered):
        ids[index, width - len(row.ids) :] = torch.from_numpy(row.ids)
        mask[index, width - len(row.ids) :] = 1
    pictures = [picture.image for row in rendered for picture in row.images]
    inputs: dict[str, Any] = dict(agent.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    output = agent.model.generate(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == agent.family.image_token_id).int(),
        **inputs,
        do_sample=False,
        max_new_tokens=ROOM,
        suppress_tokens=agent.banned.nonzero().squeeze().tolist(),
        eos_token_id=agent.renderer.end_of_turn,
        pad_token_id=agent.tokenizer.pad_token_id,
    )
    replies = output[:, width:].tolist()
    end = agent.renderer.end_of_turn
    return [reply[: reply.index(end) + 1] if end in reply else reply for reply in replies]


@pytest.fixture(params=["shared prefix", "nothing shared", "equal lengths", "one"])
def prompts(request: pytest.FixtureRequest, chats: list[Prompt]) -> list[Prompt]:
    """Batches that take each of the ways through prefill."""
    match request.param:
        case "shared prefix":
            return [*chats, *chats]
        case "nothing shared":  # and so left-padded as a whole
            return [(Message("system", (f"{index} games.",)), *chat[1:]) for index, chat in enumerate([*chats, *chats])]
        case "equal lengths":
            return [chats[0], chats[3]] * 4
        case _:
            return [chats[2]]


# ---- what is sampled -------------------------------------------------------------------------------------------------
def test_greedy_replies_are_those_of_transformers(agent: Agent, brief_agent: Agent, prompts: list[Prompt]):
    replies = sample(agent, prompts, greedy=True)
    assert [list(reply.token_ids) for reply in replies] == generated(agent, prompts)
    brief = sample(brief_agent, prompts, greedy=True)
    assert [list(reply.token_ids) for reply in brief] == generated(brief_agent, prompts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_the_ratio_is_one(
    load: Load,
    end_soon: EndSoon,
    prompts: list[Prompt],
    row_of: RowOf,
    values_of: ValuesOf,
    temperature: float,
    greedy: bool,
):
    agent = end_soon(load(temperature=temperature))
    replies = sample(agent, prompts, greedy=greedy)
    if len(prompts) > 1 and not greedy:  # rows leave the batch at different times
        assert len({len(reply.token_ids) for reply in replies}) > 3
    rows = [row_of(*pair) for pair in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        scores = agent.score(rows)
        expected = values_of(agent, rows, scores)
    sampled = torch.tensor([logprob for reply in replies for logprob in reply.logprobs])
    torch.testing.assert_close(sampled, scores.logprobs, rtol=0, atol=1e-5)
    values = torch.tensor([reply.value for reply in replies])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    lengths = [len(reply.token_ids) for reply in replies]
    entropies = torch.stack([part.mean() for part in scores.entropy.split(lengths)])
    torch.testing.assert_close(torch.tensor([reply.entropy for reply in replies]), entropies, rtol=0, atol=1e-5)


def test_a_reply_is_what_its_tokens_say(brief_agent: Agent, chats: list[Prompt]):
    end = brief_agent.renderer.end_of_turn
    finishes = set()
    for prompt, reply in zip(chats * 4, sample(brief_agent, chats * 4), strict=True):
        assert reply.prompt_token_ids == tuple(brief_agent.renderer.render(prompt).ids.tolist())
        assert reply.text == brief_agent.renderer.decode(reply.token_ids)
        assert len(reply.logprobs) == len(reply.token_ids)
        if reply.finish == "stop":
            assert reply.token_ids.index(end) == len(reply.token_ids) - 1
        else:
            assert len(reply.token_ids) == ROOM
            assert end not in reply.token_ids
        finishes.add(reply.finish)
    assert finishes == {"stop", "length"}


def test_a_reply_doesnt_depend_on_who_shares_the_batch(brief_agent: Agent, chats: list[Prompt]):
    together = sample(brief_agent, chats * 3)
    order = np.random.default_rng(0).permutation(len(together)).tolist()
    rngs = generators(len(together))
    shuffled = HFSampler(brief_agent).generate(
        [(chats * 3)[i] for i in order], [rngs[i] for i in order], Sampling(ROOM)
    )
    assert [reply.token_ids for reply in shuffled] == [together[i].token_ids for i in order]
    rngs = generators(len(together))
    for index, prompt in enumerate(chats * 3):
        (alone,) = HFSampler(brief_agent).generate([prompt], [rngs[index]], Sampling(ROOM))
        assert alone.token_ids == together[index].token_ids
        torch.testing.assert_close(alone.logprobs, together[index].logprobs, rtol=0, atol=1e-5)


def test_a_generator_is_used_equally_by_short_and_long_replies(brief_agent: Agent, chats: list[Prompt]):
    rngs = generators(20)
    replies = HFSampler(brief_agent).generate(chats * 4, rngs, Sampling(ROOM))
    assert len({len(reply.token_ids) for reply in replies}) > 3
    fresh = generators(20)
    for rng in fresh:
        rng.random(ROOM)
    assert [rng.random() for rng in rngs] == [rng.random() for rng in fresh]


def test_no_banned_token_is_ever_sampled(load: Load, chats: list[Prompt]):
    agent = load(temperature=3.0)  # nearly uniform: 23 of some 400 tokens are banned
    replies = sample(agent, chats * 6)
    sampled = [token for reply in replies for token in reply.token_ids]
    assert len(sampled) > 500
    assert not agent.banned[sampled].any()
    assert len(set(sampled)) > 150


@pytest.mark.parametrize("greedy", [False, True])
def test_weights_that_are_no_numbers_are_told(load: Load, chats: list[Prompt], greedy: bool):
    agent = load()
    with torch.no_grad():
        for weight in agent.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="logits aren't finite"):
        sample(agent, chats, greedy=greedy)


def test_a_reply_of_one_token(brief_agent: Agent, chats: list[Prompt], row_of: RowOf):
    replies = HFSampler(brief_agent).generate(chats * 8, generators(40), Sampling(1))
    assert {len(reply.token_ids) for reply in replies} == {1}
    ends = [reply.token_ids[0] == brief_agent.renderer.end_of_turn for reply in replies]
    assert [reply.finish == "stop" for reply in replies] == ends
    assert 0 < sum(ends) < 40
    rows = [row_of(*pair) for pair in zip(chats * 8, replies, strict=True)]
    with torch.no_grad():
        scores = brief_agent.score(rows)
    torch.testing.assert_close(torch.tensor([r.logprobs[0] for r in replies]), scores.logprobs, rtol=0, atol=1e-5)


def test_a_stop_text_ends_a_reply(brief_agent: Agent, chats: list[Prompt]):
    """As it would have gone on, up to the token that completes the text."""
    whole = sample(brief_agent, chats * 8)
    decode = brief_agent.renderer.decode
    stop = next(reply.text[2:5] for reply in whole if len(reply.token_ids) == ROOM and reply.text[2:5].strip())
    cut = HFSampler(brief_agent).generate(chats * 8, generators(40), Sampling(ROOM, (stop, "never said")))
    for before, after in zip(whole, cut, strict=True):
        count = len(after.token_ids)
        assert after.token_ids == before.token_ids[:count]
        torch.testing.assert_close(after.logprobs, before.logprobs[:count], rtol=0, atol=1e-5)
        if stop in before.text:
            assert stop in after.text
            assert stop not in decode(after.token_ids[:-1])
            assert after.finish == "stop"
        else:
            assert (count, after.finish) == (len(before.token_ids), before.finish)
    assert sum(stop in reply.text for reply in cut) >= 1


def test_values_are_those_of_the_replies(agent: Agent, prompts: list[Prompt]):
    expected = [reply.value for reply in sample(agent, prompts)]
    torch.testing.assert_close(HFSampler(agent).values(prompts), expected, rtol=0, atol=1e-5)
    assert HFSampler(agent).values([]) == []


def test_replies_of_a_long_chat_keep_the_ratio_at_one(
    brief_agent: Agent, chats: list[Prompt], make_row: MakeRow, values_of: ValuesOf
):
    prompt, said = chats[0], []
    for turn in range(3):
        (reply,) = HFSampler(brief_agent).generate([prompt], generators(1, turn), Sampling(ROOM))
        said.append(reply)
        prompt = (*prompt, Message("assistant", (reply.text,), token_ids=reply.token_ids), Message("user", ("on",)))
    row = make_row(brief_agent, chats[0], *(reply.token_ids for reply in said))
    assert len(row.spans) == 3
    with torch.no_grad():
        scores = brief_agent.score([row])
        values = values_of(brief_agent, [row], scores)
    sampled = torch.tensor([logprob for reply in said for logprob in reply.logprobs])
    torch.testing.assert_close(sampled, scores.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor([reply.value for reply in said]), values, rtol=0, atol=1e-5)


def test_a_frozen_vision_part_samples_the_same(load: Load, chats: list[Prompt]):
    plain, frozen = (sample(load(freeze_vision=freeze), [*chats, *chats]) for freeze in (False, True))
    assert [reply.token_ids for reply in plain] == [reply.token_ids for reply in frozen]


# ---- drafts ----------------------------------------------------------------------------------------------------------
class Passes:
    """Counts the passes of an agent's text model."""

    def __init__(self, agent: Agent) -> None:
        self.count = 0
        self.hook = agent.family.text.register_forward_hook(self._seen)

    def _seen(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("stop", [False, True], ids=["", "stop text"])
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_drafts_change_nothing_but_the_number_of_passes(
    agent: Agent, brief_agent: Agent, prompts: list[Prompt], greedy: bool, stop: bool
):
    """Right ones, and beside them some of other replies, which are right for a while."""
    agent = agent if greedy else brief_agent  # whose likeliest reply is empty
    sampling = Sampling(ROOM, greedy=greedy)
    if stop:
        said = [reply.text for reply in sample(agent, prompts, greedy=greedy)]
        sampling = sampling._replace(stop=(max(said, key=len)[3:6],))
    passes, sampler = Passes(agent), HFSampler(agent)
    plain = sampler.generate(prompts, generators(len(prompts)), sampling)
    before, passes.count = passes.count, 0
    for seed in (1, 2):
        for reply in sample(agent, prompts, seed):
            sampler.drafts.learn(reply.token_ids[: ROOM // 2])
    passes.count = 0
    drafted = sampler.generate(prompts, generators(len(prompts)), sampling)
    passes.hook.remove()
    assert passes.count <= max(2, before // 2)
    assert [(reply.token_ids, reply.text, reply.finish) for reply in drafted] == [
        (reply.token_ids, reply.text, reply.finish) for reply in plain
    ]
    for one, other in zip(drafted, plain, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert (one.value, one.entropy) == pytest.approx((other.value, other.entropy), abs=1e-5)


def test_equal_prompts_are_run_once(brief_agent: Agent, chats: list[Prompt]):
    """And each is answered by its own numbers."""
    rows: list[int] = []
    hook = brief_agent.family.text.register_forward_hook(lambda *_args: rows.append(len(_args[-1][0])))
    replies = sample(brief_agent, chats * 4)
    hook.remove()
    assert rows[:2] == [1, len(chats)]  # the prefix that all share, then each once
    assert len({reply.token_ids for reply in replies}) > len(chats)
    for index, prompt in enumerate(chats * 4):
        (alone,) = HFSampler(brief_agent).generate([prompt], [generators(index + 1)[index]], Sampling(ROOM))
        assert alone.token_ids == replies[index].token_ids
        torch.testing.assert_close(alone.logprobs, replies[index].logprobs, rtol=0, atol=1e-5)


def test_drafts_are_forgotten_with_the_weights(brief_agent: Agent, chats: list[Prompt]):
    """A run that goes on from a checkpoint has none: their passes may round otherwise."""
    sampler = HFSampler(brief_agent)
    replies = sampler.generate(chats, generators(len(chats)), Sampling(ROOM))
    begun = np.array([max((reply.token_ids for reply in replies), key=len)[-CONTEXT - 1 : -1]])
    assert sampler.drafts.guess(begun, ROOM).size
    sampler.sync()
    assert not sampler.drafts.guess(begun, ROOM).size


# ---- chats that go on ------------------------------------------------------------------------------------------------
def gone_on(prompt: Prompt, reply: Reply, *shown: Part) -> Prompt:
    said = Message("assistant", (reply.text,), token_ids=reply.token_ids)
    return (*prompt, said, Message("user", shown))


def widths(agent: Agent) -> tuple[list[int], Any]:
    """Tokens that each pass of the text model reads of a row, and the hook that notes them."""
    found: list[int] = []
    return found, agent.family.text.register_forward_hook(lambda *_args: found.append(_args[-1][0].shape[1]))


def assert_alike(ours: Sequence[Reply], expected: Sequence[Reply]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert (one.token_ids, one.prompt_token_ids, one.finish) == (
            other.token_ids,
            other.prompt_token_ids,
            other.finish,
        )
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert (one.value, one.entropy) == pytest.approx((other.value, other.entropy), abs=1e-5)


@pytest.mark.parametrize("stop", [False, True], ids=["", "stop text"])
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_a_chat_that_goes_on_is_read_from_where_it_was_left(
    agent: Agent,
    brief_agent: Agent,
    chats: list[Prompt],
    picture: Callable[..., Image.Image],
    greedy: bool,
    stop: bool,
):
    """As if it were read anew: replies of different length, with and without pictures, end in each way."""
    agent = agent if greedy else brief_agent  # whose likeliest reply is empty
    sampling = Sampling(ROOM, greedy=greedy, continued=True)
    if stop:
        said = [reply.text for reply in sample(agent, chats, greedy=greedy)]
        sampling = sampling._replace(stop=(max(said, key=len)[3:6],))
    sampler, prompts = HFSampler(agent), list(chats)
    for turn in range(4):
        read, hook = widths(agent)
        replies = sampler.generate(prompts, generators(len(prompts), turn), sampling)
        hook.remove()
        anew = HFSampler(agent).generate(prompts, generators(len(prompts), turn), sampling)
        assert_alike(replies, anew)
        if turn:
            assert read[0] < min(len(reply.prompt_token_ids) for reply in replies)
        shown = [(Picture(picture(56, 56, turn)), "on"), ("and on",), (Picture(picture(84, 56, turn)), "go " * 20)]
        prompts = [
            gone_on(prompt, reply, *shown[index % 3])
            for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
        ]


def test_what_the_critic_is_asked_between_turns_leaves_chats_known(brief_agent: Agent, chats: list[Prompt]):
    """As for an episode that was cut off, while the others go on."""
    sampler, sampling = HFSampler(brief_agent), Sampling(ROOM, continued=True)
    first = sampler.generate(chats, generators(len(chats)), sampling)
    prompts = [gone_on(prompt, reply, "on") for prompt, reply in zip(chats, first, strict=True)]
    read, hook = widths(brief_agent)
    (value,) = sampler.values(prompts[:1])
    replies = sampler.generate(prompts, generators(len(prompts), 1), sampling)
    hook.remove()
    assert max(read) < min(len(reply.prompt_token_ids) for reply in replies)
    assert value == pytest.approx(replies[0].value, abs=1e-5)


def test_equal_chats_go_on_alike(brief_agent: Agent, chats: list[Prompt]):
    """A group's plays may say the same, and then each something else."""
    sampler, sampling = HFSampler(brief_agent), Sampling(ROOM, continued=True)
    same = [np.random.default_rng(0) for _ in range(3)]
    first = sampler.generate([chats[0]] * 3, same, sampling)
    prompts = [gone_on(chats[0], reply, "on") for reply in first]
    replies = sampler.generate(prompts, generators(3), sampling)
    assert_alike(replies, HFSampler(brief_agent).generate(prompts, generators(3), sampling))
    assert len({reply.token_ids for reply in replies}) > 1


def test_chats_that_go_on_share_a_batch_with_others(
    brief_agent: Agent, chats: list[Prompt], picture: Callable[..., Image.Image]
):
    """One that is new, one whose picture is another than was answered, and one that lost its first turn."""
    sampler, sampling = HFSampler(brief_agent), Sampling(ROOM, continued=True)
    first = sampler.generate(chats, generators(len(chats)), sampling)
    prompts = [gone_on(prompt, reply, "on") for prompt, reply in zip(chats, first, strict=True)]
    prompts[0] = (prompts[0][0], Message("user", (Picture(picture(84, 56, 9)), "go")), *prompts[0][2:])
    prompts[3] = (prompts[3][0], *prompts[3][3:])
    prompts.insert(1, chats[4])
    read, hook = widths(brief_agent)
    replies = sampler.generate(prompts, generators(len(prompts), 1), sampling)
    hook.remove()
    assert read[2] < 30  # what is new of each, once those that are new, and what they share, were read by themselves
    assert_alike(replies, HFSampler(brief_agent).generate(prompts, generators(len(prompts), 1), sampling))


@pytest.mark.parametrize("between", ["other weights", "an update", "another batch"])
def test_chats_are_known_to_the_next_batch_alone(brief_agent: Agent, chats: list[Prompt], between: str):
    sampler, sampling = HFSampler(brief_agent), Sampling(ROOM, continued=True)
    with sampler.synced() if between == "an update" else nullcontext():
        replies = sampler.generate(chats[:1], generators(1), sampling)
    if between == "other weights":
        sampler.sync()
    if between == "another batch":
        sampler.generate(chats[2:3], generators(1), sampling)
    prompt = gone_on(chats[0], replies[0], "on")
    read, hook = widths(brief_agent)
    sampler.generate([prompt], generators(1), sampling)
    hook.remove()
    assert read[0] == len(brief_agent.renderer.render(prompt).ids)


# ---- the draw --------------------------------------------------------------------------------------------------------
LAST = 1 - 2**-53  # the largest number that Generator.random gives


def log(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (0.2499, 1), (0.2501, 2), (0.4999, 2), (0.5001, 4), (0.7499, 4), (0.7501, 5), (LAST, 5)],
)
def test_a_draw_inverts_the_cumulative_distribution(uniform: float, token: int):
    # cumulative: 0, 0.25, 0.5, 0.5, 0.75, 1, 1. Tokens 0, 3 and 6 are impossible
    chosen = draw(log(0, 0.25, 0.25, 0, 0.25, 0.25, 0), torch.tensor([uniform], dtype=torch.float64))
    assert chosen.tolist() == [token]


def test_the_ends_of_a_draw_are_possible_tokens():
    torch.manual_seed(0)
    for _ in range(200):
        logits = torch.randn(2, 50) * 20  # many probabilities are too small to move the sum
        logits[:, [0, 1, -2, -1]] = -torch.inf
        distribution = logits.log_softmax(-1)
        chosen = draw(distribution, torch.tensor([0.0, LAST], dtype=torch.float64))
        assert (distribution.gather(-1, chosen[:, None]) > -torch.inf).all()


def test_even_draws_give_each_token_its_share():
    torch.manual_seed(0)
    distribution = torch.randn(1, 30).log_softmax(-1)
    points = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = draw(distribution.expand(10_000, -1), points).bincount(minlength=30)
    # a token of probability p covers an interval of 10000 p points: one more or less at its ends
    assert (counts - 10_000 * distribution[0].exp()).abs().max() < 1.01


def test_certainty_is_always_drawn():
    points = torch.tensor([0.0, 0.5, LAST], dtype=torch.float64)
    assert draw(log(0, 1, 0).expand(3, -1), points).tolist() == [1, 1, 1]
