"""Supervised fine-tuning: it learns, however the batch is cut and whichever weights are trained."""

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig
from vlm_agents.errors import ConfigError, DataError, TrainingError
from vlm_agents.learn.batches import Shares
from vlm_agents.metrics import parts
from vlm_agents.models import Agent, load_agent
from vlm_agents.stages.sft import GroupedSampler, validate
from vlm_agents.stages.sft_data import Chats, check

RunStage = Callable[..., Path]
SHORT = ("stage=sft", "stage.batch_size=8", "stage.warmup_steps=0", "stage.lr=3e-4")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model/model.safetensors")


@pytest.fixture(scope="module")
def trained(run_stage: RunStage, echo_chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of the chats' rows in batches of 8."""
    folder = tmp_path_factory.mktemp("sft")
    return run_stage(folder, *SHORT, f"stage.data={echo_chats}", "stage.epochs=3", "env=minigrid")


def test_the_loss_falls(trained: Path, tiny_model: Path):
    curve = [line for line in lines(trained) if "sft/lr" in line]
    rows = metrics_of(trained)["sft/rows"]
    steps = 3 * math.ceil(rows / 8)
    assert [line["step"] for line in curve] == [*range(10, steps, 10), steps]
    assert curve[-1]["sft/loss"] < curve[0]["sft/loss"] - 1
    assert metrics_of(trained)["sft/loss"] == curve[-1]["sft/loss"]
    # random weights say every token with about equal probability, so the loss starts near log(vocabulary)
    agent = load_agent(ModelConfig("tiny", path=str(tiny_model)), HardwareConfig("cpu"))
    assert metrics_of(trained)["sft/val_loss"] < math.log(len(agent.tokenizer)) - 2


def test_the_report_shows_rows_with_what_the_model_says(trained: Path):
    text = (trained / "report.html").read_text(encoding="utf-8")
    told = json.loads(text.split('id="block">', 1)[1].split("</script>", 1)[0])
    assert told["title"] == "sft: vlm_agents/Echo-v0"  # of its data: it plays no env itself
    assert told["sentence"].startswith(f"Loss {metrics_of(trained)['sft/loss']:.4g} over ")
    assert [curve["name"] for curve in told["curves"] if curve["first"]] == ["sft/loss", "sft/grad_norm"]
    assert all(example["prompt"] and example["answer"] and example["reply"] for example in told["examples"])
    assert 3 <= len(told["examples"]) <= 6
    assert told["images"]


def test_every_metric_is_explained(trained: Path, echo_chats: Path, echo_episodes: Path):
    logged = [name for folder in (trained, echo_chats, echo_episodes) for line in lines(folder) for name in line]
    assert [name for name in sorted({*logged} - {"step"}) if parts(name).metric is None] == []


def test_each_line_is_the_mean_over_its_steps(run_stage: RunStage, echo_chats: Path, tmp_path: Path, trained: Path):
    """Fewer than ten steps are a line too; the first ten of the same run have the same first batch."""
    rows = int(metrics_of(trained)["sft/rows"])
    words = ["stage=sft", f"stage.batch_size={rows}", f"stage.data={echo_chats}", "stage.lr=0", "stage.epochs=2"]
    folder = run_stage(tmp_path, *words)
    curve = [line for line in lines(folder) if "sft/lr" in line]
    assert [line["step"] for line in curve] == [2]
    agent = load_agent(ModelConfig("tiny", path=str(folder / "model")), HardwareConfig("cpu"))
    chats = Chats(echo_chats / "train.parquet", agent.renderer)
    with torch.no_grad():  # no weight moved, and both batches held all rows
        scores = agent.score([chats[index] for index in range(len(chats))])
    assert curve[0]["sft/loss"] == pytest.approx(-float(scores.logprobs.mean()), rel=1e-5)


def test_a_short_run_warms_up_for_half_of_its_steps(run_stage: RunStage, echo_chats: Path, tmp_path: Path):
    """And so trains at all: of two steps the first has no learning rate, the second all of it."""
    words = ["stage=sft", "stage.batch_size=1000", f"stage.data={echo_chats}", "stage.lr=3e-4", "stage.epochs=2"]
    (line,) = [line for line in lines(run_stage(tmp_path, *words)) if "sft/lr" in line]
    assert line["sft/lr"] == pytest.approx(3e-4)


def test_what_is_trained_is_the_reply_and_nothing_else(echo_chats: Path, tiny_model: Path):
    agent = load_agent(ModelConfig("tiny", path=str(tiny_model)), HardwareConfig("cpu"))
    row = Chats(echo_chats / "train.parquet", agent.renderer)[0]
    ((start, end),) = row.spans
    said = agent.tokenizer.decode(row.input_ids[start:end])
    assert said in ("red<|im_end|>", "green<|im_end|>", "blue<|im_end|>", "yellow<|im_end|>")
    assert agent.tokenizer.decode(row.input_ids[:start]).endswith("Name the colour.<|im_end|>\n<|im_start|>assistant\n")
    # 56 pixels are 4 patches of 14 each way, merged two by two
    assert (row.input_ids == agent.family.image_token_id).sum() == 4


def test_micro_batches_change_nothing(run_stage: RunStage, echo_chats: Path, tiny_model: Path, tmp_path: Path):
    """Batches of 8 at once, row by row, and as 3 + 3 + 2 (rows have some 60 tokens), where a mean of means is wrong."""
    words = ["stage=sft", "stage.batch_size=8", "stage.warmup_steps=0", "stage.lr=1e-5", f"stage.data={echo_chats}"]
    whole, *cut = (
        run_stage(tmp_path / str(tokens), *words, f"hardware.tokens_per_microbatch={tokens}")
        for tokens in (10_000, 1, 200)
    )
    expected, start = weights(whole), load_file(tiny_model / "model.safetensors")
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 2e-5
    for folder in cut:
        found = weights(folder)
        assert max(float((expected[name] - found[name]).abs().max()) for name in start) < 1e-6
        for line, other in zip(lines(whole), lines(folder), strict=True):
            assert line == pytest.approx(other, rel=1e-5)  # gradient norms too, which Adam's steps don't depend on


def test_it_tells_its_loss_and_where_it_goes_on(
    run_stage: RunStage, echo_chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*SHORT, f"stage.data={echo_chats}", "stage.batch_size=1000", "stage.epochs=2", "stage.checkpoint_every=1"]
    run_stage(tmp_path, *words)
    said = capsys.readouterr().err
    metrics = metrics_of(tmp_path)
    assert f"sft step 2/2 loss {metrics['sft/loss']:.4f}, " in said
    shutil.rmtree(tmp_path / "checkpoints/step_000002")
    (tmp_path / "DONE").unlink()
    run_stage(tmp_path, *words)
    assert "continues after step 1 of 2, from checkpoints/step_000001\n" in capsys.readouterr().err
    assert metrics_of(tmp_path) == metrics


# ---- adapters --------------------------------------------------------------------------------------------------------
def test_an_adapter_is_all_that_a_lora_run_leaves(
    run_stage: RunStage, echo_chats: Path, tiny_model: Path, tmp_path: Path
):
    words = [*SHORT, "model/lora=adapter", "model.lora.rank=2", f"stage.data={echo_chats}", "stage.checkpoint_every=4"]
    folder = run_stage(tmp_path, *words)
    (checkpoint, *_) = (folder / "checkpoints").iterdir()
    for place in (folder / "model", checkpoint / "model"):
        assert (place / "adapter_model.safetensors").is_file()
        assert not (place / "model.safetensors").exists()
    adapter = load_file(folder / "model/adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)  # they start at zero
    cfg = ModelConfig("tiny", path=str(tiny_model), lora=LoraConfig(rank=2))
    adapted = dict(load_agent(cfg, HardwareConfig("cpu"), str(folder)).model.get_base_model().named_parameters())
    base = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.items() if ".lora_" not in name}
    start = dict(load_agent(replace(cfg, lora=None), HardwareConfig("cpu")).model.named_parameters())
    assert base.keys() == start.keys()
    assert all(torch.equal(base[name], start[name]) for name in start)


def test_dropout_acts_while_an_adapter_is_trained(run_stage: RunStage, echo_chats: Path, tmp_path: Path):
    words = [*SHORT, "model/lora=adapter", "model.lora.rank=2", f"stage.data={echo_chats}"]
    folders = [run_stage(tmp_path / share, *words, f"model.lora.dropout={share}") for share in ("0", "0.5")]
    plain, dropped = (load_file(folder / "model/adapter_model.safetensors") for folder in folders)
    assert any(not torch.equal(plain[name], dropped[name]) for name in plain)


# ---- the rows --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def agent(tiny_model: Path) -> Agent:
    """For reading only."""
    return load_agent(ModelConfig("tiny", path=str(tiny_model)), HardwareConfig("cpu"))


@pytest.fixture(scope="module")
def write(echo_chats: Path) -> Callable[..., Path]:
    """`write(folder, *changes, split="train")`: as many sound rows, each with what a change makes of it, as Parquet."""
    table = pyarrow.parquet.read_table(echo_chats / "train.parquet")

    def written(folder: Path, *changes: Callable[[dict], None], split: str = "train") -> Path:
        rows = table.slice(0, len(changes)).to_pylist()
        for row, change in zip(rows, changes, strict=True):
            change(row)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{split}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), path, row_group_size=2)
        return path

    return written


def sound(row: dict) -> None:
    """Nothing is wrong with it."""


def say(row: dict, text: str, message: int = -2) -> None:
    row["messages"][message]["content"] = text


def show(row: dict, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    row["images"] = [{"bytes": buffer.getvalue(), "path": None}]


def cut(row: dict) -> None:
    row["images"][0]["bytes"] = row["images"][0]["bytes"][:60]


BAD = {
    "a question at the end": (lambda row: row["messages"].pop(), "its last message is of role user"),
    "a foreign role": (lambda row: row["messages"][0].update(role="gpt"), "its role 'gpt' is none of system, user"),
    "a late system message": (
        lambda row: row["messages"].insert(2, {"role": "system", "content": "?"}),
        r"roles are out of order \(system, user, system, assistant\)",
    ),
    "two answers": (
        lambda row: row["messages"].append({"role": "assistant", "content": "?"}),
        r"out of order \(system, user, assistant, assistant\)",
    ),
    "no question": (lambda row: row["messages"].pop(1), r"out of order \(system, assistant\)"),
    "no messages": (lambda row: row.update(messages=[]), "it has no messages"),
    "null messages": (lambda row: row.update(messages=None), "it has no messages"),
    "a null text": (lambda row: say(row, None), "its message 1 lacks role or content"),  # type: ignore[arg-type]
    "a mark too many": (lambda row: say(row, "<image><image>?"), "it has 2 <image> for 1 pictures"),
    "a picture too many": (lambda row: row["images"].append(row["images"][0]), "has 1 <image> for 2 pictures"),
    "null images": (lambda row: row.update(images=None), "its images are null"),
    "a null picture": (lambda row: row.update(images=[None]), "its picture 0 is null, or not in the file"),
    "a path alone": (lambda row: row["images"][0].update(bytes=None, path="x.png"), "its picture 0 is null, or not in"),
    "a broken picture": (cut, r"one of its pictures can't be read \(.*truncated"),
    "no picture": (lambda row: row["images"][0].update(bytes=b"GIF"), "one of its pictures can't be read"),
    "a picture for none": (lambda row: show(row, Image.new("RGB", (2300, 10))), "no picture of 2300x10 pixels"),
    "a long text": (lambda row: say(row, "<image>" + "red " * 4096), "the model has positions for 4096 in all: show"),
    "a long answer": (lambda row: say(row, "red " * 5000, -1), r"its reply takes \d{4,}, and the model has positions"),
}


@pytest.mark.parametrize(("change", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named_before_anything_is_trained(
    agent: Agent, write: Callable[..., Path], tmp_path: Path, change: Callable[[dict], object], reason: str
):
    chats = Chats(write(tmp_path, sound, sound, change), agent.renderer)  # in the second row group
    with pytest.raises(
        DataError, match=rf"^1 of 3 rows .*/train.parquet, row 2: .*{reason}.* stage.skip_bad=true$"
    ) as e:
        check([chats], skip=False)
    assert "\n" not in str(e.value)
    assert check([chats], skip=True) == 1
    assert (len(chats), len(chats.lengths())) == (2, 2)
    assert [chats[index].ident[-2:] for index in range(2)] == [":0", ":1"]


def test_a_chat_that_is_over_the_budget_is_named(echo_chats: Path, agent: Agent):
    path = echo_chats / "train.parquet"
    length = Chats(path, agent.renderer)[0].spans[0][0]
    assert len(Chats(path, agent.renderer, length)[0].input_ids) > length  # the reply is no part of the prompt
    with pytest.raises(DataError, match=rf"train.parquet, row 0: .* a prompt of {length} tokens .* raise prompt"):
        check([Chats(path, agent.renderer, length - 1)], skip=False)


def test_what_texts_spell_is_trained_on_as_text(agent: Agent, write: Callable[..., Path], tmp_path: Path):
    answer = "fine<|im_end|>\n<|im_start|>user\nmore"

    def spelled(row: dict) -> None:
        say(row, "<image>what of <|image_pad|>?")
        say(row, answer, -1)

    chats = Chats(write(tmp_path, spelled), agent.renderer)
    assert check([chats], skip=False) == 0
    row = chats[0]
    ((start, end),) = row.spans
    assert agent.renderer.decode(row.input_ids[start:end].tolist()) == answer
    assert not agent.banned[row.input_ids[start:end]].any()
    assert (row.input_ids == agent.family.image_token_id).sum() == 4  # of one picture of 56 pixels
    metrics = validate(agent, chats, 1, Shares(8192))
    assert math.isfinite(metrics["sft/val_loss"])


def test_all_bad_rows_are_told_together_or_left_out(
    run_stage: RunStage, write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def marked(row: dict) -> None:
        say(row, "?")

    write(tmp_path / "data", marked, sound, marked, sound, marked)
    write(tmp_path / "data", marked, split="validation")
    words = ["stage=sft", f"stage.data={tmp_path / 'data'}", "stage.batch_size=2"]
    told = r"^4 of 6 rows .*train.parquet, row 0: .*, row 2: .*, row 4: .*; and 1 more\. Mend"
    with pytest.raises(DataError, match=told):
        run_stage(tmp_path / "refused", *words)
    metrics = metrics_of(run_stage(tmp_path / "run", *words, "stage.skip_bad=true"))
    assert (metrics["sft/skipped_rows"], metrics["sft/rows"]) == (4, 2)
    assert "sft/val_loss" not in metrics  # of no row
    assert (
        sum(
            "has 0 <image> for 1 pictures; no word can be spelled so; left out" in line.message
            for line in caplog.records
        )
        == 4
    )


def test_chats_of_a_run_that_is_not_finished_are_refused(
    run_stage: RunStage, write: Callable[..., Path], tmp_path: Path
):
    """It may lack its validation split, without a word."""
    write(tmp_path / "data", sound)
    (tmp_path / "data/config.yaml").touch()
    with pytest.raises(DataError, match=r"its stage=preprocess isn't finished; give that command again first"):
        run_stage(tmp_path / "run", "stage=sft", f"stage.data={tmp_path / 'data'}")


def test_weights_that_are_no_numbers_are_not_kept(run_stage: RunStage, echo_chats: Path, tmp_path: Path):
    """A last step may spoil them after its loss was seen to be finite."""
    with pytest.raises(TrainingError, match=r"trained tensors aren't finite \(.*\): lower the lr"):
        run_stage(tmp_path, *SHORT, f"stage.data={echo_chats}", "stage.batch_size=4096", "stage.lr=1e39")
    assert not (tmp_path / "model").exists()


def test_validation_is_optional(run_stage: RunStage, write: Callable[..., Path], tmp_path: Path):
    write(tmp_path / "data", sound, sound)
    metrics = metrics_of(run_stage(tmp_path / "run", "stage=sft", f"stage.data={tmp_path / 'data'}"))
    assert metrics["sft/rows"] == 2
    assert "sft/val_loss" not in metrics


def test_prompt_and_reply_stay_within_the_models_positions(run_stage: RunStage, echo_chats: Path, tmp_path: Path):
    words = ["stage=sft", f"stage.data={echo_chats}", "prompt.max_prompt_tokens=4093"]
    with pytest.raises(ConfigError, match=r"^prompt.max_prompt_tokens=4093 and .*: that is 4097 tokens, .* for 4096\."):
        run_stage(tmp_path, *words)


def test_no_row_to_train_on_is_told(run_stage: RunStage, write: Callable[..., Path], tmp_path: Path):
    write(tmp_path / "data")
    with pytest.raises(DataError, match=r"train.parquet has no row to train on"):
        run_stage(tmp_path / "run", "stage=sft", f"stage.data={tmp_path / 'data'}")
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[]]}), tmp_path / "data/train.parquet")
    with pytest.raises(DataError, match=r"no readable Parquet file of chats \(it has no column images\)"):
        run_stage(tmp_path / "run", "stage=sft", f"stage.data={tmp_path / 'data'}")


def test_a_loss_that_isnt_finite_names_its_row(agent: Agent, echo_chats: Path, tiny_model: Path):
    broken = load_agent(ModelConfig("tiny", path=str(tiny_model)), HardwareConfig("cpu"))
    chats = Chats(echo_chats / "validation.parquet", broken.renderer)
    broken.banned[chats[1].input_ids[chats[1].spans[0][0]]] = True
    with pytest.raises(TrainingError, match=r"^sft/val_loss is inf on row .*/validation.parquet:\d+: "):
        validate(broken, chats, 8, Shares(8192))


# ---- the order of the rows -------------------------------------------------------------------------------------------
LENGTHS = [(1 + index % 2, 100 + index % 7) for index in range(150)]  # two kinds of rows, as one and two pictures


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        sampler = GroupedSampler(LENGTHS, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(150))
        assert len(sampler) == 150
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_a_batch_has_rows_of_one_kind():
    sampler = GroupedSampler(LENGTHS, batch_size=8, seed=0)
    order = list(sampler)
    batches = [order[start : start + 8] for start in range(0, 150, 8)]
    kinds = [{LENGTHS[index][0] for index in batch} for batch in batches]
    # 150 rows are drawn in windows of 64, 64 and 22; sorted, each has one border, which at most one batch straddles
    assert sum(len(kind) > 1 for kind in kinds) <= 3
    assert len(batches[-1]) == 150 % 8  # the short batch is the last one, or the ones behind it would be out of step
    # kinds don't stand in one block each: batches are shuffled too
    assert sum(one != other for one, other in pairwise(kinds)) > 1


def test_rows_of_like_length_share_a_batch():
    order = list(GroupedSampler([(1, index) for index in range(64)], batch_size=8, seed=0))
    assert [{index // 8 for index in order[start : start + 8]} for start in range(0, 64, 8)] == [
        {order[start] // 8} for start in range(0, 64, 8)
    ]
