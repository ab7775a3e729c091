"""Proof that a model without a family of its own is what `unlisted.Unlisted` takes it for: two prompts, compared.

A picture and a few words go our way and transformers' own. Nothing here concerns the families that are listed: those
are held to transformers by tests.
"""

import numpy as np
import torch
from PIL import Image

from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.families.unlisted import Unlisted
from vlm_agents.pictures import Picture
from vlm_agents.progress import say
from vlm_agents.tensors import Row
from vlm_agents.types import Message

SIZES = (96, 32), (1600, 1200)  # wide pictures, or large ones, are what some processors cut into tiles
TEXT = "What do you see?"


@torch.no_grad()
def verify(agent: Agent) -> None:
    """ModelError where prompt ids or logits of an unlisted model differ from those of transformers.

    Its folder's processor is asked where there is one. Logits may differ by rounding: by the root of the dtype's
    epsilon, relative to their norm (3e-4 in float32, 0.09 in bfloat16). Nothing to do on the meta device.
    """
    family = agent.family
    if not isinstance(family, Unlisted) or agent.device.type == "meta":
        return
    if family.processor is None and agent.model.name_or_path:  # else it was drawn from dimensions alone
        place = agent.model.name_or_path
        say(f"{place} has no processor_config.json: our prompts can't be compared with those of its processor")
    for width, height in SIZES:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        compare(agent, family, Picture(Image.fromarray(noise)))
    agent.images.clear()


def compare(agent: Agent, family: Unlisted, picture: Picture) -> None:
    """One prompt with this picture."""
    with family.following("its chat template can't be rendered piece by piece"):
        ids = agent.renderer.render((Message("user", (picture, TEXT)),)).ids
    with family.following("its processor can't take one picture and a text"):
        inputs = processed(agent, family, picture.image, ids)
    if (theirs := inputs["input_ids"][0].tolist()) != ids.tolist():
        place = next((i for i, pair in enumerate(zip(ids, theirs, strict=False)) if pair[0] != pair[1]), len(ids))
        raise family.unlike(
            f"its processor (is its processor_config.json whole?) makes {len(theirs)} tokens of a prompt where we make "
            f"{len(ids)}, and others from number {place} on"
        )
    dtype = family.embed_tokens.weight.dtype
    with family.following("a forward pass fails"):
        given = {
            key: value.to(agent.device, dtype if value.is_floating_point() else None) for key, value in inputs.items()
        }
        expected = agent.model(**given).logits[0].float()
        row = Row("probe", ids, (picture,), ())
        found = agent.logits(agent.hidden(agent.collate([row]))[0])
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= torch.finfo(dtype).eps ** 0.5:
        raise family.unlike(
            f"its own forward pass gives other logits than ours on the same prompt, by {difference:.2g} of their norm: "
            "attention, positions, features or logits are made in a way of its own"
        )


def processed(agent: Agent, family: Unlisted, image: Image.Image, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """What the model's processor makes of the prompt; without one, our ids and all that the image processor makes."""
    if family.processor is None:
        return {"input_ids": torch.from_numpy(ids)[None], **family.image_processor(images=[image], return_tensors="pt")}
    content = [{"type": "image", "image": image}, {"type": "text", "text": TEXT}]
    return family.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=family.processor.chat_template or agent.tokenizer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
