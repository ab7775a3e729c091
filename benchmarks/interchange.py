"""Does the data of stage=preprocess teach the same elsewhere? TRL's and LLaMA-Factory's labels against ours.

    python benchmarks/interchange.py RUN MODEL PYTHON [PYTHON ...]

RUN is a finished stage=preprocess, MODEL the `model/` of a run, a Qwen family. Each PYTHON is the interpreter of
another virtual environment, with trl or llamafactory in whatever version, and without this package. There the
Parquet is loaded, every row's token ids and labels are compared with ours, and two steps are trained.
"""
# pyright: reportMissingImports=false

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SHOWN = ("trl", "llamafactory", "transformers", "datasets", "pyarrow")
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-4,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def main() -> int:
    if len(sys.argv) < 4:
        print(__doc__, file=sys.stderr)
        return 2
    if sys.argv[1] == "--there":
        run, model, labels = map(Path, sys.argv[2:])
        print(json.dumps(compare(run, model, json.loads(labels.read_text()))))
        return 0
    run, model = (Path(word).resolve() for word in sys.argv[1:3])
    print(f"| {' | '.join(SHOWN)} | rows | ids and labels equal | but for the line end after a reply | losses |")
    print("|---" * (len(SHOWN) + 4) + "|")
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.json"
        labels.write_text(json.dumps(our_rows(run, model)))
        for python in sys.argv[3:]:
            words = [python, __file__, "--there", str(run), str(model), str(labels)]
            place = tempfile.mkdtemp(dir=folder)  # what one version of datasets caches, another would take
            own = os.environ | {"HF_HOME": place}
            done = subprocess.run(words, cwd=place, env=own, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{python} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
                return 1
            print(f"| {' | '.join(json.loads(done.stdout.splitlines()[-1]))} |", flush=True)
    return 0


def our_rows(run: Path, model: Path) -> list[dict[str, list[int]]]:
    """What stage=sft makes of each row: its ids, and the same where it learns, -100 elsewhere."""
    from vlm_agents.config import HardwareConfig, ModelConfig
    from vlm_agents.models import load_agent
    from vlm_agents.stages.sft_data import Chats

    agent = load_agent(ModelConfig("any", path=str(model)), HardwareConfig("cpu"))
    chats = Chats(run / "train.parquet", agent.renderer)
    made = []
    for index in range(len(chats)):
        row = chats[index]
        ((start, end),) = row.spans
        made.append({"ids": row.input_ids.tolist(), "labels": [-100] * start + row.input_ids[start:end].tolist()})
    return made


# ---- in the other environment ----------------------------------------------------------------------------------------
def compare(run: Path, model: Path, ours: list[dict[str, list[int]]]) -> list[str]:
    """A line of the table."""
    versions = [installed(name) for name in SHOWN]
    theirs, losses = llamafactory(run, model) if versions[1] else trl(run, model)
    versions[0] = "" if versions[1] else versions[0]  # LLaMA-Factory has one of its own
    assert len(theirs) == len(ours), f"{len(theirs)} rows of {len(ours)}"
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    nearly = [same or a == without_line_end(b) for same, a, b in zip(equal, ours, theirs, strict=True)]
    steps = ", ".join(f"{loss:.4f}" for loss in losses)
    return [*versions, str(len(ours)), f"{sum(equal)}", f"{sum(nearly)}", steps]


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def without_line_end(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """The row less its last token, where that is learned too."""
    return {name: ids[:-1] for name, ids in row.items()} if row["labels"][-1] != -100 else row


def trl(run: Path, model: Path) -> tuple[list[dict[str, list[int]]], list[float]]:
    from datasets import load_dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(model),
        SFTConfig("trl", max_length=None, **TRAINING),
        train_dataset=load_dataset(str(run), "trl", cache_dir="cache")["train"],
        processing_class=AutoProcessor.from_pretrained(model),
    )
    theirs = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        theirs.append({"ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()})
    trainer.train()
    return theirs, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def llamafactory(run: Path, model: Path) -> tuple[list[dict[str, list[int]]], list[float]]:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from llamafactory.train.tuner import run_exp

    settings = TRAINING | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(model),
        "finetuning_type": "full",
        "dataset": "train",
        "dataset_dir": str(run),
        "template": "qwen2_vl",
        "default_system": "",  # as the tiny models' chat templates have it; those of Qwen add one, as `qwen2_vl` does
        "mask_history": True,  # a row is there for its last turn alone
        "cutoff_len": 4096,
        "output_dir": "llamafactory",
        "logging_strategy": "steps",
    }
    model_arguments, data_arguments, training_arguments, *_ = get_train_args(dict(settings))
    module = load_tokenizer(model_arguments)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_arguments)
    data = get_dataset(template, model_arguments, data_arguments, training_arguments, stage="sft", **module)
    theirs = [{"ids": row["input_ids"], "labels": row["labels"]} for row in data["train_dataset"]]
    run_exp(dict(settings))
    log = json.loads(Path("llamafactory/trainer_state.json").read_text())["log_history"]
    return theirs, [line["loss"] for line in log if "loss" in line]


if __name__ == "__main__":
    sys.exit(main())
