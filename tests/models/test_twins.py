"""Each family at tiny size does what transformers does with the same weights, in every way that we use it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaNextProcessor

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig, TrainableConfig, conf_dir
from vlm_agents.errors import DataError
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row, Scores
from vlm_agents.types import Message, Prompt, Reply, Sampling

TWINS = ["tiny_qwen2_vl", "tiny_qwen3_vl", "tiny_llava", "unlisted"]
ROOM = 12  # tokens a reply
REPLIES = [[30, 31, 32], [40], [50, 51], [60, 61, 62, 63, 64], [70, 71]]

Load = Callable[..., Agent]
MakeRow = Callable[..., Row]
ValuesOf = Callable[..., Tensor]
RowOf = Callable[[Prompt, Reply], Row]


@pytest.fixture(scope="module")
def twin(llava_folder: Path) -> Load:
    """`twin(name, init=None, freeze_vision=False, **model settings)`: as conf/model says, with a value head to read.

    "unlisted" is a LLaVA-1.5 out of a folder, with weights drawn anew.
    """

    def loaded(name: str, init: Path | None = None, freeze_vision: bool = False, **settings: Any) -> Agent:
        said = {"name": name, "path": str(llava_folder), "weights": "random"}
        if name != "unlisted":
            said = yaml.safe_load((conf_dir() / f"model/{name}.yaml").read_text())
            del said["defaults"]
        train = TrainableConfig(not freeze_vision, not freeze_vision)
        cfg = ModelConfig(**{**said, "train": train, **settings})
        agent = load_agent(cfg, HardwareConfig(name="cpu"), str(init) if init else None)
        if init is None:
            torch.manual_seed(0)
            for parameter in agent.value_head.parameters():
                nn.init.normal_(parameter, std=0.1)
        return agent

    return loaded


@pytest.fixture(scope="module", params=TWINS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def agent(twin: Load, name: str) -> Agent:
    """For reading only."""
    return twin(name)


@pytest.fixture(scope="module")
def rows(agent: Agent, chats: list[Prompt], make_row: MakeRow) -> list[Row]:
    """Mixed lengths and pictures; the fourth holds two replies."""
    built = [make_row(agent, chat, reply) for chat, reply in zip(chats, REPLIES, strict=True)]
    built[3] = make_row(agent, chats[3], REPLIES[3], [65, 66])
    return built


@pytest.fixture(params=["one system message", "other system messages"])
def prompts(request: pytest.FixtureRequest, chats: list[Prompt]) -> list[Prompt]:
    """Batches with a shared prefix, and without, which is to say left-padded as a whole."""
    if request.param == "one system message":
        return chats
    return [(Message("system", (f"{index} games.",)), *chat[1:]) for index, chat in enumerate(chats)]


def stock_inputs(agent: Agent, ids: Tensor, pictures: Sequence[Picture]) -> dict[str, Any]:
    """What transformers' own forward pass wants."""
    inputs = (
        dict(agent.image_processor(images=[one.image for one in pictures], return_tensors="pt")) if pictures else {}
    )
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == agent.family.image_token_id).int()
    return {"input_ids": ids, **inputs}


def attention_mask(rows: Sequence[Row]) -> Tensor:
    """[N T] 1 at the tokens of right-padded rows."""
    return (torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])).long()


def score(agent: Agent, rows: Sequence[Row]) -> Scores:
    with torch.no_grad():
        return agent.score(rows)


def close(one: Tensor, other: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def stir(agent: Agent) -> None:
    """Give the adapters something to say: fresh ones leave the model as it is."""
    torch.manual_seed(1)
    for parameter_name, parameter in agent.model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.05)


# ---- scoring ---------------------------------------------------------------------------------------------------------
def test_scores_are_those_of_a_plain_forward_pass(agent: Agent, rows: list[Row], values_of: ValuesOf):
    scores, expected, values = score(agent, rows), [], []
    for row in rows:
        ids = torch.from_numpy(row.input_ids)[None]
        with torch.no_grad():
            output = agent.model(**stock_inputs(agent, ids, row.images), output_hidden_states=True)
        logprobs = output.logits[0].masked_fill(agent.banned, -torch.inf).log_softmax(-1)
        places = [place for start, end in row.spans for place in range(start, end)]
        expected.append(logprobs[[place - 1 for place in places], ids[0, places]])
        values.append(agent.value_head(output.hidden_states[-1][0, [start - 1 for start, _ in row.spans]]))
    close(scores.logprobs, torch.cat(expected))
    close(values_of(agent, rows, scores), torch.cat(values))


def test_a_batch_of_one_is_a_batch_of_many(agent: Agent, rows: list[Row]):
    together = score(agent, rows)
    alone = [score(agent, [row]) for row in rows]
    for part in ("logprobs", "entropy", "states"):
        close(getattr(together, part), torch.cat([getattr(scores, part) for scores in alone]))


def test_frozen_pictures_score_the_same_and_are_kept(twin: Load, name: str, agent: Agent, rows: list[Row]):
    frozen = twin(name, freeze_vision=True)
    assert frozen.images.frozen
    images = frozen.collate(rows).images
    features = frozen.images.features(images)
    assert features is not None
    # Qwen3-VL's features hold an embedding and what two decoder layers add to it
    assert features.shape[1] == 128 * {"tiny_qwen3_vl": 3}.get(name, 1)
    close(score(frozen, rows).logprobs, score(agent, rows).logprobs)
    kept = frozen.images.features(images)
    assert kept is not None
    assert torch.equal(kept, features)


def test_every_part_of_a_picture_counts(twin: Load, name: str, agent: Agent, rows: list[Row]):
    """All that the vision part hands over reaches the scores: each level of features, the newline too."""
    before = score(agent, rows).logprobs
    features = agent.renderer.family.encode(agent.family.pixels([one.image for one in rows[0].images]))[0]
    changed = twin(name, freeze_vision=True)
    for level in range(0, features.shape[1], 128):
        changed.images.clear()
        changed.images.features(changed.collate(rows).images)
        for kept in changed.images._features.values():
            kept[:, level : level + 128] = 0
        assert (score(changed, rows).logprobs - before).abs().max() > 1e-3


def test_the_sft_loss_is_that_of_transformers(twin: Load, name: str, rows: list[Row]):
    agent = twin(name)
    agent.banned.zero_()  # transformers gives reserved tokens their share
    tokens = agent.collate(rows)
    labels = tokens.input_ids.masked_fill(~tokens.reply_mask, -100)
    images = [image for row in rows for image in row.images]
    inputs = stock_inputs(agent, tokens.input_ids, images)
    with torch.no_grad():
        expected = agent.model(**inputs, attention_mask=attention_mask(rows), labels=labels).loss
        close(-agent.score(rows).logprobs.mean(), expected)


def test_training_reaches_every_part(twin: Load, name: str, rows: list[Row]):
    agent = twin(name)
    agent.score(rows).logprobs.sum().backward()
    idle = {n for n, p in agent.model.named_parameters() if p.grad is None or not p.grad.any()}
    # LLaVA reads the last layer but one of its CLIP; a key's bias moves all scores of a query alike
    of_clip = {n for n in idle if "vision_tower" in n and ("layers.2." in n or "post_layernorm" in n)}
    assert {n for n in idle - of_clip if not n.endswith("k_proj.bias")} == set()


# ---- sampling --------------------------------------------------------------------------------------------------------
def generated(agent: Agent, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Greedy replies of transformers' own `generate`, up to and including the end of turn."""
    rendered = [agent.renderer.render(prompt) for prompt in prompts]
    width = max(len(row.ids) for row in rendered)
    ids = torch.full((len(rendered), width), agent.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rendered):
        ids[index, width - len(row.ids) :] = torch.from_numpy(row.ids)
        mask[index, width - len(row.ids) :] = 1
    end = agent.renderer.end_of_turn
    output = agent.model.generate(
        **stock_inputs(agent, ids, [image for row in rendered for image in row.images]),
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=ROOM,
        suppress_tokens=agent.banned.nonzero().squeeze().tolist(),
        eos_token_id=end,
        pad_token_id=agent.tokenizer.pad_token_id,
    )
    replies = output[:, width:].tolist()
    return [reply[: reply.index(end) + 1] if end in reply else reply for reply in replies]


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([0, index]) for index in range(count)]


def test_greedy_replies_are_those_of_transformers(agent: Agent, prompts: list[Prompt]):
    replies = HFSampler(agent).generate(prompts, generators(len(prompts)), Sampling(ROOM, greedy=True))
    assert [list(reply.token_ids) for reply in replies] == generated(agent, prompts)


@pytest.mark.parametrize("freeze", [False, True], ids=["pixels", "features"])
def test_the_ratio_is_one(
    twin: Load,
    end_soon: Callable[[Agent], Agent],
    name: str,
    prompts: list[Prompt],
    row_of: RowOf,
    values_of: ValuesOf,
    freeze: bool,
):
    agent = end_soon(twin(name, freeze_vision=freeze, temperature=0.8))
    prompts = prompts * 3
    replies = HFSampler(agent).generate(prompts, generators(len(prompts)), Sampling(ROOM))
    assert len({len(reply.token_ids) for reply in replies}) > 3
    rows = [row_of(*pair) for pair in zip(prompts, replies, strict=True)]
    scores = score(agent, rows)
    close(torch.tensor([logprob for reply in replies for logprob in reply.logprobs]), scores.logprobs)
    close(torch.tensor([reply.value for reply in replies]), values_of(agent, rows, scores))


def test_a_chat_that_goes_on_is_read_from_where_it_was_left(
    agent: Agent, prompts: list[Prompt], picture: Callable[..., Image.Image]
):
    """Log-probs and values are those of reading it anew; tokens are drawn from them by the same numbers."""
    sampler, sampling = HFSampler(agent), Sampling(ROOM, continued=True)
    for turn in range(3):
        replies = sampler.generate(prompts, generators(len(prompts)), sampling)
        anew = HFSampler(agent).generate(prompts, generators(len(prompts)), sampling)
        for one, other in zip(replies, anew, strict=True):
            assert one.token_ids == other.token_ids
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
            assert one.value == pytest.approx(other.value, abs=1e-5)
        prompts = [
            (
                *prompt,
                Message("assistant", (reply.text,), token_ids=reply.token_ids),
                Message("user", (Picture(picture(56, 56, turn)), "on")),
            )
            for prompt, reply in zip(prompts, replies, strict=True)
        ]


def test_each_prompt_extends_the_last_with_what_was_sampled(agent: Agent, chats: list[Prompt], make_row: MakeRow):
    """Whether a reply ended or was cut; with and without the space that some templates put before it."""
    end, space = agent.renderer.end_of_turn, agent.tokenizer.encode(" ", add_special_tokens=False)
    prompt = chats[0]
    for turn, reply in enumerate([[30, 31, end], [32, 33], [*space, 34, end], [*space, 35]]):
        before = [*agent.renderer.render(prompt).ids.tolist(), *reply]
        user = replace(chats[2][1], parts=(*chats[2][1].images, f"then {turn}"))  # two pictures
        said = Message("assistant", (agent.renderer.decode(reply),), token_ids=tuple(reply))
        prompt = (*prompt, said, user)
        after = agent.renderer.render(prompt).ids.tolist()
        assert after[: len(before)] == before
        # the template ends what was cut; what was ended, only once
        assert after[len(before) - (reply[-1] == end)] == end
        assert after[len(before)] != end or reply[-1] != end


# ---- disk and adapters -----------------------------------------------------------------------------------------------
def test_a_saved_twin_is_the_same_bit_for_bit(twin: Load, name: str, agent: Agent, rows: list[Row], tmp_path: Path):
    agent.save(tmp_path)
    again = twin(name, init=tmp_path)
    assert again.tokenizer.get_vocab() == agent.tokenizer.get_vocab()
    state, loaded = agent.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert [key for key in state if not torch.equal(state[key], loaded[key])] == []
    assert torch.equal(score(again, rows).logprobs, score(agent, rows).logprobs)
    system, user = Message("system", ("You play.",)), Message("user", (*rows[0].images, "go"))
    assert again.renderer.render((system, user)).ids.tolist() == agent.renderer.render((system, user)).ids.tolist()


def test_random_weights_are_those_of_the_seed(twin: Load, name: str, agent: Agent):
    torch.manual_seed(5)
    again, other = twin(name), twin(name, seed=1)
    state = agent.model.state_dict()
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in state.items())
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(state[key], other.model.state_dict()[key])


def test_an_adapter_goes_on_and_off(twin: Load, name: str, agent: Agent, rows: list[Row], tmp_path: Path):
    adapted = twin(name, lora=LoraConfig(rank=4, alpha=8))
    stir(adapted)
    base = score(agent, rows).logprobs
    with adapted.reference():
        close(adapted.score(rows).logprobs, base)
    on = score(adapted, rows)
    assert (on.logprobs - base).abs().max() > 1e-2
    parts = {adapted.family.part_of(n) for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert parts == {"vision", "projector", "language"}
    adapted.save(tmp_path)
    again = twin(name, init=tmp_path, lora=LoraConfig(rank=4, alpha=8))
    assert torch.equal(score(again, rows).logprobs, on.logprobs)


# ---- prompts ---------------------------------------------------------------------------------------------------------
QWEN = (
    "<|im_start|>system\nYou play.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>now?<|im_end|>\n"
    "<|im_start|>assistant\nturn left<|im_end|>\n"
    "<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
)
GOLDEN = {  # what the published chat templates of these families write, and what their tokenizers put before it
    "tiny_qwen2_vl": QWEN,
    "tiny_qwen3_vl": QWEN,
    "tiny_llava": (
        "<s><<SYS>>\nYou play.\n<</SYS>>\n\n[INST] <image>\nnow? [/INST] turn left</s> [INST] and now? [/INST]"
    ),
    "unlisted": "<s>You play. USER: <image>\nnow? ASSISTANT: turn left</s>USER: and now? ASSISTANT:",
}


@pytest.mark.parametrize("sampled", [False, True], ids=["told", "sampled"])
def test_a_chat_reads_as_the_family_has_it(agent: Agent, name: str, picture: Callable[..., Image.Image], sampled: bool):
    image = Picture(picture(84, 56))
    reply = Message("assistant", ("turn left",), token_ids=tuple(agent.renderer.encode_reply("turn left")))
    chat = (
        Message("system", ("You play.",)),
        Message("user", (image, "now?")),
        reply if sampled else replace(reply, token_ids=None),
        Message("user", ("and now?",)),
    )
    token, count = agent.renderer.image_token, agent.family.image_tokens(image.size)
    assert count > 1
    ids = agent.renderer.render(chat).ids.tolist()
    assert agent.tokenizer.decode(ids) == GOLDEN[name].replace(token, token * count)
    assert agent.renderer.decode(agent.renderer.encode_reply("turn left")) == "turn left"


def test_what_a_text_says_is_text(agent: Agent, name: str, picture: Callable[..., Image.Image]):
    """Whichever of the family's reserved tokens it spells."""
    tokens = agent.tokenizer.convert_ids_to_tokens(sorted(agent.renderer.vocabulary.reserved))
    assert agent.renderer.image_token in tokens
    text = " ".join(["what", *tokens, *reversed(tokens), "?"]) + "".join(tokens)
    reply = agent.renderer.encode_reply(text)
    assert agent.renderer.decode(reply) == text
    assert not agent.banned[reply].any()
    assert reply.index(agent.renderer.end_of_turn) == len(reply) - 1
    image = Picture(picture(84, 56))
    chat = (Message("user", (image, text)), Message("assistant", (text,)), Message("user", (text,)))
    ids, harmless = (
        agent.renderer.render(told).ids.tolist()
        for told in (chat, tuple(replace(m, parts=(*m.images, "go")) for m in chat))
    )
    meant, expected = ([i for i in line if i in agent.renderer.vocabulary.reserved] for line in (ids, harmless))
    assert meant == expected
    assert agent.tokenizer.decode(ids) == agent.tokenizer.decode(harmless).replace("go", text)


def test_llava_prompts_and_pictures_are_those_of_its_processor(twin: Load, chats: list[Prompt], picture):
    agent = twin("tiny_llava")
    processor = LlavaNextProcessor(
        agent.image_processor,
        agent.tokenizer,
        patch_size=28,
        vision_feature_select_strategy="default",
        chat_template=agent.tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    sizes = [(84, 84), (168, 168), (100, 75), (75, 100), (300, 40), (17, 200)]
    for pictures in [(Picture(picture(*size, seed=1)),) for size in sizes] + [chat[1].images for chat in chats]:
        images = [one.image for one in pictures]
        chat = (Message("system", ("You play.",)), Message("user", (*pictures, "go")))
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "go"}]
        system = {"role": "system", "content": [{"type": "text", "text": "You play."}]}
        messages: list[Any] = [system, {"role": "user", "content": parts}]
        text: Any = processor.apply_chat_template(messages, tokenize=False)
        kinds: dict[str, Any] = {"return_tensors": "pt"}
        inputs = processor(text=text, images=images or None, **kinds)
        assert agent.renderer.render(chat).ids.tolist() == inputs["input_ids"][0].tolist()
        if images:
            own = agent.family.pixels(images)
            assert torch.equal(own["pixel_values"].flatten(1), inputs["pixel_values"].flatten(1))
            assert torch.equal(own["image_sizes"], inputs["image_sizes"])
            with torch.no_grad():
                features = agent.family.encode(own)
            assert [len(one) for one in features] == [agent.family.image_tokens(image.size) for image in images]


def test_each_picture_is_encoded_as_if_alone(agent: Agent, picture: Callable[..., Image.Image]):
    images = [picture(84, 56, 1), picture(168, 168, 2), picture(56, 100, 3)]
    with torch.no_grad():
        together = agent.family.encode(agent.family.pixels(images))
        alone = [agent.family.encode(agent.family.pixels([image]))[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        close(one, other)


def test_positions_are_those_of_the_model(agent: Agent, name: str, rows: list[Row]):
    tokens = agent.collate(rows)
    if name in ("tiny_llava", "unlisted"):
        lengths = list(map(len, rows))
        assert [tokens.positions[0, i, :n].tolist() for i, n in enumerate(lengths)] == [list(range(n)) for n in lengths]
        return
    images = [one.image for row in rows for one in row.images]
    expected, _ = agent.model.model.get_rope_index(
        tokens.input_ids,
        mm_token_type_ids=(tokens.input_ids == agent.family.image_token_id).int(),
        image_grid_thw=agent.image_processor(images=images, return_tensors="pt")["image_grid_thw"],
        attention_mask=attention_mask(rows),
    )
    where = attention_mask(rows).bool()
    assert torch.equal(tokens.positions[:, where], expected[:, where])


def test_a_row_whose_pictures_dont_match_is_refused_by_name(agent: Agent, rows: list[Row]):
    row = replace(rows[2], ident="game/seed 7/turn 3", images=rows[2].images[:1])
    with pytest.raises(DataError, match=r"game/seed 7/turn 3: \d+ image placeholder tokens for 1 pictures"):
        agent.collate([rows[0], row])


def test_a_chat_is_cut_with_the_pictures_of_what_goes(agent: Agent, chats: list[Prompt], make_row: MakeRow):
    chat = chats[0][:1]
    for _, user in chats:
        chat = (*chat, user, Message("assistant", ("",), token_ids=(30, agent.renderer.end_of_turn)))
    chat = chat[:-1]
    pictures = []
    for dropped in range(5):
        fitted = agent.renderer.fit(chat, len(agent.renderer.render((chat[0], *chat[1 + 2 * dropped :])).ids))
        assert fitted == (chat[0], *chat[1 + 2 * dropped :])
        pictures.append(len(agent.renderer.render(fitted).images))
        agent.collate([make_row(agent, fitted, [30])])  # counts them against their tokens
    assert pictures == [5, 4, 4, 2, 1]


def test_every_parameter_is_of_one_part(agent: Agent, name: str):
    names = [parameter_name for parameter_name, _ in agent.model.named_parameters()]
    parts = {n: agent.family.part_of(n) for n in names}
    assert parts == {n: agent.family.part_of(f"base_model.model.{n}") for n in names}  # peft's names
    vision, projector = {
        "tiny_qwen2_vl": (("model.visual.",), ("model.visual.merger.",)),
        "tiny_qwen3_vl": (("model.visual.",), ("model.visual.merger.", "model.visual.deepstack_merger_list.")),
        "tiny_llava": (("model.vision_tower.",), ("model.multi_modal_projector.", "model.image_newline")),
        "unlisted": (("model.vision_tower.",), ("model.multi_modal_projector.",)),
    }[name]
    for parameter_name, part in parts.items():
        if parameter_name.startswith(projector):
            assert part == "projector"
        else:
            assert part == ("vision" if parameter_name.startswith(vision) else "language")
    assert set(parts.values()) == {"vision", "projector", "language"}
