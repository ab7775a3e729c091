"""Sweeps side by side on this machine, and what a dry run tells."""

from pathlib import Path

import pytest

WORDS = ["stage=eval", "stage.policy=random", "env=echo", "stage.episodes=2", "stage.baselines=false", "name=a"]
WORDS += ["tracking=jsonl", "hardware.threads=1"]


def test_jobs_run_in_processes_and_one_that_fails_is_told(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    # there is no env of the second's id, which its own process finds
    assert cli(*WORDS, "-m", "hydra/launcher=local", "env.id=vlm_agents/Echo-v0,Nowhere-v9", "seed=0") == 2
    said = capsys.readouterr()
    sweep = tmp_path / "multirun/a/eval"
    assert (sweep / "0/DONE").exists()
    assert f"job 0 begins: env.id=vlm_agents/Echo-v0; {Path('multirun/a/eval/logs/0.log')}" in said.out
    assert said.out.count("finished") == 1
    assert "error: job 1: " in said.err
    assert "1 of 2 jobs of multirun/a/eval failed" in said.err
    assert (sweep / "logs/0.log").read_text().count("eval finished in") == 1


def test_a_dry_run_makes_nothing(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    slurm = ["-m", "seed=0,1,2", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hardware=ddp"]
    assert cli(*WORDS, *slurm, "hydra.launcher.mem_gb=64", "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.startswith("3 jobs of stage=eval in multirun/a/eval\n#!/bin/bash")
    for line in ("array=0-2%3", "partition=gpu", "gpus-per-node=8", "mem=64GB", "nodes=1", "requeue"):
        assert f"#SBATCH --{line}\n" in said
    assert not list(tmp_path.iterdir())
    assert cli("stage=ppo", "env=echo", "name=a", "--dry-run") == 0
    assert "memory of one, as stage=doctor expects it: 0." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_a_slurm_a_sweep_leaves_nothing(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cli(*WORDS, "-m", "seed=0,1", "hydra/launcher=slurm") == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
