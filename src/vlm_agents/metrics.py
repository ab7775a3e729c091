"""What every number that is logged means, in one place, and the sentence that a run comes down to.

Names, words and intervals only: nothing here measures, logs or draws. `python -m vlm_agents.metrics` prints
docs/metrics.md.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """One number: its unit, what it means in a line, and where a healthy run has it, if that can be said."""

    unit: str
    meaning: str
    healthy: str = ""


class Group(NamedTuple):
    """The metrics whose names begin with the same `<group>/`; `says`: when they are measured, over what."""

    title: str
    says: str
    metrics: Mapping[str, Metric]


EPISODES = {
    "success": Metric("share of episodes", "episodes that ended in success", "rises"),
    "return": Metric(
        "reward",
        "sum of an episode's rewards, less penalties for illegal replies; no bonus",
        "rises",
    ),
    "positive_return": Metric("share of episodes", "episodes whose return is above 0", "rises"),
    "episode_length": Metric("turns", "turns of an episode", "falls where being quick is what is learned"),
    "steps_over_expert": Metric(
        "ratio", "turns of a solved episode over those that the expert needs from its start", "towards 1"
    ),
    "time_limit_rate": Metric("share of episodes", "episodes that the limit of turns cut off", "falls"),
    "too_long_rate": Metric(
        "share of episodes", "episodes that ended as the next prompt was longer than the model takes: no success", "0"
    ),
    "failure_rate": Metric("share of episodes", "episodes that the env ended without success", "falls"),
    "all_invalid_rate": Metric("share of episodes", "episodes without success in which no reply was legal", "0"),
    "invalid_rate": Metric("share of turns", "replies without a legal action", "below 0.05"),
    "loop_rate": Metric(
        "share of turns", "turns that did in a state what had been done in that state before", "below 0.1"
    ),
    "random_rate": Metric("share of turns", "turns that were drawn at random instead of asking the policy"),
    "truncated_rate": Metric("share of turns", "replies cut off at prompt.max_reply_tokens", "near 0"),
    "reply_tokens": Metric("tokens", "length of a reply", "steady: one that grows to the limit is cut off"),
    "repeated_token_rate": Metric(
        "share of a reply", "runs of four tokens that the reply had before", "steady: one that rises is a loop of words"
    ),
    "entropy": Metric("nats a token", "how spread the policy's choice of a token is", "falls slowly, not to 0 at once"),
    "env_errors": Metric("episodes", "episodes that an error of the env ended; they are in no mean", "0"),
    "unscored": Metric("episodes", "episodes whose answer no referee could judge; they are in no mean", "0"),
}
SERVER = {
    "answers": Metric("answers", "what the server was asked for"),
    "prompt_tokens": Metric("tokens", "of those questions"),
    "completion_tokens": Metric("tokens", "of those answers"),
    "cached_answers": Metric("answers", "what was found in the cache, at no cost"),
    "cached_prompt_tokens": Metric("tokens", "of the questions that were found in the cache"),
    "cached_completion_tokens": Metric("tokens", "of the answers that were found in the cache"),
    "unparsable": Metric("answers", "answers that could not be read", "few"),
}
REFEREE = {
    "referee_asked": Metric(
        "share of answers", "answers that rules couldn't judge, so that a server was asked; of those with a verdict"
    ),
}
OWN = {  # of some envs
    "tool_calls": Metric("turns", "turns with code, of visual search", "neither 0 nor all of env.max_steps"),
    "tool_pictures": Metric("pictures", "pictures that code showed"),
    "tool_error_rate": Metric("share of calls", "code that raised or was ended, where there was code", "falls"),
    "seconds_tool": Metric("seconds a call", "how long code took"),
    "goal_conditions": Metric("share", "conditions of the goal that were met at the end, of ALFWorld", "rises"),
}
BOUNDS = {
    f"{share}_{bound}": Metric("share of episodes", f"{end} end of the 95 % interval (Wilson) of {share}")
    for share in ("success", "positive_return")
    for bound, end in (("low", "lower"), ("high", "upper"))
}
BY_TAG = {
    "success/<tag>/<value>": Metric(
        "share of episodes", "the same of the episodes whose env gives them this tag; of tags with at most 16 values"
    ),
    "episodes/<tag>/<value>": Metric("episodes", "of how many"),
}
GROUPS = {
    "eval": Group(
        "Held-out panel",
        "The same held-out seeds every time, which no training sees. Without a suffix: sampled at the policy's own "
        "temperature; `_greedy`: its likeliest tokens; `_random`, `_expert`: the scripted policies on the same seeds; "
        "`_bare`: sampled without its tool; `_votes`: the same, its most frequent answer of as many as take the time; "
        "`_before`: before training. What else an env measures of an episode stands here, and in the other groups of "
        "episodes, under the env's own name.",
        EPISODES
        | OWN
        | REFEREE
        | BOUNDS
        | BY_TAG
        | SERVER
        | {"votes": Metric("answers", "how many `_votes` has of each question")},
    ),
    "rollout": Group(
        "Rollout",
        "Over the episodes that an iteration of stage=ppo collects, before it learns from them.",
        EPISODES
        | OWN
        | REFEREE
        | {
            "env_steps": Metric("turns", "turns played in training so far, this iteration's too"),
            "staleness": Metric("updates", "by which the weights that played are older than those that learn from it"),
            "bonus/<name>": Metric(
                "reward", "sum of a bonus or penalty beside the env's reward over an episode", "small beside the return"
            ),
        },
    ),
    "ppo": Group(
        "Update",
        "Of every algorithm. Means over all turns of an iteration's passes, unless said otherwise.",
        {
            "policy_loss": Metric("", "surrogate loss of the policy", "near 0; its sign says little"),
            "value_loss": Metric("reward²", "squared error of the critic's values, halved", "falls"),
            "entropy": Metric("nats a token", "entropy of the policy's tokens in the update", "falls slowly"),
            "approx_kl": Metric(
                "nats a turn",
                "KL from the policy that sampled, k3 estimate; 0 while the critic alone learns",
                "below 0.05",
            ),
            "clip_fraction": Metric(
                "share of turns",
                "ratios, of algo.ratio, that have left [1 - clip, 1 + clip_high]; of awr: weights at algo.awr_cap",
                "below 0.3",
            ),
            "kl_reference": Metric(
                "nats a token", "estimate, by algo.kl, of the KL to the policy that training started from"
            ),
            "correction": Metric("ratio", "weight of algo.correction: old over sampled probability", "near 1"),
            "temperature": Metric("", "learned sampling temperature"),
            "turn_entropy_loss": Metric("nats²", "how far a turn's entropy is from algo.turn_entropy", "falls"),
            "ratio_at_start": Metric(
                "ratio", "the ratio furthest from 1 before the first step: is what is trained what was sampled?", "1"
            ),
            "mismatch_kl": Metric(
                "nats a turn",
                "KL between the policy that sampled and the one that is updated, before any step",
                "below 0.01",
            ),
            "updates": Metric("steps", "optimizer steps of the iteration; 0 while the critic alone learns"),
            "lr": Metric("", "learning rate of the policy"),
            "policy_grad_norm": Metric("", "gradient norm of the policy before clipping", "no jumps by powers of ten"),
            "value_grad_norm": Metric("", "gradient norm of the critic's head before clipping"),
            "temperature_grad_norm": Metric("", "gradient norm of the temperature's head before clipping"),
            "explained_variance": Metric(
                "share",
                "share of the returns' variance that the critic predicted",
                "towards 1; below 0: worse than none is",
            ),
            "advantage_std": Metric("reward", "standard deviation of the advantages, before they are normalised"),
            "nothing_to_learn": Metric(
                "0 or 1",
                "no reply was legal, no rewards differed (with groups: within a start), or no episode was kept",
                "0",
            ),
            "zero_advantage": Metric("share of turns", "turns that teach nothing: advantage 0", "below 0.9"),
            "kept": Metric("episodes", "episodes that algo.filters let through", "stage.episodes"),
            "group_std": Metric("reward", "standard deviation of returns within a group, a mean", "above 0"),
            "varied_groups": Metric("share of groups", "groups whose members differ in their return", "above 0.2"),
        },
    ),
    "novelty": Group(
        "Novelty bonus",
        "With algo.novelty.coef, per iteration.",
        {
            "surprise": Metric("nats a turn", "minus the log-probability of the actions under the predictor"),
            "loss": Metric("nats a token", "loss of the predictor", "falls"),
        },
    ),
    "sft": Group(
        "Supervised fine-tuning",
        "Every ten steps; the validation at the end.",
        {
            "loss": Metric("nats a token", "mean negative log-probability of the answers' tokens", "falls"),
            "val_loss": Metric("nats a token", "the same on held-out rows", "near the loss; well above it: overfitted"),
            "val_reply_probability": Metric("share", "mean probability of a whole held-out answer", "rises"),
            "rows": Metric("rows", "rows that are trained on"),
            "val_rows": Metric("rows", "held-out rows"),
            "skipped_rows": Metric("rows", "rows left out as broken, with stage.skip_bad", "0"),
            "grad_norm": Metric("", "gradient norm before clipping", "no jumps by powers of ten"),
            "lr": Metric("", "learning rate"),
        },
    ),
    "collect": Group(
        "Collected episodes",
        "Over all episodes of stage=collect.",
        {"episodes": Metric("episodes", "episodes on file")}
        | EPISODES
        | REFEREE
        | SERVER
        | {"unrated": Metric("turns", "turns that the rater gave no rating", "0")},
    ),
    "preprocess": Group(
        "Rows for training",
        "Counts over all sources of stage=preprocess.",
        {
            "train": Metric("rows", "rows to train on"),
            "validation": Metric("rows", "rows held out"),
            "pictures": Metric("pictures", "distinct pictures"),
            "episodes": Metric("episodes", "episodes that were read"),
            "episodes_left_out": Metric("episodes", "episodes without success, or ended by an error"),
            "episodes_unsuccessful": Metric("episodes", "left out: without success (stage.success_only)"),
            "episodes_broken": Metric("episodes", "left out: an error of the env ended them", "0"),
            "turns_left_out": Metric("turns", "turns without a label, or rated too low"),
            "turns_illegal": Metric("turns", "left out: the reply holds no legal action"),
            "turns_badly_rated": Metric("turns", "left out: rated under stage.min_score"),
            "turns_not_rated": Metric("turns", "left out: without a rating (stage.min_score)"),
            "turns_unadvised": Metric("turns", "left out: without the advice that would label them"),
            "turns_rated": Metric("turns", "turns with a rating"),
            "turns_unrated": Metric("turns", "turns without a rating"),
            "duplicates": Metric("rows", "rows that were there already"),
            "records": Metric("records", "records that were read"),
            "records_skipped": Metric("records", "records that can't be read", "0"),
            "no_chat": Metric("rows", "skipped: no chat that ends in an answer", "0"),
            "mark_in_text": Metric("rows", "skipped: a text spells the mark of a picture", "0"),
            "half_character": Metric("rows", "skipped: a text with half a surrogate pair", "0"),
            "too_large": Metric("rows", "skipped: larger than a Parquet reader takes", "0"),
        },
    ),
    "merge": Group(
        "Merged weights",
        "Over the first prompts of held-out seeds.",
        {
            "adapter_logit_difference": Metric("logits", "largest difference that the adapter makes"),
            "max_logit_difference": Metric(
                "logits", "largest difference of the merged model from the adapter model", "far below the adapter's"
            ),
            "quantised_logit_difference": Metric("logits", "the same from the model in 4 bits that was trained"),
        },
    ),
    "serve": Group(
        "A model served to other runs",
        "Of stage=serve.",
        {
            "loading_s": Metric("s", "from the start of the server to its first answer"),
            "served_s": Metric("s", "from there to its end"),
        },
    ),
    "doctor": Group(
        "Machine and model",
        "Estimates of stage=doctor, for one rank; nothing is loaded.",
        {
            **{
                f"{part}_bytes": Metric("bytes", f"memory of {words}")
                for part, words in {
                    "weights": "the weights",
                    "optimizer": "the optimizer",
                    "kv_cache": "the KV cache in sampling",
                    "prefill": "prefill in sampling",
                    "gradients": "the gradients",
                    "activations": "the activations in an update",
                    "logits": "the logits in an update",
                    "optimizer_step": "an optimizer step",
                    "buckets": "gradients under way between ranks",
                    "gathered": "the weights gathered to sample, with zero=3",
                    "live": "the weights of layers at work in an update, with zero=3",
                    "host": "the CPU, for one rank, by offload and to save",
                    "sampling": "sampling in all",
                    "update": "an update in all",
                    "peak": "the larger of the two",
                    "machine": "the device",
                }.items()
            },
            "fits": Metric("", "1: the peak fits the device", "1"),
            "parameters": Metric("parameters", "of the model"),
            "prompt_tokens": Metric("tokens", "longest prompt"),
            "gpus": Metric("GPUs", "that torch sees"),
            "cpu_cores": Metric("cores", "that this process may use"),
        },
    ),
    "time": Group(
        "Time",
        "Of an iteration of stage=ppo; of a panel where it is compared with one without a tool, `panel_bare`.",
        {
            "panel": Metric("s", "playing the held-out panel, sampled"),
            "panel_bare": Metric("s", "playing it without a tool"),
            "rollout": Metric("s", "collecting the episodes"),
            "env": Metric("s", "of those: until the envs had answered, with their pictures and the expert's advice"),
            "prefill": Metric("s", "of those: reading prompts"),
            "decode": Metric("s", "of those: sampling replies; of a server, until it had answered"),
            "swap": Metric("s", "of those: handing a server the adapter (rollout=vllm)"),
            "update": Metric("s", "learning from them"),
            "training": Metric("s", "both, over all iterations"),
        },
    ),
    "speed": Group(
        "Speed",
        "Of an iteration's rollout.",
        {
            "env_steps_per_s": Metric("turns/s", "turns played, all envs together"),
            "reply_tokens_per_s": Metric("tokens/s", "tokens sampled"),
        },
    ),
    "memory": Group(
        "GPU memory",
        "The most that tensors took.",
        {
            "rollout_bytes": Metric("bytes", "while collecting"),
            "update_bytes": Metric("bytes", "while learning"),
        },
    ),
}
MOSTLY = 0.5  # share of illegal replies
VARIANTS = ("_greedy", "_random", "_expert", "_bare", "_votes")


class Name(NamedTuple):
    """A metric's name in its parts: `eval/success_low_greedy_before` is eval, success_low, greedy, before."""

    group: str
    base: str
    variant: str = ""
    before: bool = False

    @property
    def metric(self) -> Metric | None:
        metrics = GROUPS[self.group].metrics if self.group in GROUPS else {}
        word, *tag = self.base.split("/")
        return metrics.get({1: f"{word}/<name>", 2: f"{word}/<tag>/<value>"}.get(len(tag), self.base))


def parts(name: str) -> Name:
    group, _, base = name.partition("/")
    if group != "eval":
        return Name(group, base)
    plain = base.removesuffix("_before")
    known = plain in GROUPS["eval"].metrics  # steps_over_expert is nobody's variant
    variant = "" if known else next((word for word in VARIANTS if plain.endswith(word)), "")
    return Name(group, plain.removesuffix(variant), variant[1:], plain != base)


def wilson_interval(successes: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927): honest at 0, at 1 and for small n."""
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)  # rounding leads beyond the ends


def with_interval(metrics: Mapping[str, float], name: str, suffix: str = "") -> str:
    """`0.470 [0.402, 0.539]` of the eval metric `name`; without its interval where that isn't there."""
    ends = [metrics[key] for bound in ("low", "high") if (key := f"{name}_{bound}{suffix}") in metrics]
    return f"{metrics[name + suffix]:.3f}" + (" [{:.3f}, {:.3f}]".format(*ends) if len(ends) == 2 else "")


def change(metrics: Mapping[str, float], name: str, suffix: str = "") -> str:
    """The same, behind what it was before training where that is known."""
    before, after = f"{suffix}_before", with_interval(metrics, name, suffix)
    return f"{with_interval(metrics, name, before)} -> {after}" if f"{name}{before}" in metrics else after


def shortcoming(metrics: Mapping[str, float]) -> str:
    """Why the policy that was played is no agent yet, in words: it seldom says what can be done, or chance does as well
    by success, then return, as it does sampled and greedy. Empty where neither is so."""
    rates = [metrics[f"eval/invalid_rate{end}"] for end in ("", "_greedy") if f"eval/invalid_rate{end}" in metrics]
    illegal = min(rates, default=metrics.get("rollout/invalid_rate", 0.0))
    if illegal > MOSTLY:
        return f"{illegal:.0%} of its replies hold no legal action"

    def came_of(variant: str) -> tuple[float, float]:
        return metrics[f"eval/success{variant}"], metrics[f"eval/return{variant}"]

    if "eval/success_random" not in metrics or metrics["eval/success_random"] == 1:
        return ""
    best, chance = max(came_of(end) for end in ("", "_greedy") if f"eval/success{end}" in metrics), came_of("_random")
    return f"it is no better than random play, with success {chance[0]:.3f}" if best <= chance else ""


def worsened(metrics: Mapping[str, float]) -> str:
    """Success before and after training, where it fell below the 95 % interval of before; greedy counts too."""
    for words, end in (("success", ""), ("greedy success", "_greedy")):
        if metrics.get(f"eval/success{end}", 1.0) < metrics.get(f"eval/success_low{end}_before", 0.0):
            return f"{words} {change(metrics, 'eval/success', end)}"
    return ""


def headline(stage: str, metrics: Mapping[str, float], where: str = "") -> str:
    """What came of a run, in a line; `where`, such as " on 200 held-out seeds", is put behind the noun."""
    name = "eval/success"
    match stage:
        case "ppo" | "eval" if name in metrics:
            sampled = change(metrics, name)
            if f"{name}_greedy" not in metrics:
                return f"success{where} {sampled}"
            return f"success{where} {sampled} sampled, {change(metrics, name, '_greedy')} greedy"
        case "ppo":
            return f"success {metrics['rollout/success']:.3f} in the last iteration's rollout, no held-out seed played"
        case "sft":
            known = "sft/val_loss" in metrics
            rows = f"{metrics['sft/val_rows']:.0f} " if "sft/val_rows" in metrics else ""  # an older run doesn't say
            held_out = f", {metrics['sft/val_loss']:.4g} on {rows}held-out rows" if known else ", none of them held out"
            return f"loss {metrics['sft/loss']:.4g} over {metrics['sft/rows']:.0f} rows{held_out}"
        case "collect":
            drawn = metrics.get("collect/random_rate", 0.0)
            noise = f", {drawn:.0%} of the turns at random" if drawn else ""
            return f"{metrics['collect/episodes']:.0f} episodes{where}{noise}, success {metrics['collect/success']:.3f}"
        case "preprocess":
            return (
                f"{metrics['preprocess/train']:.0f} rows to train on, {metrics['preprocess/validation']:.0f} held out"
            )
        case "merge":
            return f"logits within {metrics['merge/max_logit_difference']:.2g} of the adapter model's"
        case "serve":
            return f"answered for {metrics['serve/served_s']:.0f} s, {metrics['serve/loading_s']:.0f} s after its start"
        case "doctor":
            need, there = (metrics[f"doctor/{part}_bytes"] / 2**30 for part in ("peak", "machine"))
            fits = "fits" if metrics["doctor/fits"] else "does not fit"
            return f"needs {need:.2f} GiB{f' of {there:.2f}, {fits}' if there else '; there is no such device here'}"
    raise AssertionError(f"no headline for stage={stage}")


def document() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "What the numbers of `metrics.jsonl`, `summary.json`, the report and the tracker mean. Generated by "
        "`python -m vlm_agents.metrics`.",
    ]
    for name, group in GROUPS.items():
        lines += ["", f"## {name}/: {group.title}", "", group.says, ""]
        lines += ["| name | unit | meaning | healthy |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {m.unit} | {m.meaning} | {m.healthy} |" for key, m in group.metrics.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
