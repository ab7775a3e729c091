"""What the stages that play have in common: the envs and policies of a configuration, and the held-out panel."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_agents.config import EnvConfig, RunConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.envs import make_env, modules
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import ConfigError, EnvError
from vlm_agents.experts import Advising, with_expert
from vlm_agents.lineage import cloned_in
from vlm_agents.metrics import shortcoming, wilson_interval
from vlm_agents.policies import ExpertPolicy, ModelPolicy, Policy, RandomPolicy, RemotePolicy
from vlm_agents.progress import say, track
from vlm_agents.prompting import Fitted, PromptFormat, make_format
from vlm_agents.remote import ChatClient
from vlm_agents.rollout import collect
from vlm_agents.seeds import Deal, panel_seeds
from vlm_agents.summary import Tags, summarise
from vlm_agents.types import Prompt, Sampling, Trajectory
from vlm_agents.weights import has_model

if TYPE_CHECKING:  # scripted and remote policies need no torch
    from vlm_agents.models import Agent

SHARES = ("eval/success", "eval/positive_return")  # of episodes; told with their 95 % intervals
EVAL_SEED = 0  # of the randomness of a panel's policies: like its seeds, the same for every run


def open_envs(cfg: EnvConfig, num_envs: int, advice: Advising) -> EnvPool:
    """A pool of the configured env; `advice` says which of its observations hold the expert's."""
    advise = partial(with_expert, cfg=cfg)
    make, preload = partial(make_env, cfg), modules(cfg)
    return EnvPool(make, num_envs, cfg.workers, cfg.timeout_s, advise=advise, advice=advice, preload=preload)


def scripted_policy(name: str, prompt_format: PromptFormat) -> Policy:
    return ExpertPolicy(prompt_format) if name == "expert" else RandomPolicy(prompt_format)


def format_of(cfg: RunConfig, agent: "Agent | None" = None) -> PromptFormat:
    """The prompt format; what an agent is asked is cut to `prompt.max_prompt_tokens`, and to its model's positions.

    ConfigError where the prompts and replies that the settings allow could be longer than those.
    """
    prompt_format, budget, reply = make_format(cfg.prompt), cfg.prompt.max_prompt_tokens, cfg.prompt.max_reply_tokens
    if agent is None:
        return prompt_format
    check_length(agent, "prompt.max_prompt_tokens", budget, reply)
    return Fitted(prompt_format, partial(agent.renderer.fit, max_tokens=budget, reply_tokens=reply))


def check_first_prompt(cfg: RunConfig, agent: "Agent") -> None:
    """ConfigError where the settings leave no room for what is asked first in a held-out seed."""
    agent.renderer.fit(first_prompts(cfg, 1)[0], cfg.prompt.max_prompt_tokens, cfg.prompt.max_reply_tokens)


def check_length(agent: "Agent", setting: str, prompt_tokens: int | None, reply_tokens: int) -> None:
    """`refuse_too_long` for a model that is loaded: its config.json need not say how many positions it has."""
    refuse_too_long(agent.renderer.context, setting, prompt_tokens, reply_tokens)


def refuse_too_long(context: int, setting: str, prompt_tokens: int | None, reply_tokens: int) -> None:
    """ConfigError where a prompt as long as this `setting`, where it is set, and its reply are more than `context`, for
    which a model has positions."""
    asked = (prompt_tokens or 1) + reply_tokens
    if asked > context:
        settings = {setting: prompt_tokens, "prompt.max_reply_tokens": reply_tokens}
        given = " and ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        raise ConfigError(
            f"{given}: that is {asked} tokens, and the model has positions for {context}. Lower what is larger than it "
            "need be, or take a model with more positions"
        )


def model_policy(cfg: RunConfig, agent: "Agent", greedy: bool = False) -> Policy:
    from vlm_agents.models import Sampler

    return ModelPolicy(Sampler(agent), Sampling(cfg.prompt.max_reply_tokens, greedy=greedy))


def remote_policy(cfg: RunConfig, client: ChatClient, samples: int) -> Policy:
    """Samples at the temperature of `model`, as the model itself would; `samples` are drawn until one is legal."""
    return RemotePolicy(
        client, make_format(cfg.prompt), Sampling(cfg.prompt.max_reply_tokens), cfg.model.temperature, samples
    )


def tell_unread(folder: Path, client: ChatClient, policy: bool, rater: bool) -> int:
    """Say how much of what a server was asked for the episodes in `folder` came to nothing, as `policy` or as `rater`.

    Returns how many steps have no rating.
    """
    turns = played = illegal = unrated = 0
    for trajectory in read_episodes(folder, pictures=False):
        for turn in trajectory.turns:
            turns += 1
            played += turn.reply.source != "random"
            illegal += turn.parsed.action is None
            unrated += turn.rating is None
    missing = [f"{illegal} of {played} replies hold no legal action"] if policy and illegal else []
    missing += [f"{unrated} of {turns} steps have no rating"] if rater and unrated else []
    if missing:
        say(f"{' and '.join(missing)}: {client.why_unread()}")
    return unrated


def tell_shortcoming(cfg: RunConfig, metrics: Mapping[str, float]) -> None:
    """Say, by its held-out panel, that what played is no agent yet, and what may help; nothing where it is one."""
    if lack := shortcoming(metrics):
        remedies = [*demonstrations(cfg), *success_remedy(cfg, metrics.get("eval/success", 1.0))]
        say(f"no agent yet: {lack}. What helps: {'; '.join(remedies)}")


def success_remedy(cfg: RunConfig, success: float) -> list[str]:
    """What the env's settings may have to do with it, where `success`, of episodes, is 0; else nothing."""
    return [cfg.env.success_remedy] if cfg.env.success_remedy and not success else []


def demonstrations(cfg: RunConfig) -> list[str]:
    """What a policy needs to start from, by where its weights come from."""
    if not has_model(cfg):
        return ["another model on the server", "another prompt="]
    if run := cloned_in(cfg):
        return [
            f"more demonstrations (stage=collect stage.episodes=) and more steps (stage.epochs=) than "
            f"{os.path.relpath(run)} had",
            "a look at report.html: where failures first left the expert's way",
        ]
    return ["train with stage=sft first, and give its run as stage.init", "another prompt="]


def first_prompts(cfg: RunConfig, episodes: int) -> list[Prompt]:
    """What a policy is asked first in each of the first `episodes` held-out seeds."""
    with open_envs(cfg.env, episodes, "never") as envs:
        answers = envs.reset(dict(enumerate(panel_seeds(envs.name, episodes))))
        prompt_format, prompts = make_format(cfg.prompt), []
        for answer in answers.values():
            if isinstance(answer, EnvError):
                raise answer
            prompts.append(prompt_format.prompt(envs.instructions, (), answer))
    return prompts


def play_panel(
    cfg: RunConfig,
    envs: EnvPool,
    policy: Policy,
    episodes: int,
    variant: str = "",
    agent: "Agent | None" = None,
    on_episode: Callable[[Trajectory], object] = lambda _: None,
) -> dict[str, float]:
    """Play the first `episodes` held-out seeds. Metrics are `eval/<name><variant>`, SHARES with their intervals,
    and success by tag.

    `agent` is whose policy it is, if anybody's. `on_episode` sees each episode, in the order of seeds; nobody else
    keeps it.
    """
    deals = [Deal(seed) for seed in panel_seeds(envs.name, episodes)]
    playing = collect(
        envs, policy, format_of(cfg, agent), deals, invalid_penalty=cfg.env.invalid_penalty, run_seed=EVAL_SEED
    )

    tags = Tags()

    def shown() -> Iterator[Trajectory]:
        for trajectory in track(playing, f"eval {policy.name}:", episodes, "episodes"):
            on_episode(trajectory)
            tags.count(trajectory)
            yield trajectory

    metrics = summarise(shown(), "eval") | tags.figures()
    played = episodes - round(metrics["eval/env_errors"])
    for share in SHARES:
        low, high = wilson_interval(round(metrics[share] * played), played)
        metrics |= {f"{share}_low": low, f"{share}_high": high}
    return {f"{name}{variant}": value for name, value in metrics.items()}


def play_model(
    cfg: RunConfig,
    envs: EnvPool,
    agent: "Agent",
    episodes: int,
    on_episode: Callable[[Trajectory], object] = lambda _: None,
    on_greedy: Callable[[Trajectory], object] = lambda _: None,
) -> dict[str, float]:
    """The panel twice: sampled at the policy's own temperature, which `on_episode` sees, and greedy."""
    greedy = model_policy(cfg, agent, greedy=True)
    sampled = play_panel(cfg, envs, model_policy(cfg, agent), episodes, "", agent, on_episode)
    return sampled | play_panel(cfg, envs, greedy, episodes, "_greedy", agent, on_greedy)


def play_baselines(
    cfg: RunConfig, envs: EnvPool, episodes: int, on_episode: Callable[[Trajectory], object] = lambda _: None
) -> dict[str, float]:
    """The panel by chance and, where there is one, by the expert: what a model's figures are held against."""
    metrics: dict[str, float] = {}
    for name in ["random", *(["expert"] if envs.has_expert else [])]:
        policy = scripted_policy(name, make_format(cfg.prompt))
        metrics |= play_panel(cfg, envs, policy, episodes, f"_{name}", on_episode=on_episode)
    return metrics
