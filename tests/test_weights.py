"""Whose weights: chosen by what lies under the run's name, told in words, and refused where they can't be meant."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from vlm_agents.config import RunConfig, conf_dir, parse, register
from vlm_agents.errors import ConfigError
from vlm_agents.lineage import differences, taught
from vlm_agents.run import Run, settled
from vlm_agents.weights import weights_of


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(stage: str, *words: str, folder: str | None = None, done: bool = True) -> Path:
    """A run directory as `stage` leaves it, as far as others read it."""
    where = Path(folder or f"outputs/x/{stage}")
    where.mkdir(parents=True)
    cfg = chosen(f"stage={stage}", *words, f"run_dir={where}")
    (where / "config.yaml").write_text(yaml.safe_dump(asdict(cfg)))
    (where / "metrics.jsonl").write_text("{}\n")
    if done:
        (where / "DONE").touch()
        (where / "model").mkdir()
    return where


def chosen(*words: str) -> RunConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        always = ["name=x", "tracking=jsonl", "hardware.threads=1", "run_dir=here"]
        return settled(parse(compose("config", [*always, *words])))


def init(*words: str) -> str | None:
    return getattr(chosen(*words).stage, "init", None)


# ---- how they are chosen ---------------------------------------------------------------------------------------------
def test_each_stage_goes_on_with_the_one_before_it() -> None:
    assert init("stage=ppo") is init("stage=eval") is None
    run("sft")
    assert init("stage=ppo") == init("stage=eval") == "outputs/x/sft"
    run("ppo")
    assert init("stage=ppo") == "outputs/x/sft"
    assert init("stage=eval") == "outputs/x/ppo"
    assert init("stage=eval", "stage.init=null") is None
    assert init("stage=eval", "stage.policy=expert") is None


def test_a_stage_that_is_not_finished_is_none_to_go_on_from() -> None:
    run("sft", done=False)
    with pytest.raises(ConfigError, match=r"outputs/x/sft isn't finished: give its command again first, or set"):
        chosen("stage=ppo")
    assert init("stage=ppo", "stage.init=null") is None
    Path("outputs/x/sft/metrics.jsonl").unlink()  # it failed before it did anything
    assert init("stage=ppo") is None


def test_a_run_goes_on_with_what_it_began_with() -> None:
    run("ppo", "stage.init=null", done=False)
    run("sft")
    assert init("stage=ppo", "run_dir=outputs/x/ppo") is None


def test_a_directory_of_one_s_own_has_its_neighbours() -> None:
    run("sft", folder="there/sft")
    assert init("stage=ppo", "run_dir=there/ppo") == "there/sft"
    assert init("stage=ppo", "run_dir=there/other") is None


def test_each_job_of_a_sweep_goes_on_with_that_of_its_seed() -> None:
    for seed in (3, 4):
        run("sft", f"seed={seed}", folder=f"multirun/x/sft/{seed - 3}")
    assert init("stage=ppo", "seed=4", "run_dir=multirun/x/ppo/0") == "multirun/x/sft/1"
    with pytest.raises(ConfigError, match=r"could be multirun/x/sft/0 or multirun/x/sft/1, none of seed=5: name one, "):
        chosen("stage=ppo", "seed=5")
    run("sft")  # and one that is no job
    with pytest.raises(ConfigError, match=r"could be outputs/x/sft or multirun/x/sft/0: name one, as in stage.init="):
        chosen("stage=ppo", "seed=3")
    assert init("stage=ppo", "seed=5") == "outputs/x/sft"


# ---- in words --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage=ppo"], "the model's own: the shipped tiny ones"),
        (["stage=sft", "model.weights=random", "model.seed=3"], "the model's own: random weights of seed 3"),
        (["stage=collect", "stage.policy=model", "model.path=a/b"], "the model's own: a/b"),
        (["stage=eval", "stage.init=there"], "there"),
        (["stage=eval", "stage.policy=random"], ""),
        (["stage=preprocess"], ""),
    ],
    ids=" ".join,
)
def test_whose_they_are(words: list[str], told: str) -> None:
    assert weights_of(chosen(*words)) == told


def test_the_screen_the_record_and_the_report_know(capsys: pytest.CaptureFixture[str]) -> None:
    run("sft", "stage.data=outputs/x/preprocess")
    run("preprocess", "stage.data=[outputs/x/collect]")
    run("collect", "prompt=action_only")
    cfg = chosen("stage=ppo", "run_dir=outputs/x/ppo")
    line = "these weights learned prompt.format=action_only, and this run has prompt.format=cot_json"
    with Run.open(cfg, []) as opened:
        opened.begin()
        assert capsys.readouterr().err == f"weights: outputs/x/sft\n{line}\n"
        opened.finish({})
        assert opened.facts()["weights"] == "outputs/x/sft"
        assert opened.facts()["differs"] == line
    summary = json.loads(Path("outputs/x/ppo/summary.json").read_text())
    assert (summary["weights"], summary["differs"]) == ("outputs/x/sft", [line])


# ---- what they were taught -------------------------------------------------------------------------------------------
def test_it_is_traced_back_to_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wherever it is asked from; and what asks nothing itself, such as sft, has no say."""
    run("collect", "prompt.history=full", "env=echo")
    run("collect", "env=number_line", folder="outputs/y/collect")
    run("preprocess", "stage.data=[outputs/x/collect,outputs/y/collect,there.json]")
    run("sft", "stage.data=outputs/x/preprocess", "env=blackjack")
    merged = run("merge", "stage.init=outputs/x/sft", folder="outputs/z/merge").resolve()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    known = taught(merged)
    assert known["env.id"] == ["vlm_agents/Echo-v0", "vlm_agents/NumberLine-v0"]
    assert known["prompt.history"] == ["full", "last_k"]
    words = ("stage=eval", f"stage.init={merged}")
    assert differences(chosen(*words, "env=number_line")) == []
    assert differences(chosen(*words, "prompt.history=none")) == [
        "these weights learned env.id=vlm_agents/Echo-v0 or vlm_agents/NumberLine-v0, and this run has "
        "env.id=MiniGrid-DoorKey-6x6-v0",
        "these weights learned prompt.history=full or last_k, and this run has prompt.history=none",
    ]


def test_what_changes_nothing_in_a_prompt_is_not_told() -> None:
    ppo = run("ppo", "model.temperature=0.5")
    words = ("stage=eval", "env.max_steps=9", "env.workers=true", "prompt.max_reply_tokens=7", "model.temperature=0.5")
    assert differences(chosen(*words)) == []
    assert differences(chosen(*words, "prompt.last_k=2", "prompt.history=none")) == [
        "these weights learned prompt.history=last_k, and this run has prompt.history=none"
    ]
    (ppo / "checkpoints/step_000001").mkdir(parents=True)
    assert differences(chosen("stage=eval", f"stage.init={ppo}/checkpoints/step_000001")) == [
        "these weights learned model.temperature=0.5, and this run has model.temperature=1.0"
    ]


def test_data_of_another_kind_than_sft_s_settings_say_is_told() -> None:
    run("collect", "env=number_line")
    run("preprocess", "stage.data=[outputs/x/collect]")
    assert differences(chosen("stage=sft", "env=number_line")) == []
    assert differences(chosen("stage=sft")) == [
        "the data asks with env.id=vlm_agents/NumberLine-v0, and this run's setting is MiniGrid-DoorKey-6x6-v0: what "
        "is learned is the data's"
    ]


def test_labels_are_written_as_the_prompts_ask() -> None:
    run("collect", "prompt=action_only")
    with pytest.raises(ConfigError, match=r"asked with prompt=action_only, and .* set prompt=action_only$"):
        Run.open(chosen("stage=preprocess"), [])
    Run.open(chosen("stage=preprocess", "prompt=action_only"), []).__exit__(None)


# ---- what their folder says ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["eval", "ppo"])
def test_an_adapter_and_a_learned_temperature_are_as_they_were_saved(stage: str) -> None:
    words = (
        "model/lora=adapter",
        "model.lora.rank=3",
        "model/temperature_head=learned",
        "model.temperature_head.low=0.5",
    )
    trained = run("ppo", *words, folder="outputs/y/ppo")
    (trained / "model/heads").mkdir()
    (trained / "model/heads/temperature_head.safetensors").touch()
    (trained / "model/adapter_config.json").write_text('{"r": 3, "lora_alpha": 32, "lora_dropout": 0.25}')
    cfg = chosen(*f"stage={stage}".split(), f"stage.init={trained}")
    assert cfg.model.lora is not None
    assert cfg.model.temperature_head is not None
    assert (cfg.model.lora.rank, cfg.model.lora.alpha, cfg.model.lora.dropout) == (3, 32, 0.25)
    assert cfg.model.temperature_head.low == 0.5
    other = chosen(*f"stage={stage}".split(), f"stage.init={trained}", "model/lora=adapter")
    assert other.model.lora is not None
    assert other.model.lora.rank == 16  # what is said is said; it will be refused


def test_a_temperature_that_nobody_learned_is_told() -> None:
    run("sft")
    words = ("stage=eval", "env=number_line", "model/temperature_head=learned", "model.temperature=0.7")
    assert differences(chosen(*words)) == ["these weights learned no temperature: it stays at model.temperature=0.7"]
