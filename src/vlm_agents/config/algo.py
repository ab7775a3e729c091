"""How a policy learns from reward: the parts that an algorithm is made of, by their names.

conf/algo/ names the combinations that the field knows. A setting that only some parts read is refused, where it was
changed, beside the others.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from omegaconf import MISSING

from vlm_agents.config.fields import Part, check_kwargs, one_of, setting
from vlm_agents.errors import ConfigError

if TYPE_CHECKING:
    from vlm_agents.config.run import RunConfig

CreditName = Literal["gae", "token_gae", "bilevel_gae", "returns", "rloo", "group", "gigpo"]
FilterName = Literal["outcome", "reward", "broken", "overlong", "variance", "rank"]
VALUED = ("gae", "token_gae", "bilevel_gae")  # credit that asks a critic
RELATIVE = ("rloo", "group", "gigpo")  # credit that compares the members of a group
BY_GROUP = ("outcome", "reward", "variance", "rank")  # filters that compare them
WITH_CRITIC, WITH_RATIO = ("credit", VALUED), ("surrogate", ("clip", "cispo"))


@dataclass
class NoveltyConfig(Part, place="algo.novelty"):
    """The novelty bonus: a second adapter predicts an episode's actions from its first picture."""

    coef: float = setting(0.0, "reward for a nat of surprise; 0: no predictor; needs model.lora", low=0)
    lr: float = setting(1e-3, "learning rate of the predictor", low=0, only=("coef", ()))

    def check(self, run: "RunConfig") -> None:
        if self.coef > 0 and run.model.lora is None:
            raise ConfigError(
                "algo.novelty.coef > 0 makes a second adapter, and the model has no first: add model/lora=adapter"
            )
        if self.coef > 0 and run.hardware.zero:
            raise ConfigError(
                "algo.novelty.coef > 0 trains a second adapter, which hardware.zero can't: set hardware=ddp"
            )


@dataclass
class AlgoConfig(Part, place="algo"):
    name: str = setting(MISSING, "chosen by algo=")
    factory: str | None = setting(
        None, "package.module:attribute that is called with the algorithm made of these settings and gives another"
    )
    kwargs: Any = setting(None, "what that is given besides, by name", wanted="settings or null")

    # ---- episodes ----
    group_size: int = setting(1, "plays of each start: a group; stage.episodes counts plays", low=1)
    filters: list[str] = setting(
        list,
        "what isn't learned from, one after another: outcome, reward: groups whose members all came to the same, by "
        "the env's reward or by the one that is trained on; broken: episodes that ended invalid or too long; overlong: "
        "those with a reply cut off; variance: groups but those that make up algo.top_p of all variance of returns; "
        "rank: puts the groups of largest spread first",
    )
    top_p: float = setting(
        0.9, "share of the variance of returns that is kept", low=0.01, high=1, only=("filters", ("variance",))
    )
    oversample: float = setting(1.0, "episodes played an iteration, over stage.episodes, which are kept", low=1)
    waves: int = setting(1, "most times that an iteration plays until stage.episodes are kept", low=1)
    credit_over: str = setting(
        "kept",
        "the episodes that advantages are made over: those kept by the filters, or all played",
        choices=Literal["kept", "played"],
        only=("filters", get_args(FilterName)),
    )

    # ---- rewards ----
    novelty: NoveltyConfig = setting(NoveltyConfig, "reward for actions that a second adapter doesn't predict")
    count_coef: float = setting(0.0, "reward for reaching a state, over the root of how often it was reached", low=0)
    progress_coef: float = setting(
        0.0, "reward for the whole way to success by the expert's count of steps, paid step by step", low=0
    )
    tool_coef: float = setting(
        0.0, "reward for each turn that used a tool, where the episode succeeds; PyVision-RL has 0.1", low=0
    )
    tool_once_coef: float = setting(
        0.0, "reward, once, for a picture from a tool, where the episode succeeds; DeepEyes has 1.2", low=0
    )
    format_coef: float = setting(
        0.0, "penalty of an episode with a reply that couldn't be read; DeepEyes has 0.2", low=0
    )
    overlong_coef: float = setting(0.0, "penalty of a reply as long as prompt.max_reply_tokens", low=0)
    overlong_share: float = setting(
        0.25,
        "last share of prompt.max_reply_tokens over which that penalty rises from 0",
        low=0.01,
        high=1,
        only=("overlong_coef", ()),
    )
    kl_reward_coef: float = setting(
        0.0, "penalty for a nat of log-ratio to the policy that training started from; needs model.lora", low=0
    )

    # ---- credit ----
    credit: str = setting("gae", "what a turn or a token is worth", choices=CreditName)
    gamma: float = setting(0.98, "discount of the reward a turn", low=0, high=1)
    gae_lambda: float = setting(
        0.95,
        "lambda of generalized advantage estimation over turns; 1: no bootstrapping from the critic",
        low=0,
        high=1,
        only=("credit", ("gae", "bilevel_gae")),
    )
    token_gamma: float = setting(1.0, "discount a token", low=0, high=1, only=("credit", ("token_gae", "bilevel_gae")))
    token_lambda: float = setting(
        1.0, "lambda over tokens", low=0, high=1, only=("credit", ("token_gae", "bilevel_gae"))
    )
    group_std: bool = setting(
        False, "divide by the standard deviation within the group", only=("credit", ("group", "gigpo"))
    )
    step_coef: float = setting(
        1.0, "weight of what a step earned beside others from the same state", low=0, only=("credit", ("gigpo",))
    )
    utility_share: float = setting(
        0.0,
        "first share of training in which advantages are mixed with returns weighted by how useful the expert finds "
        "each turn, less and less",
        low=0,
        high=1,
    )
    normalise: bool = setting(True, "advantages of mean 0 and standard deviation 1 over an iteration")

    # ---- objective ----
    surrogate: str = setting(
        "clip",
        "what raises the probability of good replies: clip, PPO's ratio; reinforce, the log-prob; cispo, the log-prob "
        "weighted by a clipped ratio; awr, the log-prob weighted by the exponential of the advantage",
        choices=Literal["clip", "reinforce", "cispo", "awr"],
    )
    ratio: str = setting(
        "turn",
        "what has one probability: a token, a turn, or a row, all turns whose chats extend each other",
        choices=Literal["token", "turn", "row"],
    )
    pool: str = setting(
        "sum",
        "a turn's or row's log-prob: of its tokens the sum, or the mean",
        choices=Literal["sum", "mean"],
        only=("ratio", ("turn", "row")),
    )
    clip: float = setting(
        0.2,
        "PPO's clip range: probability ratios count up to 1 + clip, and down to 1 - clip",
        positive=True,
        infinite=True,
        only=WITH_RATIO,
    )
    clip_high: float | None = setting(
        None, "another range upwards; null: clip", positive=True, infinite=True, only=WITH_RATIO
    )
    dual_clip: float | None = setting(
        None,
        "ratios of bad replies count up to this at most; null: without bound",
        low=1.01,
        only=("surrogate", ("clip",)),
    )
    awr_beta: float = setting(1.0, "temperature of the advantage", positive=True, only=("surrogate", ("awr",)))
    awr_cap: float = setting(10.0, "largest weight", positive=True, only=("surrogate", ("awr",)))
    thought_coef: float = setting(0.2, "weight of a thought token's log-prob beside an action token's 1", low=0)
    average: str = setting(
        "turns",
        "what the loss is the mean of; budget: the sum over all tokens that rows could have had",
        choices=Literal["turns", "tokens", "rows", "budget"],
    )
    correction: str = setting(
        "none",
        "where the trainer's log-probs aren't the sampler's, weights by their ratio: truncate, at most "
        "correction_bound; mask, 0 outside 1/correction_bound to correction_bound",
        choices=Literal["none", "truncate", "mask"],
    )
    correction_bound: float = setting(
        2.0, "largest weight of a correction", low=1, only=("correction", ("truncate", "mask"))
    )
    max_mismatch_kl: float | None = setting(
        1.0, "the run stops where ppo/mismatch_kl, nats a turn, passes this; null: never", low=0
    )
    entropy_coef: float = setting(0.0, "weight of the token entropy, as a bonus", low=0)
    turn_entropy: float = setting(
        0.1,
        "nats a token that a learned temperature is drawn towards; needs model.temperature_head",
        only=("turn_entropy_coef", ()),
    )
    turn_entropy_coef: float = setting(
        0.0, "how strongly a learned temperature is drawn towards turn_entropy; needs model.temperature_head", low=0
    )
    kl_coef: float = setting(0.0, "penalty towards the policy that training started from; needs model.lora", low=0)
    kl: str = setting(
        "k3",
        "estimator of that KL (k1 is what kl_reward_coef takes off)",
        choices=Literal["k2", "k3"],
        only=("kl_coef", ()),
    )

    # ---- critic ----
    value_coef: float = setting(0.5, "weight of the critic's loss", positive=True, only=WITH_CRITIC)
    value_warmup: int = setting(1, "first iterations, in which the critic's head alone learns", low=0, only=WITH_CRITIC)
    value_epochs: int = setting(
        10,
        "passes of the critic's head alone, over the states that it read in the first of epochs",
        low=0,
        only=WITH_CRITIC,
    )
    value_lr: float = setting(1e-3, "learning rate of the heads: the critic's, and that of a temperature", low=0)

    # ---- steps ----
    epochs: int = setting(1, "passes over the turns of an iteration", low=1)
    minibatch_turns: int = setting(128, "turns an optimizer step", low=1)
    target_kl: float | None = setting(
        None, "an iteration's remaining updates are skipped once approx_kl passes this; null: none are", low=0
    )
    lr: float = setting(1e-4, "learning rate of the policy", low=0)
    warmup_updates: int = setting(0, "iterations in which the learning rate rises to lr", low=0)
    min_lr_ratio: float = setting(0.1, "the cosine schedule ends at this share of the learning rate", low=0, high=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay", low=0)
    max_grad_norm: float = setting(1.0, "longer gradients are scaled down to this norm", positive=True, infinite=True)

    @property
    def valued(self) -> bool:
        """Does it ask a critic?"""
        return self.credit in VALUED

    @property
    def advised(self) -> list[str]:
        """The settings by which it asks the expert."""
        return [name for name in ("progress_coef", "utility_share") if getattr(self, name) > 0]

    def played(self, episodes: int) -> int:
        """Episodes that one wave plays where `episodes` are to be kept: whole groups, upwards."""
        return math.ceil(round(episodes * self.oversample / self.group_size, 6)) * self.group_size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kwargs("algo.kwargs", self.kwargs)
        if self.kwargs and self.factory is None:
            raise ConfigError(
                "algo.kwargs are what algo.factory is given, and there is none: give one, or leave out kwargs"
            )
        for name in self.filters:
            one_of("algo.filters", name, FilterName)
        if self.valued and self.value_warmup and not self.value_epochs:
            raise ConfigError(
                f"algo.value_warmup={self.value_warmup} has the critic learn in algo.value_epochs, and there are none: "
                "set algo.value_warmup=0 too, or algo.value_epochs=10"
            )
        compared = [f"algo.credit={self.credit}"] if self.credit in RELATIVE else []
        compared += [f"algo.filters=[{name}]" for name in self.filters if name in BY_GROUP]
        if compared and self.group_size == 1:
            raise ConfigError(
                f"{compared[0]} compares the plays of one start, and algo.group_size=1 plays each start once: set "
                "algo.group_size=8, or another algo="
            )
        if self.surrogate == "reinforce" and self.epochs > 1:
            raise ConfigError(
                f"algo.epochs={self.epochs}: algo.surrogate=reinforce has no ratio by which a second pass would know "
                "that the policy has moved: set algo.epochs=1, or algo.surrogate=clip"
            )
        if self.progress_coef > 0 and (self.credit == "gigpo" or (self.credit == "token_gae" and self.token_gamma < 1)):
            raise ConfigError(
                "algo.progress_coef > 0 keeps the best policy what it was under one discount of a turn alone, and "
                f"algo.credit={self.credit} has another beside algo.gamma: set algo.progress_coef=0"
            )
        if not (self.filters or self.factory) and (self.oversample > 1 or self.waves > 1):
            raise ConfigError(
                f"algo.oversample={self.oversample:g}, algo.waves={self.waves} play more for algo.filters to choose "
                "from, and there are none: set algo.filters=[reward], or algo.oversample=1 algo.waves=1"
            )

    def check(self, run: "RunConfig") -> None:
        if self.turn_entropy_coef > 0 and run.model.temperature_head is None:
            raise ConfigError(
                "algo.turn_entropy_coef > 0 trains a learned temperature, and there is none: "
                "add model/temperature_head=learned, or set algo.turn_entropy_coef=0"
            )
        for name in ("kl_coef", "kl_reward_coef"):
            if getattr(self, name) > 0 and run.model.lora is None:
                raise ConfigError(
                    f"algo.{name} > 0 needs a reference policy, which is the model with its adapter off: "
                    f"add model/lora=adapter, or set algo.{name}=0"
                )
        for name in ("tool_coef", "tool_once_coef"):
            if getattr(self, name) > 0 and not (run.env.counts_tools or run.env.foreign):
                raise ConfigError(
                    f"algo.{name} > 0 pays for tools, and env={run.env.family} has none: set algo.{name}=0"
                )
        if self.ratio == "row" and not run.env.one_turn and run.prompt.history != "full":
            raise ConfigError(
                f"algo.ratio=row is the ratio of a whole episode, and with prompt.history={run.prompt.history} an "
                "episode's turns don't share a row: set prompt.history=full, or algo.ratio=turn for one ratio a reply"
            )
        if self.advised and not (run.env.expert or run.env.advises):
            name = self.advised[0]
            raise ConfigError(
                f"algo.{name} > 0 asks the expert, and env={run.env.family} has none: give env.expert=, or set "
                f"algo.{name}=0"
            )
