"""The contract check passes on honest envs and names the fault of each broken one."""

from dataclasses import replace

import pytest
import yaml
from PIL import Image

from vlm_agents.config import FAMILIES, EchoConfig, EnvConfig, MiniGridConfig, conf_dir
from vlm_agents.envs import check_contract, make_env
from vlm_agents.envs.base import checked_observation, checked_step, state_key
from vlm_agents.envs.echo import EchoEnv
from vlm_agents.errors import EnvError
from vlm_agents.experts import with_expert
from vlm_agents.pictures import Picture
from vlm_agents.types import Advice, Claim, Observation, Step


def small(env_id: str, view: str = "full") -> MiniGridConfig:
    return MiniGridConfig(id=env_id, view=view, tile_size=4, max_steps=60, describe=True)


CONFIGS: list[EnvConfig] = [
    EchoConfig(),
    EchoConfig(colors=8, turns=6, max_steps=4),
    small("MiniGrid-Empty-Random-5x5-v0"),
    small("MiniGrid-DoorKey-6x6-v0"),
    small("MiniGrid-DoorKey-6x6-v0", view="agent"),
    small("MiniGrid-LavaGapS5-v0"),
    small("MiniGrid-GoToDoor-5x5-v0"),
    small("MiniGrid-Fetch-5x5-N2-v0"),
    small("MiniGrid-MemoryS7-v0"),
    small("MiniGrid-Dynamic-Obstacles-5x5-v0"),
    small("BabyAI-GoToLocal-v0"),
    small("BabyAI-PutNextLocal-v0"),
    small("BabyAI-MiniBossLevel-v0"),
]
ADVISED = [EchoConfig(), small("MiniGrid-DoorKey-6x6-v0"), small("BabyAI-PutNextLocal-v0")]


def label(cfg: EnvConfig) -> str:
    return f"{cfg.id}-{getattr(cfg, 'view', cfg.max_steps)}"


def shipped() -> list[EnvConfig]:
    """Every option of `env=`, but for those that name no game, and what examples/ adds: new ones come by themselves."""
    found = []
    for folder in (conf_dir(), conf_dir().parent / "examples/conf"):
        for path in sorted((folder / "env").glob("*.yaml")):
            said = yaml.safe_load(path.read_text())
            schema = said.pop("defaults")[0].split("/")[-1].removesuffix("@_here_")
            if said or not FAMILIES[schema].foreign:
                found.append(FAMILIES[schema](**said))
    return found


SHIPPED = shipped()


@pytest.mark.parametrize("cfg", CONFIGS, ids=label)
def test_env_keeps_the_contract(cfg: EnvConfig) -> None:
    check_contract(lambda: make_env(cfg))


@pytest.mark.parametrize("cfg", SHIPPED, ids=label)
def test_what_is_shipped_keeps_the_contract(cfg: EnvConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(conf_dir().parent)  # where examples/ lies
    check_contract(lambda: make_env(cfg), seeds=(0, 1))


@pytest.mark.parametrize("cfg", [*ADVISED, *(cfg for cfg in SHIPPED if cfg.expert or cfg.advises)], ids=label)
def test_env_with_expert_keeps_the_contract(cfg: EnvConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(conf_dir().parent)
    check_contract(lambda: with_expert(make_env(cfg), cfg), seeds=(0, 1))


@pytest.mark.parametrize("cfg", SHIPPED, ids=label)
def test_experts_advise_legal_actions_and_bring_most_episodes_to_success(
    cfg: EnvConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but a Blackjack hand, which may be lost whatever is done, and a hand of Points24 that can't make 24."""
    monkeypatch.chdir(conf_dir().parent)
    env, solved = with_expert(make_env(cfg), cfg), 0
    for seed in range(10):
        now, over = env.reset(seed), False
        while not over and now.advice is not None:
            assert cfg.free_text == (now.legal_actions is None)
            assert now.legal_actions is None or now.advice.action in now.legal_actions
            step = env.step(now.advice.action)
            now, over = step.observation, step.terminated or step.truncated
            solved += step.success or (step.claim is not None and step.claim.answer == step.claim.right)
    env.close()
    assert solved >= {"blackjack": 1, "points24": 4}.get(cfg.family, 10)


class Advises(EchoEnv):
    """An action that there isn't."""

    def reset(self, seed: int) -> Observation:
        return replace(super().reset(seed), advice=Advice("", "wait"))


class Restarts(EchoEnv):
    """Resets itself."""

    def step(self, action: str | None) -> Step:
        if not self._running:
            self.reset(0)
        return super().step(action)


class Forgets(EchoEnv):
    """Goes by its own count instead of the seed."""

    played = 0

    def reset(self, seed: int) -> Observation:
        Forgets.played += 1
        return super().reset(Forgets.played)


class Flatters(EchoEnv):
    """Calls every action legal."""

    def step(self, action: str | None) -> Step:
        step = super().step(action)
        return replace(step, legal=True)


class Stands(EchoEnv):
    """Says that nothing ever changes."""

    def step(self, action: str | None) -> Step:
        step = super().step(action)
        return replace(step, changed=False)


class Muddles(EchoEnv):
    """Truncates where it terminates."""

    def step(self, action: str | None) -> Step:
        step = super().step(action)
        return replace(step, truncated=step.terminated)


class Favours(EchoEnv):
    """Its first instance counts what no other does."""

    made = 0

    def __init__(self, cfg: EchoConfig) -> None:
        super().__init__(cfg)
        self.first = Favours.made % 2 == 0
        Favours.made += 1

    def step(self, action: str | None) -> Step:
        step = super().step(action)
        return replace(step, metrics={"first": float(self.first)})


class Repeats(EchoEnv):
    """Two words that no reply can tell apart."""

    def reset(self, seed: int) -> Observation:
        return replace(super().reset(seed), legal_actions=("red", "Red"))


class Silent(EchoEnv):
    """Nothing may be said, and it isn't over."""

    def reset(self, seed: int) -> Observation:
        return replace(super().reset(seed), legal_actions=())


class Guesses(EchoEnv):
    """A distance that is no number."""

    def reset(self, seed: int) -> Observation:
        return replace(super().reset(seed), advice=Advice("", "red", distance="2"))  # pyright: ignore


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (Restarts, "steps before the first reset"),
        (Forgets, "different things"),
        (Flatters, "being legal"),
        (Stands, "changed"),
        (Muddles, "both terminates and truncates"),
        (Repeats, r"can't be told by words which of \('red', 'Red'\) is meant"),
        (Silent, r"can't be told by words which of \(\) is meant"),
        (Guesses, "the advised distance is '2', neither None nor a number of turns"),
        (Favours, "ends, succeeds or counts differently for seed"),
        (Advises, "^vlm_agents/Echo-v0: the advised action is 'wait', none of the legal ones: red, "),
    ],
)
def test_a_broken_env_is_caught(broken: type[EchoEnv], fault: str) -> None:
    with pytest.raises(EnvError, match=fault):
        check_contract(lambda: broken(EchoConfig()))


def test_where_nothing_is_legal_any_more_advice_is_no_fault() -> None:
    """As after the last turn of an episode that is truncated."""
    seen = Observation("", legal_actions=(), state_key="x", advice=Advice("", "wait"))
    assert checked_observation(seen) == seen


def test_pictures_stand_before_the_text_or_at_their_places_in_it() -> None:
    red, blue = (Picture(Image.new("RGB", (1, 1), color)) for color in ("red", "blue"))
    assert Observation("ab", (red, blue)).parts == (red, blue, "ab")
    assert Observation("ab", (red, blue), places=(1, 1)).parts == ("a", red, blue, "b")
    assert Observation("ab", (red, blue), places=(0, 2)).parts == (red, "ab", blue)


@pytest.mark.parametrize("places", [(1,), (2, 1), (-1, 0), (0, 3), (0, 0.5)])
def test_a_place_outside_of_the_text_is_named(places: tuple[int, ...]) -> None:
    picture = Picture(Image.new("RGB", (1, 1)))
    with pytest.raises(EnvError, match=r"places is .*, not where each of 2 pictures stands"):
        checked_observation(Observation("ab", (picture, picture), places=places))


def test_a_claim_is_made_at_the_end_and_leaves_success_to_the_referee() -> None:
    claim = Claim("how many?", "3", "three")
    step = Step(Observation("over"), 0.0, True, False, False, True, True, claim=claim)
    assert checked_step(step) == step
    for wrong in (replace(step, terminated=False), replace(step, success=True), replace(step, claim="3")):
        with pytest.raises(EnvError, match="the claim is"):
            checked_step(wrong)
    for part, value in (("answer", None), ("right", 3), ("reward", float("nan"))):
        with pytest.raises(EnvError, match=f"the claim's {part} is"):
            checked_step(replace(step, claim=replace(claim, **{part: value})))


def test_unknown_family_says_which_there_are() -> None:
    with pytest.raises(EnvError, match=r"known: echo, minigrid, .*custom\. Did you mean 'minigrid'"):
        make_env(EnvConfig(family="mingrid", id="x"))


def test_state_keys_tell_states_apart() -> None:
    assert state_key((1, 2), None) == state_key((1, 2), None)
    assert len({state_key((1, 2), None), state_key((1, 2), 0), state_key((2, 1), None)}) == 3
