"""DeepSpeed's settings: ours, what is given beside them, and what is told of those that are wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_agents.config import AlgoConfig, HardwareConfig, PpoConfig
from vlm_agents.errors import ConfigError
from vlm_agents.learn.zero_settings import OURS, zero_config

GROUPS = {"algo": AlgoConfig, "hardware": HardwareConfig, "stage": PpoConfig}


@pytest.mark.parametrize("setting", sorted({word for words in OURS.values() for word in words.split(" and ")}))
def test_settings_that_are_named_instead_exist(setting: str) -> None:
    group, name = setting.split(".")
    assert name in GROUPS[group].__dataclass_fields__


def test_a_wrong_setting_is_told_before_anything_is_begun(cli: Callable[..., int], capsys: Any) -> None:
    words = ("stage=ppo", "env=echo", "hardware.processes=2", "hardware.zero=2", "tracking=jsonl")
    assert cli(*words, "hardware.deepspeed.zero_optimization.overlap_com=true") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "zero_optimization.overlap_com: DeepSpeed knows no such setting. Did you mean 'overlap_comm'?" in told
    assert not list(Path().iterdir())  # of an empty folder


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"train_batch_size": 8}, "train_batch_size is ours to set: see algo.minibatch_turns"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is ours to set: see hardware.zero"),
        ({"bf16": {"enabled": True}}, "bf16 is ours to set: see hardware.dtype"),
        ({"zero_optimisation": {}}, "zero_optimisation: DeepSpeed knows no such setting. Did you mean 'zero_opt"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com: .* Did you mean 'overlap_comm'"),
        ({"zero_optimization": {"offload_optimizer": {"devic": "cpu"}}}, "offload_optimizer.devic: DeepSpeed knows no"),
        ({"zero_optimization": {"overlap_comm": "perhaps"}}, "zero_optimization.overlap_comm=perhaps: .*boolean"),
        ({"zero_optimization": 3}, "is refused by DeepSpeed"),
        ({"communication_data_type": "fp33"}, "is refused by DeepSpeed: Invalid communication_data_type"),
    ],
)
def test_wrong_settings_are_told_in_a_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"hardware\.deepspeed.*{told}") as error:
        zero_config(HardwareConfig("cpu", zero=2, deepspeed=given), 1.0, 100)
    assert "\n" not in str(error.value)


def test_settings_are_merged_into_ours() -> None:
    given = {"zero_optimization": {"overlap_comm": True, "offload_param": {"pin_memory": True}}, "dump_state": False}
    config = zero_config(HardwareConfig("cpu", zero=3, offload="all", deepspeed=given), 0.5, 100)
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": True},
    }
    assert (config["gradient_clipping"], config["dump_state"]) == (0.5, False)
