"""Cards beside models and data: what they say, that it is true, and that they hold no place of this machine."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.stages.cards import base_of, portable_command, read_front

RunStage = Callable[..., Path]
LORA = ("model/lora=adapter", "model.lora.rank=4", "model.lora.alpha=8")


def test_the_cards_of_a_chain_say_what_was_made_of_what(
    run_stage: RunStage, echo_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An adapter on the weights of the package, what is merged of it, and that trained further."""
    monkeypatch.chdir(tmp_path)
    shipped = ("model=tiny", "model.path=null")
    words = ("stage.epochs=0.1", *shipped, *LORA)
    sft = run_stage(tmp_path / "sft", "stage=sft", f"stage.data={echo_chats}", *words)
    merged = run_stage(tmp_path / "merge", "stage=merge", "stage.init=sft", *shipped)
    played = ("stage.iterations=1", "stage.episodes=4", "stage.num_envs=4", "stage.eval_episodes=4")
    ppo = run_stage(tmp_path / "ppo", "stage=ppo", f"stage.init={merged}", *shipped, *played)
    for folder, library in ((sft, "peft"), (merged, "transformers"), (ppo, "transformers")):
        card = ModelCard.load(folder / "model/README.md")
        said = card.data.to_dict()
        assert (said["library_name"], said["pipeline_tag"]) == (library, "image-text-to-text")
        assert said["license"] == "unknown"  # down the chain: that of the data
        for path in (folder / "model").rglob("*"):
            assert path.suffix == ".safetensors" or not path.is_file() or str(tmp_path) not in path.read_text()
        assert "user, with 1 picture:\n\n````text\nTurn 1 of 3. Name the colour.\n````" in card.text
        assert "vlm_agents/Echo-v0" in card.text
    assert "the tiny weights that vlm-agents ships" in (sft / "model/README.md").read_text()
    assert "**Licence**: the base's is `mit`" in (sft / "model/README.md").read_text()
    assert "the model of `sft` (`model=tiny`)" in (merged / "model/README.md").read_text()

    metrics = json.loads((ppo / "summary.json").read_text())["metrics"]
    share, low, high = (metrics[f"eval/success{end}_before"] for end in ("", "_low", "_high"))
    told = (ppo / "model/README.md").read_text()
    assert f"| success, before, sampled | {share:.3f} [{low:.3f}, {high:.3f}] |" in told
    assert "merge/max_logit_difference" in (merged / "model/README.md").read_text()


def test_a_base_on_the_hub_and_its_licence_are_handed_down(tmp_path: Path):
    said = {"base_model": "some/model", "license": "other", "license_name": "own", "tags": ["a"]}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(said)}---\ntext\n")
    assert read_front(tmp_path) == {name: said[name] for name in ("base_model", "license", "license_name")}
    for foreign in ("no front matter", "---\n[a\n---\n", "---\n- a\n---\n", "---\nbase_model: [a, b]\n---\n"):
        (tmp_path / "README.md").write_text(foreign)
        assert read_front(tmp_path) == {}
    assert read_front(tmp_path / "nowhere") == {}


def test_weights_that_are_gone_when_the_model_is_saved_are_named_all_the_same(compose_run: Callable[..., RunConfig]):
    """A run that goes on from its checkpoint needs them no more; and what `stage.init` names is no hub id."""
    cfg = compose_run("stage=ppo", "stage.init=null")
    assert isinstance(cfg.stage, PpoConfig)
    known, words = base_of(replace(cfg, stage=replace(cfg.stage, init="gone/sft")))
    assert (known, words) == ({"license": "mit"}, "the model of `gone/sft` (`model=tiny`)")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("python -m vlm_agents stage=sft name=a run_dir=/b tracking=mlflow tracking.uri=http://c", "stage=sft name=a"),
        ("python -m vlm_agents stage=merge stage.init=/home/me/runs/a/sft", "stage=merge stage.init=a/sft"),
        ("python -m vlm_agents 'stage.data=[/x/y/a,/x/y/b]' +a=1", "'stage.data=[y/a,y/b]' +a=1"),
        ("python -m vlm_agents stage.init=outputs/a/sft stage.remote.url=http://c/v1", "stage.init=outputs/a/sft"),
    ],
)
def test_a_command_is_told_without_what_is_this_machine_s(given: str, told: str):
    assert portable_command(given) == f"python -m vlm_agents {told}"


def test_a_card_of_data_names_the_files_that_there_are(run_stage: RunStage, echo_chats: Path, tmp_path: Path):
    card = DatasetCard.load(echo_chats / "README.md")
    for config in card.data.to_dict()["configs"]:
        assert [files["split"] for files in config["data_files"]] == ["train", "validation"]
    registry = json.loads((echo_chats / "dataset_info.json").read_text())
    assert {split: entry["file_name"] for split, entry in registry.items()} == {
        split: f"{split}.parquet" for split in ("train", "validation")
    }
    assert registry["train"]["columns"] == {"messages": "messages", "images": "images"}
    assert "&" not in (echo_chats / "README.md").read_text().split("---\n")[1]  # no YAML anchors
    assert "**Played** by the expert policy, 30% of the turns at random; rated by the expert\n" in card.text
