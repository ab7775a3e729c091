"""Every YAML of conf/ composes, into the type that its group promises; checks across fields hold."""

import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from vlm_agents.config import (
    FAMILIES,
    AlgoConfig,
    CollectConfig,
    DoctorConfig,
    EnvConfig,
    EvalConfig,
    HardwareConfig,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    PpoConfig,
    PreprocessConfig,
    PromptConfig,
    RefereeConfig,
    RolloutConfig,
    ServeConfig,
    SftConfig,
    StageConfig,
    TrackingConfig,
    TrainableConfig,
    conf_dir,
    flat,
    read,
    register,
)
from vlm_agents.config.__main__ import MARK, page, rows
from vlm_agents.config.fields import Part
from vlm_agents.config.run import SCHEMAS
from vlm_agents.errors import ConfigError, DataError
from vlm_agents.snapshot import as_yaml

GROUP_TYPES = {
    "env": EnvConfig,
    "prompt": PromptConfig,
    "model": ModelConfig,
    "hardware": HardwareConfig,
    "tracking": TrackingConfig,
    "referee": RefereeConfig,
    "rollout": RolloutConfig,
    "stage": StageConfig,
    "algo": AlgoConfig,
}
EXACT_TYPES = {
    ("stage", "collect"): CollectConfig,
    ("stage", "preprocess"): PreprocessConfig,
    ("stage", "sft"): SftConfig,
    ("stage", "ppo"): PpoConfig,
    ("stage", "eval"): EvalConfig,
    ("stage", "merge"): MergeConfig,
    ("stage", "serve"): ServeConfig,
    ("stage", "doctor"): DoctorConfig,
}
# What an option leaves to the user.
GIVEN = {
    "env=gymnasium": ["env.id=CartPole-v1", "env.actions=[left,right]", "env.instructions=Balance."],
    "env=custom": ["env.factory=a:b"],
    "env=visual_search": ["prompt=tool_call"],
    "algo=gspo": ["prompt.history=full"],
    "prompt=custom": ["prompt.factory=a:b"],
    "rollout=vllm": ["model/lora=adapter", "algo.correction=truncate"],
}
FILES = sorted(path for path in conf_dir().rglob("*.yaml") if "local" not in path.parts)
OPTIONS = [(group, path.stem) for group in GROUP_TYPES for path in sorted((conf_dir() / group).glob("*.yaml"))]


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(conf_dir()).as_posix() for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_every_file_is_short_and_says_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    comments = [line for line in lines[:2] if line.startswith("# ") and "@package" not in line]
    assert len(lines) < 40
    assert comments
    assert yaml.safe_load(path.read_text()) is not None


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_into_its_type(compose_run, group: str, option: str) -> None:
    stage = [] if group == "stage" else ["stage=ppo"]
    part = getattr(compose_run(*stage, f"{group}={option}", *GIVEN.get(f"{group}={option}", [])), group)
    assert isinstance(part, GROUP_TYPES[group])
    if group == "env":
        assert type(part) is FAMILIES[part.family]
        assert part.family == option or part.foreign  # games by somebody else's rules share a family
        return
    assert type(part) is EXACT_TYPES.get((group, option), type(part))
    selecting = {"prompt": "format", "rollout": "engine"}.get(group, "name")
    assert getattr(part, selecting) == option  # a file and what it selects have one name


def test_every_family_of_envs_has_a_file() -> None:
    assert set(FAMILIES) <= {option for group, option in OPTIONS if group == "env"}


def test_every_group_is_covered() -> None:
    others = {"model/lora", "model/temperature_head", "model/train", "hydra/launcher", "sweep", "experiment"}
    folders = {path.parent.relative_to(conf_dir()).as_posix() for path in FILES} - {"."}
    covered = others | set(GROUP_TYPES)
    assert {folder for folder in folders if folder.split("/")[0] != "experiment"} <= covered


def test_the_original_rules_take_nothing_off_for_what_chance_plays(compose_run) -> None:
    with pytest.raises(ConfigError, match=r"set env\.invalid_penalty=0"):
        compose_run("stage=eval", "env=number_line", "env.compat=rl4vlm")
    compose_run("stage=eval", "env=number_line", "env.compat=rl4vlm", "env.invalid_penalty=0")


@pytest.mark.parametrize("sweep", [path.stem for path in sorted((conf_dir() / "sweep").glob("*.yaml"))])
def test_every_sweep_names_settings_that_exist(compose_run, sweep: str) -> None:
    params = yaml.safe_load((conf_dir() / f"sweep/{sweep}.yaml").read_text())["hydra"]["sweeper"]["params"]
    known = dict(flat(asdict(compose_run("stage=ppo", f"sweep={sweep}"))))
    assert params
    assert set(params) <= set(known)


EXPERIMENTS = sorted((conf_dir() / "experiment").rglob("*.yaml"))
ALFWORLD = ["rl4vlm_alfworld", "alfworld_text_1_5b"]  # for its own games, whose folder has to be given


@pytest.mark.parametrize("path", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_every_experiment_composes(compose_run, path: Path) -> None:
    name = path.relative_to(conf_dir() / "experiment").with_suffix("").as_posix()
    words = ["stage=ppo"] if path.stem == "base" else []
    words += ["env.data=games"] if path.parent.name in ALFWORLD else []
    assert compose_run(*words, f"experiment={name}").stage.name


def test_slurm_launcher_asks_for_one_task_a_job() -> None:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", ["stage=ppo", "hydra/launcher=slurm"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.cpus_per_task, launcher.gpus_per_node) == (1, 8, None)
    assert (launcher.tasks_per_node, launcher.array_parallelism) == (1, 16)
    assert launcher.additional_parameters.requeue is True


@pytest.mark.parametrize(
    ("words", "cores", "gpus"),
    [
        (["hardware=gpu"], 8, 1),
        (["hardware=ddp", "hardware.nodes=2", "hardware.threads=4"], 32, 8),
        (["hardware=ddp", "hydra.launcher.gres=gpu:a100:8"], 64, None),  # gres asks already
    ],
)
def test_slurm_is_asked_for_what_the_hardware_needs(words: list[str], cores: int, gpus: int | None) -> None:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", ["stage=ppo", "hydra/launcher=slurm", *words], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert (launcher.nodes, launcher.cpus_per_task, launcher.gpus_per_node) == (cfg.hardware.nodes, cores, gpus)


def test_defaults_are_the_ones_of_the_readme(compose_run) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow")
    assert (cfg.env.id, cfg.model.name, cfg.hardware.name) == ("MiniGrid-DoorKey-6x6-v0", "tiny", "cpu")
    assert cfg.prompt.format == "cot_json"
    assert cfg.model.lora is None
    assert cfg.algo is not None
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("config", ["stage=ppo"]).tracking.name == "mlflow"


def test_stages_find_each_other_by_name(compose_run) -> None:
    assert compose_run("stage=preprocess").stage.data == ["outputs/test/collect"]
    assert compose_run("stage=sft").stage.data == "outputs/test/preprocess"
    assert compose_run("stage=merge").stage.init == "outputs/test/ppo"


def test_only_ppo_brings_an_algo(compose_run) -> None:
    stages = [option for group, option in OPTIONS if group == "stage"]
    with_algo = [name for name in stages if compose_run(f"stage={name}").algo]
    assert with_algo == ["ppo"]


def test_lora_is_an_option_of_its_own(compose_run) -> None:
    lora = compose_run("stage=ppo", "model/lora=adapter", "model.lora.rank=4").model.lora
    assert lora == LoraConfig(rank=4, alpha=32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.novelty.coef=0.1"], "algo.novelty.coef > 0 makes a second adapter.*model/lora=adapter"),
        (
            ["algo.novelty.coef=0.1", "model/lora=adapter", "hardware=zero2"],
            "algo.novelty.coef > 0 trains a second adapter, which hardware.zero can't: set hardware=ddp",
        ),
        (["hardware.zero=1"], "hardware.zero=1 is not one of 0, 2, 3"),
        (["algo.kl_coef=0.1"], "algo.kl_coef > 0 needs a reference policy.*model/lora=adapter"),
        (["algo.value_lr=-1"], "algo.value_lr=-1.0 must be at least 0"),
        (["algo.value_warmup=-1"], "algo.value_warmup=-1 must be at least 0"),
        (["algo.value_epochs=-1"], "algo.value_epochs=-1 must be at least 0"),
        (["algo.value_epochs=0"], "algo.value_warmup=1 has the critic learn in algo.value_epochs, and there are none"),
        (["algo.value_warmup=9", "stage.iterations=9"], "leaves the policy none of stage.iterations=9"),
        (["algo.count_coef=inf"], "algo.count_coef=inf must be a finite number"),
        (["algo.lr=nan"], "algo.lr=nan must be at least 0"),
        (["model.temperature=nan"], "model.temperature=nan must be a positive number"),
        (["model.temperature=inf"], "model.temperature=inf must be a positive number"),
        (["prompt.score_temperature=nan"], "prompt.score_temperature=nan must be a positive number"),
        (["env.timeout_s=inf"], "env.timeout_s=inf must be a positive number"),
        (["stage=preprocess", "stage.data=[]"], "stage.data is empty: name run directories"),
        (["algo.clip=nan"], "algo.clip=nan must be a positive number"),
        (["env.invalid_penalty=-1"], "env.invalid_penalty=-1.0 must be at least 0"),
        (["hardware.threads=0"], "hardware.threads=0 must lie between 1 and 1024"),
        (["seed=-1"], "seed=-1 must be at least 0"),
        (["name=a/b"], "name='a/b' names a folder"),
        (["+stage.episdoes=3"], "stage.episdoes: no such setting"),
        (["model.quantize=nf4"], "weights in 4 bits can't be trained themselves.*model/lora=adapter"),
        (["model.quantize=int3", "model/lora=adapter"], "model.quantize=int3 is not one of nf4"),
        (["model.attention=flash_attention_2"], "model.attention=flash_attention_2 is not one of sdpa, eager"),
        (["env.view=agnet"], "env.view=agnet is not one of full, agent. Did you mean 'agent'"),
    ],
)
def test_checks_across_fields(compose_run, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run("stage=ppo", *overrides)


UNREAD = "set .*, or change algo[.]"
COMPARED = "set algo.group_size=8, or another algo="


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # what compares the members of a group
        (["algo=grpo", "algo.group_size=1"], f"algo.credit=group compares .*{COMPARED}"),
        (["algo=rloo", "algo.group_size=1"], f"algo.credit=rloo compares .*{COMPARED}"),
        (["algo=gigpo", "algo.group_size=1"], f"algo.credit=gigpo compares .*{COMPARED}"),
        (["algo.filters=[outcome]"], rf"algo.filters=\[outcome\] compares .*{COMPARED}"),
        (["algo.filters=[reward]"], rf"algo.filters=\[reward\] compares .*{COMPARED}"),
        (["algo.filters=[variance]"], rf"algo.filters=\[variance\] compares .*{COMPARED}"),
        (["algo.filters=[broken,rank]"], rf"algo.filters=\[rank\] compares .*{COMPARED}"),
        (["algo=grpo", "stage.episodes=60"], r"stage.episodes=60 .* algo.group_size=8: have a multiple of it"),
        (["algo.group_size=3"], r"stage.episodes=64 .* algo.group_size=3: have a multiple of it"),
        # filters
        (["algo.filters=[outcom]"], "algo.filters=outcom is not one of outcome, reward, .*Did you mean 'outcome'"),
        (["algo.oversample=2"], r"algo.oversample=2, .*: set algo.filters=\[reward\], or algo.oversample=1 "),
        (["algo.waves=2"], r"algo.waves=2 play more .*: set algo.filters=\[reward\], or .* algo.waves=1"),
        (["stage.stop_on_collapse=true", "stage.keep_checkpoints=1"], "set stage.keep_checkpoints=2"),
        (["algo=grpo", "algo.filters=[variance]", "algo.top_p=0"], "algo.top_p=0.0 must lie between 0.01 and 1"),
        (["algo.oversample=0.5"], "algo.oversample=0.5 must be at least 1"),
        # the reference
        (["algo.kl=k1", "algo.kl_coef=0.1", "model/lora=adapter"], "algo.kl=k1 is not one of k2, k3"),
        (["algo.kl_reward_coef=0.1"], "algo.kl_reward_coef > 0 needs a reference policy.*model/lora=adapter"),
        # a row that holds all turns
        (["algo=gspo"], "with prompt.history=.* don't share a row: set prompt.history=full, or algo.ratio=turn"),
        # experts
        (
            ["algo.progress_coef=1", *GIVEN["env=gymnasium"], "env=gymnasium"],
            "env=gymnasium has none: give env.expert=",
        ),
        (
            ["algo.utility_share=1", *GIVEN["env=gymnasium"], "env=gymnasium"],
            "env=gymnasium has none: give env.expert=",
        ),
        # what the chosen parts don't read
        (
            ["algo=rloo", "algo.gae_lambda=0.5"],
            f"with algo.credit=gae or bilevel_gae alone, and that is rloo: {UNREAD}",
        ),
        (["algo=ppo_token", "algo.gae_lambda=0.5"], f"algo.gae_lambda=0.5 .* and that is token_gae: {UNREAD}"),
        (["algo.token_gamma=0.9"], f"algo.token_gamma=0.9 .* and that is gae: {UNREAD}"),
        (["algo.token_lambda=0.9"], f"algo.token_lambda=0.9 .* and that is gae: {UNREAD}"),
        (
            ["algo=rloo", "algo.group_std=true"],
            "algo.group_std=True .* and that is rloo: set algo.group_std=False .*, or change",
        ),
        (["algo=grpo", "algo.step_coef=2"], f"algo.step_coef=2.0 .* and that is group: {UNREAD}"),
        (["algo=dapo", "algo.top_p=0.5"], rf"algo.top_p=0.5 .* and that is \['outcome'\]: {UNREAD}"),
        (["algo=grpo", "algo.credit_over=played"], rf"algo.credit_over=played .* and that is \[\]: {UNREAD}"),
        (["algo=reinforce", "algo.clip=0.1"], f"algo.clip=0.1 .* and that is reinforce: {UNREAD}"),
        (
            ["algo=rlef", "algo.clip_high=0.3"],
            "algo.clip_high=0.3 .* and that is awr: set algo.clip_high=null .*, or change",
        ),
        (["algo=cispo", "algo.dual_clip=3"], f"algo.dual_clip=3.0 .* and that is cispo: {UNREAD}"),
        (["algo.awr_beta=2"], f"algo.awr_beta=2.0 .* and that is clip: {UNREAD}"),
        (["algo.awr_cap=2"], f"algo.awr_cap=2.0 .* and that is clip: {UNREAD}"),
        (["algo=grpo", "algo.pool=mean"], f"algo.pool=mean .* and that is token: {UNREAD}"),
        (["algo.kl=k2"], r"algo.kl=k2 is read with algo.kl_coef > 0 alone, and that is 0.0: set algo.kl=k3"),
        (["algo.overlong_share=0.1"], f"algo.overlong_share=0.1 is read with algo.overlong_coef > 0 alone, .*{UNREAD}"),
        (["algo.novelty.lr=1"], f"algo.novelty.lr=1.0 is read with algo.novelty.coef > 0 alone, .*{UNREAD}"),
        # two discounts; a second pass without a ratio; a critic that would learn nothing
        (["algo=gigpo", "algo.progress_coef=1"], "algo.credit=gigpo has another .*: set algo.progress_coef=0"),
        (["algo=rloo", "algo.epochs=2"], "algo.epochs=2: .*: set algo.epochs=1, or algo.surrogate=clip"),
        (["algo=ppo_token", "algo.progress_coef=1", "algo.token_gamma=0.9"], "algo.credit=token_gae has another"),
        (["algo.value_coef=0"], "algo.value_coef=0.0 must be a positive number"),
        (["algo=oversample_rank", "algo.dual_clip=1"], "algo.dual_clip=1.0 must be at least 1.01"),
        (["algo.correction_bound=3"], f"algo.correction_bound=3.0 .* and that is none: {UNREAD}"),
        (["algo=grpo", "algo.value_coef=1"], f"algo.value_coef=1.0 .* and that is group: {UNREAD}"),
        (["algo=grpo", "algo.value_warmup=0"], f"algo.value_warmup=0 .* and that is group: {UNREAD}"),
        (["algo=grpo", "algo.value_epochs=1"], f"algo.value_epochs=1 .* and that is group: {UNREAD}"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_an_algorithm_that_cannot_work_is_refused_with_what_to_change(
    compose_run, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run("stage=ppo", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=gspo", "prompt.history=full"],
        ["algo=gspo", "env.max_steps=1"],  # one turn is one row
        ["algo=gspo", "algo.ratio=turn"],
        ["algo=grpo", "algo.credit=rloo", "algo.group_std=False"],  # which conf/algo/grpo.yaml sets
        ["algo.kl=k2", "algo.kl_coef=0.1", "model/lora=adapter"],
        ["algo.filters=[broken,overlong]", "algo.oversample=1.5"],  # of each episode alone
        ["algo.progress_coef=1", "algo.utility_share=0.25"],  # MiniGrid has an expert
    ],
    ids=" ".join,
)
def test_what_a_refusal_advises_is_accepted(compose_run, overrides: list[str]) -> None:
    assert compose_run("stage=ppo", *overrides).algo is not None


def test_whole_groups_are_played() -> None:
    algo = AlgoConfig(name="x", group_size=8, filters=["reward"], oversample=1.4)
    assert [algo.played(episodes) for episodes in (8, 16, 64)] == [16, 24, 96]  # 1.4, 2.8 and 11.2 groups, upwards


def test_sft_is_told_its_gpu_by_the_environment(compose_run) -> None:
    with pytest.raises(ConfigError, match=r"takes the first GPU .*hardware.device=cuda, and CUDA_VISIBLE_DEVICES=1 "):
        compose_run("stage=sft", "hardware.device=cuda:1")
    for device in ("cpu", "cuda", "cuda:0"):
        assert compose_run("stage=sft", f"hardware.device={device}").hardware.device == device
    assert compose_run("stage=ppo", "hardware.device=cuda:1").hardware.device == "cuda:1"


def test_a_learned_temperature_starts_between_its_bounds(compose_run) -> None:
    learned = ("stage=ppo", "model/temperature_head=learned")
    assert compose_run(*learned, "algo.turn_entropy_coef=0.1").model.temperature_head.high == 1.5
    with pytest.raises(ConfigError, match=r"model.temperature=2, where the temperature head starts"):
        compose_run(*learned, "model.temperature=2")
    with pytest.raises(ConfigError, match="add model/temperature_head=learned"):
        compose_run("stage=ppo", "algo.turn_entropy_coef=0.1")


def test_what_learns_is_what_was_said_or_else_what_the_stage_says(compose_run) -> None:
    assert compose_run("stage=ppo").model.train.parts == ["language"]
    assert compose_run("stage=ppo", "model.train.vision=true").model.train.parts == ["vision", "language"]
    assert compose_run("stage=ppo", "model/train=all").model.train == TrainableConfig(True, True, True)
    assert compose_run("stage=sft").model.train == TrainableConfig(True, True, True)
    assert compose_run("stage=sft", "model/train=language").model.train.parts == ["language"]
    assert compose_run("stage=sft", "model.train={vision: false, language: false}").model.train.parts == ["projector"]
    with pytest.raises(ConfigError, match=r"nothing would learn: set model/train=language or all, "):
        compose_run("stage=sft", "model.train={vision: false, projector: false, language: false}")
    blind = ("stage=ppo", "model.train.language=false")
    with pytest.raises(ConfigError, match=r"nothing would learn: set model/train=language or all, "):
        compose_run(*blind)
    assert compose_run(*blind, "model/train=all").model.train.language is False
    assert compose_run(*blind, "model/temperature_head=learned").model.temperature_head


def test_the_configuration_of_a_run_is_read_back(compose_run, tmp_path: Path) -> None:
    cases = (
        ["stage=ppo", "env=points24", "algo.lr=1e-6", "model/lora=adapter", "algo.target_kl=0.1"],
        ["stage=sft", "model=llava_1_6_mistral_7b", "stage.data=x", "hardware.threads=2"],
        ["stage=collect", "env.max_steps=3", "model/temperature_head=learned", "stage.remote.url=http://x"],
        ["stage=preprocess", "stage.data=[a,b]", "model.image_processor={max_pixels: 100352}"],
        *([f"stage={stage}"] for stage in ("eval", "serve", "doctor")),
    )
    for words in cases:
        cfg = compose_run(*words)
        (tmp_path / "config.yaml").write_text(as_yaml(cfg))
        assert read(tmp_path) == cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["stage"].update(freeze_vision=True), "freeze_vision"),
        (lambda tree: tree["env"].update(family="chess"), "env/chess"),
        (lambda tree: tree.pop("stage"), "stage"),
        (lambda tree: tree.update(seed=-1), "seed=-1 must be at least 0"),
    ],
)
def test_a_configuration_of_another_version_is_told_in_a_line(compose_run, tmp_path: Path, change, message) -> None:
    tree = yaml.safe_load(as_yaml(compose_run("stage=ppo")))
    change(tree)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(
        DataError, match=rf"config\.yaml isn't the configuration of a run of this version \(.*{message}"
    ):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no config\.yaml"):
        read(tmp_path / "nothing")


def test_kl_with_lora_is_fine(compose_run) -> None:
    assert compose_run("stage=ppo", "algo.kl_coef=0.1", "model/lora=adapter").algo.kl_coef == 0.1


def test_composing_needs_no_torch_and_less_than_a_second() -> None:
    """The whole way of a command up to the door of its stage, in a process of its own."""
    code = """
import sys, time
import vlm_agents.__main__
from hydra import compose, initialize_config_dir
from vlm_agents.config import conf_dir, parse, register
register()
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    parse(compose("config", ["stage=ppo", "run_dir=x"]))
heavy = {"torch", "transformers", "mlflow", "gymnasium", "datasets", "PIL"} & set(sys.modules)
assert not heavy, heavy
print(time.process_time())  # of this process alone: the machine may be busy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0


@pytest.mark.parametrize("part", SCHEMAS.values(), ids=list(SCHEMAS))
def test_every_setting_says_what_it_means(part: type[Part]) -> None:
    """In English, within a line or two; a dataclass of settings without the means to say so isn't listed either."""
    for row in rows(part):
        assert len(row.rules.help) > 5, row.name
        assert not row.rules.help.endswith("."), row.name


def test_a_setting_without_a_meaning_is_refused() -> None:
    @dataclass
    class Bare(Part, place="bare"):
        left: int = 0

    with pytest.raises(TypeError, match=r"Bare\.left has no meaning"):
        Bare()


def test_the_page_of_settings_is_current() -> None:
    """If not: python -m vlm_agents.config docs/configuration.md"""
    written = (conf_dir().parent / "docs/configuration.md").read_text()
    assert written.partition(MARK)[2].lstrip("\n") == page()
