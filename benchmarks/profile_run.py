"""Where an iteration's time goes, operation by operation: `python benchmarks/profile_run.py [SETTING=VALUE ...]`.

Plays and learns an iteration of stage=ppo, eight episodes in eight envs of MiniGrid unless the settings say otherwise,
then another that torch.profiler records into outputs/profile.json.gz, which https://ui.perfetto.dev shows. Printed is
what took longest by itself.
"""

import sys
from pathlib import Path

import torch
from speed import composed, ours
from torch.profiler import ProfilerActivity, profile

TRACE = Path("outputs/profile.json.gz")
START = ("stage=ppo", "env=minigrid", "name=profile", "stage.episodes=8", "stage.num_envs=8", "algo.value_warmup=0")


def main() -> None:
    cfg = composed(*START, *sys.argv[1:])
    torch.set_num_threads(cfg.hardware.threads or 2)
    gpu = cfg.hardware.device == "cuda"
    ours(cfg)  # warms up
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        measured = ours(cfg)
    TRACE.parent.mkdir(exist_ok=True)
    found.export_chrome_trace(str(TRACE))
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40))
    print(f"{measured.steps} env steps: rollout {measured.rollout:.2f} s, update {measured.update:.2f} s; {TRACE}")


if __name__ == "__main__":
    main()
