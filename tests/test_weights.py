"""Whose weights: chosen by what lies under the run's name, told in words, and refused where they can't be meant."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from vlm_agents.config import EchoConfig, RunConfig, conf_dir, parse, register
from vlm_agents.errors import ConfigError
from vlm_agents.lineage import cloned_in, differences, taught
from vlm_agents.run import Run, finished_metrics
from vlm_agents.snapshot import settled
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


def test_a_sweep_somewhere_has_its_neighbours() -> None:
    """Both with hydra.sweep.dir=there/<stage>: the job of the same seed."""
    for seed in (3, 4):
        run("sft", f"seed={seed}", folder=f"there/sft/{seed - 3}")
    assert init("stage=ppo", "seed=4", "run_dir=there/ppo/0") == "there/sft/1"
    assert init("stage=ppo", "seed=4", "run_dir=there/others/0") is None


@pytest.mark.parametrize(
    ("words", "given", "told"),
    [
        (
            ["stage=ppo"],
            ["name=x"],
            "no earlier stage to go on from, no model in outputs/x/sft, multirun/x/sft. stage.init=<its run> names ",
        ),
        (
            ["stage=eval", "run_dir=there/eval"],
            ["name=x"],
            "warning: no earlier stage trained what plays, no model in outputs/x/ppo, multirun/x/ppo, there/ppo, "
            "outputs/x/sft, multirun/x/sft, there/sft. ",
        ),
        (["stage=ppo", "run_dir=there/0"], [], "no earlier stage to go on from, "),  # its place alone is given
        (["stage=ppo", "run_dir=outputs/x/ppo"], [], ""),  # nobody can expect any: the name is new
        (["stage=eval", "stage.init=null"], ["name=x", "stage.init=null"], ""),
        (["stage=eval", "stage.policy=expert"], ["name=x", "stage.policy=expert"], ""),
        (["stage=sft", "stage.data=d"], ["name=x"], ""),
    ],
)
def test_that_none_was_found_is_told_with_where_it_was_looked_for(
    words: list[str], given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run.open(chosen(*words), given) as opened:
        opened.begin()
    line = next((line for line in capsys.readouterr().err.splitlines() if "stage.init=null" in line), "")
    assert line.startswith(told)
    assert bool(line) == bool(told)


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


def test_a_run_s_model_folder_is_its_run() -> None:
    """Or a checkpoint's; a copy of it elsewhere says nothing."""
    run("ppo", "model.weights=random", "prompt=action_only")
    (Path("outputs/x/ppo/checkpoints/step_000001/model")).mkdir(parents=True)
    for inner in ("model", "checkpoints/step_000001", "checkpoints/step_000001/model"):
        cfg = chosen("stage=eval", f"stage.init=outputs/x/ppo/{inner}")
        assert any("prompt.format=action_only" in line for line in differences(cfg))
        with pytest.raises(ConfigError, match="is a run of model=tiny, not tiny_llava"):
            Run.open(replace(cfg, model=replace(cfg.model, name="tiny_llava")), [])
    assert weights_of(chosen("stage=eval", "stage.init=outputs/x/ppo/model")) == "outputs/x/ppo"
    Path("outputs/x/ppo/model").rename("model")
    assert differences(chosen("stage=eval", "stage.init=model")) == []


def test_a_resumed_run_says_from_where(capsys: pytest.CaptureFixture[str]) -> None:
    """From its own weights, where a checkpoint has some; else that it begins anew."""
    run("sft")
    cfg = chosen("stage=ppo", "prompt=cot_json", "run_dir=outputs/x/ppo")
    said = []
    for checkpoint in (False, True, True):
        with Run.open(cfg, ["name=x"]) as opened:
            opened.restore()
            opened.begin()
            opened.log(1, {"a": 1.0})
            if checkpoint:
                opened.save_checkpoint(3, lambda folder: (folder / "model").mkdir(), {})
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith(("weights", "ppo was"))])
    anew = "ppo was interrupted before anything was kept of it: begins anew"
    own = "weights: checkpoints/step_000003 of this run, which began from outputs/x/sft"
    assert said == [["weights: outputs/x/sft"], [anew, "weights: outputs/x/sft"], [own]]


def test_the_way_to_go_on_under_another_name_is_told() -> None:
    """There stage.init=auto would find nothing."""
    run("sft")
    run("ppo", "stage.episodes=8")
    for word, said in (
        ("stage.iterations=9", "another name= with stage.init=outputs/x/ppo to train its model further, or"),
        ("prompt=action_only", "choose another name= with stage.init=outputs/x/sft, or delete"),
        ("stage.init=there", "not there: give stage.init=outputs/x/sft to .* another name= with stage.init=there, or"),
    ):
        with pytest.raises(ConfigError, match=said):
            finished_metrics(chosen("stage=ppo", "stage.episodes=8", "run_dir=outputs/x/ppo", word))


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


def test_a_run_that_was_renamed_to_its_own_source_s_name_has_no_teacher() -> None:
    assert taught(run("merge", "stage.init=outputs/x/merge", folder="outputs/x/merge")) == {}


def test_weights_older_than_shown_actions_saw_none() -> None:
    config = run("ppo") / "config.yaml"
    config.write_text(config.read_text().replace("  show_actions: false\n", ""))
    assert differences(chosen("stage=eval")) == []
    assert differences(chosen("stage=eval", "prompt.show_actions=true")) == [
        "these weights learned prompt.show_actions=False, and this run has prompt.show_actions=True"
    ]


def test_how_far_answers_reach_back_is_told() -> None:
    run("ppo", "prompt.history=answers")
    assert differences(chosen("stage=eval", "prompt.history=answers", "prompt.last_k=2")) == [
        "these weights learned prompt.last_k=4, and this run has prompt.last_k=2"
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


def test_questions_that_are_held_out_were_taught_to_nobody() -> None:
    run("ppo", "env=visual_search", "prompt=tool_call")
    words = ("env.eval_data=[rows.json]", "env.pictures=there", "env.skip_bad=true", "env.sandbox.require=any")
    assert differences(chosen("stage=eval", "env=visual_search", "prompt=tool_call", *words)) == []


def test_weights_that_are_named_and_not_read_are_told() -> None:
    run("sft", "model.path=a/b")
    assert differences(chosen("stage=ppo")) == []
    assert differences(chosen("stage=ppo", "model.path=a/b")) == []  # as a chain has it
    assert differences(chosen("stage=ppo", "model.path=c", "model.weights=random")) == [
        "model.path=c model.weights=random isn't used: the weights are outputs/x/sft; stage.init=null has it used"
    ]
    Path("outputs/x/sft/model/adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    assert differences(chosen("stage=ppo", "model.path=c")) == []  # its base may have moved there


def test_where_a_model_was_cloned() -> None:
    """However far back; a run under the name of its own source ends the search."""
    run("sft")
    run("ppo")
    merged = run("merge", "stage.init=outputs/x/ppo/model", folder="outputs/z/merge")
    assert cloned_in(chosen("stage=eval", f"stage.init={merged}")) == Path("outputs/x/sft").resolve()
    assert cloned_in(chosen("stage=eval", "stage.init=null")) is None
    shutil.rmtree("outputs/x/sft")
    Path("outputs/x/ppo").rename("outputs/x/sft")
    assert cloned_in(chosen("stage=eval", f"stage.init={merged}")) is None
    assert cloned_in(chosen("stage=eval", "stage.init=outputs/x/sft")) is None


def test_an_adapter_is_merged_where_it_was_taught() -> None:
    run("collect", "prompt=action_only", "env=echo", "env.turns=5")
    run("preprocess", "stage.data=[outputs/x/collect]")
    run("sft", "stage.data=outputs/x/preprocess")
    cfg = chosen("stage=merge", "stage.init=outputs/x/sft")
    assert cfg.env == EchoConfig(turns=5)
    assert cfg.prompt.format == "action_only"
    begun = run("merge", "stage.init=outputs/x/sft", folder="outputs/y/merge", done=False)
    shutil.rmtree("outputs/x/collect")  # it goes on with what it began with
    assert chosen("stage=merge", "stage.init=outputs/x/sft", f"run_dir={begun}").env == cfg.env
    assert chosen("stage=merge", "stage.init=outputs/x/sft", "env=number_line").env.family == "number_line"


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
