"""An algorithm: a choice of parts, made once from its settings. The learner runs it, and knows none of them by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, get_args

from vlm_agents import imports
from vlm_agents.config import AlgoConfig
from vlm_agents.errors import ConfigError
from vlm_agents.learn import averages, credit, groups, losses
from vlm_agents.learn.averages import Average
from vlm_agents.learn.credit import Rule
from vlm_agents.learn.groups import Filter
from vlm_agents.learn.losses import Loss

RULES: Mapping[str, Callable[[AlgoConfig], Rule]] = {
    "gae": lambda algo: credit.Gae(algo.gamma, algo.gae_lambda),
    "token_gae": lambda algo: credit.TokenGae(algo.gamma, algo.token_gamma, algo.token_lambda),
    "bilevel_gae": lambda algo: credit.BilevelGae(algo.gamma, algo.gae_lambda, algo.token_gamma, algo.token_lambda),
    "returns": lambda algo: credit.Returns(algo.gamma),
    "rloo": lambda algo: credit.OfGroup(algo.gamma, credit.leave_one_out),
    "group": lambda algo: credit.OfGroup(algo.gamma, partial(credit.relative, std=algo.group_std)),
    "gigpo": lambda algo: credit.AnchorState(algo.gamma, algo.group_std, algo.step_coef),
}
# While a critic learns alone it learns what really came: its own guesses, of which it knows nothing yet, would be mixed
# in by a lambda below 1.
WARMING: Mapping[str, Callable[[AlgoConfig], Rule]] = {
    "gae": lambda algo: credit.Gae(algo.gamma, 1.0),
    "token_gae": lambda algo: credit.TokenGae(algo.gamma, algo.token_gamma, 1.0),
    "bilevel_gae": lambda algo: credit.BilevelGae(algo.gamma, 1.0, algo.token_gamma, 1.0),
}
FILTERS: Mapping[str, Callable[[AlgoConfig], Filter]] = {
    "outcome": lambda algo: groups.differing_outcomes,
    "reward": lambda algo: groups.differing_rewards,
    "broken": lambda algo: groups.unbroken,
    "overlong": lambda algo: groups.not_overlong,
    "variance": lambda algo: groups.largest_variance(algo.top_p),
    "rank": lambda algo: groups.by_spread,
}


@dataclass(frozen=True)
class Algorithm:
    """What an iteration does with its episodes.

    `warming`: the rule in the iterations in which the critic learns alone; without it, as `credit`. `terms`: each
    coefficient and what it weighs, but for the critic's own, which stands behind the first.
    """

    filters: tuple[Filter, ...]
    credit: Rule
    warming: Rule | None
    normalise: bool
    terms: tuple[tuple[float, Loss], ...]
    average: Average


def make_algorithm(algo: AlgoConfig, reply_tokens: int, tempered: bool) -> Algorithm:
    """The algorithm of these settings. `reply_tokens`: the most of a reply; `tempered`: is a temperature learned?

    ConfigError where `algo.factory` doesn't give one.
    """
    rule = RULES[algo.credit](algo)
    made = Algorithm(
        filters=tuple(FILTERS[name](algo) for name in algo.filters),
        credit=credit.WithUtility(rule, algo.gamma, algo.utility_share) if algo.utility_share else rule,
        warming=WARMING[algo.credit](algo) if algo.valued else None,
        normalise=algo.normalise,
        terms=tuple(_terms(algo, tempered)),
        average={
            "turns": averages.over_turns,
            "tokens": averages.over_tokens,
            "rows": averages.over_rows,
            "budget": averages.over_budget(reply_tokens),
        }[algo.average],
    )
    if algo.factory is None:
        return made
    other = imports.made("algo.factory", algo.factory, made, algo, **(algo.kwargs or {}))
    if wrong := _lack(other):
        raise ConfigError(f"algo.factory={algo.factory} gives {wrong}: see docs/extending.md, An algorithm")
    return other


def _lack(made: object) -> str:
    """What is wrong with an algorithm of somebody's own, in words; empty where nothing is seen to be."""
    if not isinstance(made, Algorithm):
        return f"{imports.named_type(made)} and no Algorithm: change the one it is called with by dataclasses.replace"
    for name, rule in (("credit", made.credit), ("warming", made.warming or made.credit)):
        reads = getattr(rule, "reads", None)
        if not callable(rule) or reads not in get_args(credit.Reads):
            words = ", ".join(get_args(credit.Reads))
            return f"a {name} that can't be called, or whose `reads` is {reads!r} and none of {words}"
    pairs = [term for term in made.terms if isinstance(term, tuple) and len(term) == 2 and callable(term[1])]
    return "" if pairs and len(pairs) == len(made.terms) else "`terms` that aren't pairs of a coefficient and a loss"


def _terms(algo: AlgoConfig, tempered: bool) -> Iterator[tuple[float, Loss]]:
    yield 1.0, _surrogate(algo)
    yield algo.entropy_coef, losses.entropy_bonus
    if tempered:
        yield algo.turn_entropy_coef, losses.turn_entropy(algo.turn_entropy)
    if algo.kl_coef:
        yield algo.kl_coef, losses.reference_kl(losses.ESTIMATORS[algo.kl])


def _surrogate(algo: AlgoConfig) -> Loss:
    unit, pool = cast(losses.Unit, algo.ratio), cast(losses.Pool, algo.pool)
    high = algo.clip if algo.clip_high is None else algo.clip_high
    match algo.surrogate:
        case "clip":
            loss = losses.clipped(algo.clip, high, unit, pool, algo.dual_clip)
        case "cispo":
            loss = losses.clipped_weight(algo.clip, high, unit, pool)
        case "awr":
            loss = losses.advantage_weighted(algo.awr_beta, algo.awr_cap, unit, pool)
        case _:
            loss = losses.reinforce(unit, pool)
    if algo.correction == "none":
        return loss
    kind: Literal["truncate", "mask"] = "truncate" if algo.correction == "truncate" else "mask"
    # a mean over a row hardly differs from 1 whatever its tokens do: its tokens are weighted each alone
    return losses.corrected(loss, kind, algo.correction_bound, "token" if pool == "mean" else unit)
