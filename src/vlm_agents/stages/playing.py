"""What the stages that play have in common: the envs and policies of a configuration, and the held-out panel."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_agents.config import EnvConfig, RefereeConfig, RunConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.envs import make_env, modules
from vlm_agents.errors import ConfigError, EnvError
from vlm_agents.experts import Advising, with_expert
from vlm_agents.learn.shaping import penalised
from vlm_agents.metrics import wilson_interval
from vlm_agents.policies import ExpertPolicy, ModelPolicy, Policy, RandomPolicy, RemotePolicy, Sampler
from vlm_agents.progress import track
from vlm_agents.prompting import Fitted, PromptFormat, make_format
from vlm_agents.referee import Referee
from vlm_agents.remote import ChatClient
from vlm_agents.rollout import collect
from vlm_agents.seeds import Deal, panel_seeds
from vlm_agents.summary import Tags, summarise, unknown
from vlm_agents.types import Prompt, Sampling, Trajectory
from vlm_agents.world import ALONE, World

if TYPE_CHECKING:  # scripted and remote policies need no torch
    from vlm_agents.tensors import Renderer

SHARES = ("eval/success", "eval/positive_return")  # of episodes; told with their 95 % intervals
EVAL_SEED = 0  # of the randomness of a panel's policies: like its seeds, the same for every run


class RefereedPool(EnvPool):
    """A pool, and who judges what is answered in its envs; both are closed together."""

    def __init__(self, referee: Referee, *args: Any, **kwargs: Any) -> None:
        self.referee = referee
        super().__init__(*args, **kwargs)

    def __exit__(self, raised: type[BaseException] | None, *rest: object) -> None:
        self.referee.close()
        super().__exit__(raised, *rest)


def open_envs(
    cfg: EnvConfig, num_envs: int, advice: Advising, world: World = ALONE, referee: Referee | None = None
) -> RefereedPool:
    """A pool of the configured env, of a rank's share of `num_envs`; `advice` says which of its observations hold the
    expert's. Without a `referee` there is one that knows rules alone."""
    referee = referee or Referee(RefereeConfig(), Path())
    advise = partial(with_expert, cfg=cfg)
    make, preload, slots = partial(make_env, cfg), modules(cfg), -(-num_envs // world.ranks)
    return RefereedPool(referee, make, slots, cfg.workers, cfg.timeout_s, advise=advise, advice=advice, preload=preload)


def load_sampler(cfg: RunConfig, init: str | None) -> Sampler:
    """That of the run's model with the weights at `init`."""
    from vlm_agents.models import HFSampler, load_agent  # brings torch along: seconds that the other policies save

    return HFSampler(load_agent(cfg.model, cfg.hardware, init))


def make_policy(
    cfg: RunConfig, name: str, sampler: Sampler | None = None, client: ChatClient | None = None, samples: int = 1
) -> Policy:
    """Who plays, by the names of `stage.policy` and `model_greedy`.

    A server samples at the temperature of `model`, as the model itself would, up to `samples` times until a reply is
    legal. What is to play as the model does has one try.
    """
    prompt_format = make_format(cfg.prompt)
    sampling = Sampling(cfg.prompt.max_reply_tokens, prompt_format.stop, name == "model_greedy", continued(cfg))
    if name == "remote":
        assert client is not None
        return RemotePolicy(client, prompt_format, sampling, cfg.model.temperature, samples)
    if name in ("expert", "random"):
        return (ExpertPolicy if name == "expert" else RandomPolicy)(prompt_format)
    assert sampler is not None
    return ModelPolicy(sampler, fitted(cfg, prompt_format, sampler.renderer), sampling)


def continued(cfg: RunConfig) -> bool:
    """Does each prompt of an episode, until one has to be cut, begin with the one before and its reply?"""
    return cfg.prompt.history == "full" and not cfg.env.one_turn


def fitted(cfg: RunConfig, prompt_format: PromptFormat, renderer: "Renderer") -> PromptFormat:
    """The format with its prompts cut to `prompt.max_prompt_tokens`, and to the positions of the renderer's model.

    ConfigError where the prompts and replies that the settings allow could be longer than those.
    """
    budget, reply = cfg.prompt.max_prompt_tokens, cfg.prompt.max_reply_tokens
    refuse_too_long(renderer.context, "prompt.max_prompt_tokens", budget, reply)
    return Fitted(prompt_format, partial(renderer.fit, max_tokens=budget, reply_tokens=reply))


def check_first_prompt(cfg: RunConfig, envs: EnvPool, sampler: Sampler) -> None:
    """ConfigError where the settings leave no room for what is asked first in a held-out seed."""
    (prompt,) = first_prompts(cfg, envs, 1)
    sampler.renderer.fit(prompt, cfg.prompt.max_prompt_tokens, cfg.prompt.max_reply_tokens)


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


def first_prompts(cfg: RunConfig, envs: EnvPool, episodes: int) -> list[Prompt]:
    """What a policy is asked first in each of the first `episodes` held-out seeds, one an env."""
    answers = envs.reset(dict(enumerate(panel_seeds(envs.name, episodes))), "never")
    prompt_format, prompts = make_format(cfg.prompt), []
    for answer in answers.values():
        if isinstance(answer, EnvError):
            raise answer
        prompts.append(prompt_format.prompt(envs.instructions, (), answer))
    return prompts


def play(
    cfg: RunConfig,
    envs: RefereedPool,
    policy: Policy,
    deals: Sequence[Deal],
    run_seed: int,
    advice: Advising | None = None,
    world: World = ALONE,
) -> Iterator[Trajectory]:
    """`rollout.collect`, judged, under the configured penalty for a reply without a legal action.

    Each rank plays and judges some of the starts, all members of a group, and then has the episodes of all ranks.
    """
    own = set(world.share(list(dict.fromkeys(deal.seed for deal in deals))))
    mine = [deal for deal in deals if deal.seed in own]
    played = judged(cfg, envs, collect(envs, policy, mine, run_seed=run_seed, advice=advice))
    if world.ranks == 1:
        yield from played
        return
    found = {Deal(one.seed, one.member): one for its in world.gather(list(played)) for one in its}
    yield from (found[deal] for deal in deals)


def judged(cfg: RunConfig, envs: RefereedPool, episodes: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """The episodes under the referee's rulings and the configured penalty for a reply without a legal action."""
    return penalised(envs.referee.judged(episodes), cfg.env.invalid_penalty)


def play_panel(
    cfg: RunConfig,
    envs: RefereedPool,
    policy: Policy,
    episodes: int,
    variant: str = "",
    on_episode: Callable[[Trajectory], object] = lambda _: None,
    world: World = ALONE,
) -> dict[str, float]:
    """Play the first `episodes` held-out seeds. Metrics are `eval/<name><variant>`, SHARES with their intervals,
    and success by tag.

    `on_episode` sees each episode, in the order of seeds; nobody else keeps it.
    """
    deals = [Deal(seed) for seed in panel_seeds(envs.name, episodes)]
    playing = play(cfg, envs, policy, deals, EVAL_SEED, world=world)
    tags = Tags()

    def shown() -> Iterator[Trajectory]:
        for trajectory in track(playing, f"eval {policy.name}:", episodes, "episodes"):
            on_episode(trajectory)
            tags.count(trajectory)
            yield trajectory

    metrics = summarise(shown(), "eval") | tags.figures()
    played = episodes - unknown(metrics, "eval")
    for share in SHARES:
        metrics |= with_bounds(share, metrics[share], played)
    return {f"{name}{variant}": value for name, value in metrics.items()}


def with_bounds(name: str, share: float, episodes: int, variant: str = "") -> dict[str, float]:
    """A share of so many episodes, with the ends of its 95 % interval."""
    low, high = wilson_interval(round(share * episodes), episodes)
    return {f"{name}{variant}": share, f"{name}_low{variant}": low, f"{name}_high{variant}": high}


def play_model(
    cfg: RunConfig,
    envs: RefereedPool,
    sampler: Sampler,
    episodes: int,
    on_episode: Callable[[Trajectory], object] = lambda _: None,
    on_greedy: Callable[[Trajectory], object] = lambda _: None,
    world: World = ALONE,
) -> dict[str, float]:
    """The panel twice: sampled at the policy's own temperature, which `on_episode` sees, and greedy."""
    sampler.sync()
    sampled, greedy = (make_policy(cfg, name, sampler) for name in ("model", "model_greedy"))
    metrics = play_panel(cfg, envs, sampled, episodes, "", on_episode, world)
    return metrics | play_panel(cfg, envs, greedy, episodes, "_greedy", on_greedy, world)


def play_baselines(
    cfg: RunConfig,
    envs: RefereedPool,
    episodes: int,
    on_episode: Callable[[Trajectory], object] = lambda _: None,
    world: World = ALONE,
) -> dict[str, float]:
    """The panel by chance and by the expert, where there are such: what a model's figures are held against."""
    metrics: dict[str, float] = {}
    players = {"random": not cfg.env.free_text, "expert": envs.has_expert}
    for name in (name for name, there in players.items() if there):
        metrics |= play_panel(cfg, envs, make_policy(cfg, name), episodes, f"_{name}", on_episode, world)
    return metrics
