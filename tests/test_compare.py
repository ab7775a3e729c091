"""The command compare: which runs it finds, what it calls them, what it says of them, and what it refuses."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from vlm_agents import compare, sweeps
from vlm_agents.outcomes import read_outcomes
from vlm_agents.standings import Game, Standing, curve, game, ranking, steps_to, tell_apart
from vlm_agents.sweeps import Played
from vlm_agents.tables import apart

RunStage = Callable[..., Path]
SMALL = ("stage=ppo", "stage.iterations=1", "stage.episodes=4", "stage.num_envs=6", "stage.eval_episodes=6")


@pytest.fixture(scope="module")
def pair(run_stage: RunStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two finished runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed in (0, 1):
        run_stage(folder / str(seed), *SMALL, f"seed={seed}", f"name=s{seed}")
    return folder


@pytest.fixture
def sweep(pair: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(pair, tmp_path / "sweep")


def another(run: Path, name: str, seed: int | None = None, solved: int | None = None, **settings: object) -> Path:
    """A copy of a run with other settings, `stage__init=...`; with its first `solved` held-out seeds won in the end."""
    folder = shutil.copytree(run, run.parent / name)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["seed"] = config["seed"] if seed is None else seed
    for key, value in settings.items():
        part, _, setting = key.partition("__")
        config[part][setting] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if solved is not None:
        lines = [json.loads(line) for line in (folder / "panel.jsonl").read_text().splitlines()]
        ends = [line for line in lines if line["step"] == 1 and line["variant"] == ""]
        for index, line in enumerate(ends):
            line |= {"success": index < solved, "stop": "success" if index < solved else "failure"}
        (folder / "panel.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def labels(*folders: Path, by: tuple[str, ...] = ()) -> dict[str, list[str]]:
    runs, _ = sweeps.found(map(str, folders))
    sweeps.give_labels(runs, by)
    return {label: [run.folder.name for run in runs if run.label == label] for label in {run.label for run in runs}}


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with open(out / "comparison.csv") as file:
        return {(row["game"], row["label"]): row for row in csv.DictReader(file)}


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command says where it does nothing: one line."""
    assert compare.main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    return told.err


# ---- the whole command -----------------------------------------------------------------------------------------------
def test_seeds_of_a_sweep_are_one_line_of_a_table(sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert compare.main([str(sweep)]) == 0
    said, page = capsys.readouterr().out, (sweep / "comparison.md").read_text()
    assert said.startswith(page)
    assert f"`python -m vlm_agents.compare {sweep}`" in page
    assert (sweep / "comparison.png").read_bytes().startswith(b"\x89PNG")
    row = rows(sweep)["Echo-v0", "ppo"]
    metrics = [json.loads((sweep / job / "summary.json").read_text())["metrics"] for job in "01"]
    for name in ("success", "success_greedy", "return"):
        mean = np.mean([own[f"eval/{name}"] for own in metrics])
        assert float(row[name.replace("success_greedy", "greedy")]) == pytest.approx(mean)
    assert (row["runs"], row["seeds"]) == ("2", "6")
    assert float(row["seconds"]) == pytest.approx(np.median([own["time/training"] for own in metrics]))
    assert "| expert |  | 1.000 [" in page
    assert "told apart" not in page


def test_labels_are_held_against_the_baseline_and_ranked(sweep: Path, capsys: pytest.CaptureFixture[str]):
    for seed, solved in ((0, 5), (1, 6)):
        another(sweep / str(seed), f"good{seed}", algo__lr=0.5, solved=solved)
        another(sweep / str(seed), f"bad{seed}", algo__lr=0.1, solved=seed)
        shutil.rmtree(sweep / str(seed))
    assert compare.main([str(sweep), "--baseline", "lr=0.1", "--reference", "a b=0.75", "--out", str(sweep / "o")]) == 0
    told = rows(sweep / "o")
    good, bad = told["Echo-v0", "lr=0.5"], told["Echo-v0", "lr=0.1"]
    assert float(good["success"]) == pytest.approx(11 / 12)
    assert float(good["better"]) == 1  # 5/6 and 1 against 0 and 1/6
    assert float(good["gain"]) == pytest.approx(10 / 12)
    assert bad["better"] == bad["gain"] == ""
    assert [told["all", label]["rank"] for label in ("lr=0.5", "lr=0.1")] == ["1.0", "2.0"]
    page = capsys.readouterr().out
    assert page.index("| lr=0.5 | 2 | 1 [") < page.index("| lr=0.1 | 2 | 2 [")
    assert "| a b |  | 0.750 |" in page
    assert "each run" in page
    assert "| 0.833 1.000 |" in page


def test_who_can_be_told_apart_is_told_the_better_one_first():
    """Three runs each on 60 held-out seeds. 0.5 against 0.55 is within noise, 0.95 is not."""
    rng = np.random.default_rng(0)
    shares = {"half": 0.5, "most": 0.95, "a few more": 0.55}
    standings = {
        label: Standing(label, [played({})] * 3, (rng.random((3, 60)) < share).astype(float), np.zeros((1, 3)))
        for label, share in shares.items()
    }
    tell_apart(standings)
    assert [own.beats for own in standings.values()] == [[], ["half", "a few more"], []]
    assert apart(Game("Some-v0", 60, standings, None, None, {}, 256)) == (
        "Told apart, and no other pair:\n\n* most is better than half, a few more"
    )
    standings.pop("most").beats.clear()
    assert apart(Game("Some-v0", 60, standings, None, None, {}, 256)) == "No two can be told apart."


def test_all_figures_are_of_the_seeds_that_all_runs_played(sweep: Path, capsys: pytest.CaptureFixture[str]):
    """One run lost 4 of 6 held-out seeds: what is told of the others, too, is of the two that are left."""
    good = another(sweep / "0", "good", algo__lr=0.5, solved=1)
    lines = [json.loads(line) for line in (sweep / "1/panel.jsonl").read_text().splitlines()]
    kept = {line["seed"] for line in lines[:2]}
    (sweep / "1/panel.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["seed"] in kept))
    assert compare.main([str(sweep), "--by", "algo.lr"]) == 0
    told, page = rows(sweep)["Echo-v0", "lr=0.5"], capsys.readouterr().out
    panel = [json.loads(line) for line in (good / "panel.jsonl").read_text().splitlines()]
    for name, step, variant, key in (
        ("success", 1, "", "success"),
        ("greedy", 1, "_greedy", "success"),
        ("return", 1, "", "return"),
        ("before", 0, "", "success"),
    ):
        its = [line for line in panel if (line["step"], line["variant"]) == (step, variant) and line["seed"] in kept]
        assert float(told[name]) == pytest.approx(np.mean([line[key] for line in its]))
    assert f"Echo-v0: on 2 held-out seeds, which all runs played; {sweep / '1'} played fewest, 2" in page
    assert page.index("| expert |  | 1.000 [0.342") < page.index("takes 3 runs of each")  # Wilson's of 2 of 2


def test_a_run_that_played_other_seeds_is_named(sweep: Path, capsys: pytest.CaptureFixture[str]):
    path = another(sweep / "0", "other") / "panel.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "seed": line["seed"] + 7}) + "\n" for line in lines))
    assert f"Leave out {path.parent}, which shares none with the others" in refusal(capsys, sweep)


def test_a_sweep_that_is_still_running_is_ranked_by_the_newest_whole_panel(
    sweep: Path, capsys: pytest.CaptureFixture[str]
):
    running = sweep / "1"
    (running / "DONE").unlink()
    (running / "summary.json").unlink()
    panel = (running / "panel.jsonl").read_text()
    last = json.loads(panel.splitlines()[-1])
    with open(running / "panel.jsonl", "a") as file:  # the first episode of the next one
        file.write(json.dumps({**last, "step": last["step"] + 1, "variant": ""}) + "\n")
    assert compare.main([str(sweep)]) == 0
    page = capsys.readouterr().out
    assert ", 2 runs" in page
    assert f"not finished: {running}, compared as it was at step {last['step']}" in page


def test_what_is_not_finished_or_damaged_is_named_and_left_out(sweep: Path, capsys: pytest.CaptureFixture[str]):
    with open(sweep / "1/metrics.jsonl", "a") as file:
        file.write('{"step": 1, "eval/succ')  # a run isn't lost for a line
    begun = another(sweep / "0", "2")
    (begun / "DONE").unlink()
    panel = (begun / "panel.jsonl").read_text().splitlines(keepends=True)
    (begun / "panel.jsonl").write_text("".join(line for line in panel if json.loads(line)["step"] == 0))
    (another(sweep / "0", "3") / "summary.json").write_text("{")
    (another(sweep / "0", "4") / "panel.jsonl").unlink()
    (another(sweep / "0", "5") / "config.yaml").write_text("no: stage")
    assert compare.main([str(sweep)]) == 0
    page = capsys.readouterr().out
    assert ", 2 runs" in page
    reasons = {"2": "not finished", "3": "summary.json is", "4": "no panel.jsonl", "5": "config.yaml is damaged"}
    for job, why in reasons.items():
        assert f"left out: {sweep / job}: {why}" in page


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("summary.json", '{"metrics": []}', "summary.json is damaged"),
        ("summary.json", '{"metrics": {"eval/return": "x"}}', "summary.json is damaged"),
        ("summary.json", None, "summary.json can't be read (Is a directory)"),
        ("metrics.jsonl", None, "metrics.jsonl can't be read (Is a directory)"),
        ("config.yaml", "stage: {name: [ppo], episodes: 4}\nseed: x\nenv: {id: a}", "damaged (stage.name, seed)"),
        (
            "panel.jsonl",
            '{"step": Infinity, "variant": "", "seed": 1, "success": true}',
            "the panel of step 1, the last, isn't there",
        ),
        ("panel.jsonl", '{"step": 1, "variant": "", "seed": 1, "success": "false"}', "panel.jsonl is damaged"),
        ("config.yaml", "[" * 5000, "config.yaml is damaged"),
        ("config.yaml", "a: &a [1]\nb: [*a, *a]", "config.yaml is damaged"),
    ],
)
def test_whatever_ails_a_run_is_told_and_the_others_are_compared(sweep: Path, file: str, content: str | None, why: str):
    path = sweep / "1" / file
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)
    runs, (line,) = sweeps.found([str(sweep)])
    assert [run.folder.name for run in runs] == ["0"]
    assert line.startswith(f"{sweep / '1'}: ")
    assert why in line


def test_a_run_is_compared_without_what_is_damaged_in_its_curve_and_commit(sweep: Path):
    (sweep / "1/commit").write_bytes(b"\xff")
    (sweep / "1/metrics.jsonl").write_text('{"step": Infinity}\n{"step": 1, "rollout/episode_length": 2}\n')
    assert compare.main([str(sweep)]) == 0
    assert rows(sweep)["Echo-v0", "ppo"]["runs"] == "2"


def test_what_can_not_be_looked_into_is_told(tmp_path: Path):
    left_out: list[str] = []
    assert not list(sweeps.directories(tmp_path / "gone", left_out))
    assert left_out == [f"{tmp_path / 'gone'}: can't be read (No such file or directory)"]


def test_any_name_may_be_given(sweep: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder):
    """Formulas of TeX, bytes that are no UTF-8 in the path of a folder, line ends, and a blank or comma in it."""
    odd = os.fsdecode(b"caf\xe9 a=b,c")
    (sweep / "1").rename(sweep / odd)
    words = ["$x^$\n_y=" + str(sweep / "0"), str(sweep / odd), "--reference", "_\ud800$^$=0.5"]
    assert compare.main([*words, "--out", str(sweep / "o")]) == 0
    assert ("Echo-v0", "$x^$ y") in rows(sweep / "o")
    assert "| \\ud800$^$ |  | 0.500 |" in capsys.readouterr().out
    assert not recwarn.list  # of a legend without that name


def test_a_sweep_that_is_compared_whole_is_told_to_its_tracker(sweep: Path, capsys: pytest.CaptureFixture[str]):
    (sweep / "multirun.yaml").write_text("")
    for words, told in ([str(sweep)], True), ([str(sweep / "0"), str(sweep / "1")], False):
        assert compare.main([*words, "--out", str(sweep / "o")]) == 0
        assert (f"not in MLflow: {sweep} has no run there" in capsys.readouterr().out) == told


def test_one_run_is_said_to_be_one(sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert compare.main([str(sweep / "0"), "--out", str(sweep / "o")]) == 0
    assert (
        "one run, so that its intervals are over held-out seeds alone, of these weights: ppo" in capsys.readouterr().out
    )


def test_evaluations_are_compared_under_given_names(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for policy in ("random", "expert"):
        run_stage(Path(policy), "stage=eval", f"stage.policy={policy}", "stage.episodes=8", f"name={policy}")
    assert compare.main(["by_chance=random", "by_rote=expert"]) == 0
    told = rows(tmp_path / "comparison")
    summary = json.loads(Path("random/summary.json").read_text())["metrics"]
    assert float(told["Echo-v0", "by chance"]["success"]) == pytest.approx(summary["eval/success"])
    assert float(told["Echo-v0", "by rote"]["gain"]) == pytest.approx(1 - summary["eval/success"])
    assert told["Echo-v0", "by rote"]["seconds"] == ""
    solved = {one.seed: one.success for one in read_outcomes(Path("random"), trained=False)}
    assert np.mean(list(solved.values())) == pytest.approx(summary["eval/success"])


# ---- labels ----------------------------------------------------------------------------------------------------------
def test_a_label_is_what_tells_runs_apart_beside_their_seeds(sweep: Path):
    assert labels(sweep) == {"ppo": ["0", "1"]}
    another(sweep / "0", "2", algo__lr=0.5, algo__clip=0.3, hardware__threads=7, env__timeout_s=9)
    assert labels(sweep) == {"clip=0.2": ["0", "1"], "clip=0.3": ["2"]}  # the learning rate goes with it
    assert labels(sweep, by=("algo.lr",)).keys() == {"lr=0.0001", "lr=0.5"}
    another(sweep / "0", "3", algo__name="grpo", algo__clip=0.4)
    assert labels(sweep) == {"ppo clip=0.2": ["0", "1"], "ppo clip=0.3": ["2"], "grpo clip=0.4": ["3"]}


def test_what_goes_with_the_seed_or_the_game_is_no_label(sweep: Path):
    for job, init in (("0", "a"), ("1", "b")):
        another(sweep / job, f"short{job}", stage__init=init)
        another(sweep / job, f"long{job}", stage__init=init, env__turns=5, algo__lr=0.5)
        shutil.rmtree(sweep / job)
    runs, _ = sweeps.found([str(sweep)])
    assert sweeps.give_labels(runs, ()) == ["stage.init"]  # told, as runs of one label differ in it
    assert {run.label for run in runs} == {"ppo"}
    assert sorted(sweeps.games(runs)) == ["Echo-v0 turns=3", "Echo-v0 turns=5"]


def test_what_an_older_version_did_not_know_is_as_it_is_by_default(sweep: Path):
    """Whether a setting is missing in a part, or a whole part."""
    for run, part, setting in (
        ("0", "algo", "format_coef"),
        ("1", "env", "timeout_s"),
        ("1", "env", "turns"),
        ("1", "rollout", None),
    ):
        config = yaml.safe_load((sweep / run / "config.yaml").read_text())
        config.pop(part) if setting is None else config[part].pop(setting)
        (sweep / run / "config.yaml").write_text(yaml.safe_dump(config))
    another(sweep / "0", "other", algo__format_coef=0.5)
    assert labels(sweep) == {"format_coef=0.0": ["0", "1"], "format_coef=0.5": ["other"]}


def test_names_count_like_numbers(sweep: Path):
    another(sweep / "0", "10")
    assert [folder.name for folder in sweeps.directories(sweep, [])] == ["0", "1", "10"]


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_runs_in_which_one_seed_deals_something_else_are_not_held_against_each_other(sweep: Path, capsys):
    another(sweep / "0", "other", env__turns=5)
    told = refusal(capsys, f"a={sweep / '0'}", f"b={sweep / 'other'}")
    assert f"{sweep / '0'} has env.turns=3, {sweep / 'other'} 5: one seed isn't the same episode there" in told
    another(sweep / "0", "shown", env__invalid_penalty=0.7)
    assert compare.main([f"a={sweep / '0'}", f"b={sweep / 'shown'}", "--out", str(sweep / "o")]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "'nowhere' is no folder: name run directories"),
        (["x" * 5000], "xxx' is no folder: name run directories"),
        (["a={sweep}/0,"], "'' is no folder: name run directories"),
        (["{sweep}/0", "a={sweep}/0"], "is given under two names"),
        (["{sweep}", "--by", "algo.lrr"], "--by algo.lrr: no such setting. Did you mean 'algo.lr'?"),
        (["{sweep}", "--baseline", "pop"], "--baseline pop: the labels are ppo. Did you mean 'ppo'?"),
        (["{sweep}", "--reference", "7B"], "--reference '7B' is no NAME=VALUE"),
        (["{sweep}", "--reference", "7B=89.4"], "'7B=89.4' is no NAME=VALUE with a success from 0 to 1"),
        (["{sweep}", "--reference", "7B=nan"], "is no NAME=VALUE"),
        (["{sweep}", "--reference", "0.5"], "is no NAME=VALUE"),
        (["{sweep}", "--reference", "7B=0.5", "--reference", "7B=0.6"], "gives 7B two values, 0.5 and 0.6"),
        (["{sweep}", "--to", "x"], "--help shows the usage"),
        (["{sweep}/0/model"], "no finished run of stage=ppo or stage=eval in"),
        ([], "the following arguments are required: FOLDER. --help shows the usage"),
    ],
)
def test_what_can_not_be_compared_is_told_in_a_line(pair: Path, capsys, words: list[str], told: str):
    assert told in refusal(capsys, *(word.format(sweep=pair) for word in words))


def test_a_run_that_plays_no_panel_is_refused(echo_episodes: Path, capsys: pytest.CaptureFixture[str]):
    assert "is no run of stage=ppo or stage=eval, which play held-out seeds" in refusal(capsys, echo_episodes)


def test_an_evaluation_is_called_by_who_played():
    settings = {"seed": 0, "stage.name": "eval", "stage.policy": "expert", "env.id": "a"}
    runs = [Played(Path("y"), settings, {}, {}, []), replace(played({}), label="")]
    runs[1].settings = {**runs[1].settings, "algo.name": "rloo"}
    sweeps.give_labels(runs, ())
    assert [run.label for run in runs] == ["expert", "rloo"]


# ---- learning curves and the ranking ---------------------------------------------------------------------------------
def played(history: dict, episodes: int = 64) -> Played:
    settings = {"seed": 0, "stage.name": "ppo", "stage.episodes": episodes, "env.id": "a"}
    return Played(Path("x"), settings, {}, history, [], finished=True, label="a")


def trained(success: list[float], length: float = 3) -> dict:
    return {n: {"rollout/success": value, "rollout/episode_length": length} for n, value in enumerate(success, 1)}


def test_a_curve_is_the_mean_over_the_last_256_training_episodes():
    run = played(trained([0.0, 0.4, 0.4, 0.8, 0.8]))  # 4 iterations of 64 episodes of 3 turns
    steps, success = curve(run)
    assert steps == pytest.approx([4 * 64 * 3, 5 * 64 * 3])
    assert success == pytest.approx([0.4, 0.6])
    assert len(curve(played(trained([0.1, 0.2], length=2), episodes=300))[0]) == 2
    run.settings = {**run.settings, "algo.group_size": 8}  # 32 starts: how hard they are would be the curve
    assert len(curve(run)[0]) == 0


def test_short_runs_of_a_game_have_curves_of_one_window(sweep: Path):
    """Half of the shortest: of 2 iterations of 4 episodes beside 1 it is half an iteration, that is a whole one."""
    lines = [json.loads(line) for line in (sweep / "0/metrics.jsonl").read_text().splitlines()]
    (again,) = (line | {"step": 2} for line in lines if "rollout/success" in line)
    with (sweep / "0/metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    runs, _ = sweeps.found([str(sweep)])
    one = game("echo", runs, "", np.random.default_rng(0))
    assert one.window == 2
    assert [len(curve(run, one.window)[0]) for run in runs] == [2, 1]


def test_a_curve_is_of_training_or_of_the_panel_and_counts_the_steps_that_were_counted():
    history = {0: {"eval/success": 0.25}} | trained([0.5, 0.7])
    history[1]["rollout/env_steps"], history[2]["rollout/env_steps"] = 1000, 1900
    history[2]["eval/success"] = 0.8
    steps, success = curve(played(history, episodes=256))
    assert (steps.tolist(), success.tolist()) == ([1000, 1900], [0.5, 0.7])
    history[1]["eval/success"] = 0.6  # played in between: the panel is the curve
    steps, success = curve(played(history, episodes=256))
    assert (steps.tolist(), success.tolist()) == ([0, 1000, 1900], [0.25, 0.6, 0.8])
    assert [steps_to(target, played(history, 256)) for target in (0.3, 0.6, 0.9)] == [1000, 1000, np.inf]


def test_a_label_that_is_best_in_one_game_and_worst_in_another_counts_in_both(sweep: Path):
    """Mean over games: (5/6 + 0) / 2 against 2/6 in both. Over all runs at once the middle half would be the same."""
    for job in "01":
        another(sweep / job, f"odd{job}", algo__lr=0.5, solved=5)
        another(sweep / job, f"even{job}", algo__lr=0.1, solved=2)
        another(sweep / job, f"odd other{job}", algo__lr=0.5, env__turns=5, solved=0)
        another(sweep / job, f"even other{job}", algo__lr=0.1, env__turns=5, solved=2)
        shutil.rmtree(sweep / job)
    runs, _ = sweeps.found([str(sweep)])
    sweeps.give_labels(runs, ())
    both = [game(name, those, "", np.random.default_rng(0)) for name, those in sweeps.games(runs).items()]
    for one in both:
        one.before = None
    assert [(place.label, place.score.mean) for place in ranking(both)] == [
        ("lr=0.5", pytest.approx(5 / 12)),
        ("lr=0.1", pytest.approx(1 / 3)),
    ]


def test_games_count_from_before_training_to_one(sweep: Path):
    """Success 5/6 in a game that began at 1/2 counts (5/6 - 1/2) / (1/2) = 2/3; 1/2 counts 0."""
    for job in "01":
        another(sweep / job, f"good{job}", algo__lr=0.5, solved=5)
        another(sweep / job, f"bad{job}", algo__lr=0.1, solved=3)
        shutil.rmtree(sweep / job)
    runs, _ = sweeps.found([str(sweep)])
    sweeps.give_labels(runs, ())
    one = game("echo", runs, "lr=0.1", np.random.default_rng(0))
    one.before = 0.5
    best, worst = ranking([one, one])
    assert (best.label, best.score.mean, best.rank.mean) == ("lr=0.5", pytest.approx(2 / 3), 1)
    assert (worst.label, worst.score.mean, worst.rank.mean) == ("lr=0.1", pytest.approx(0), 2)
    one.before = 1  # solved before training: it tells nothing
    assert ranking([one]) == []
