"""Does a run that is killed end like one that isn't? Kills small runs at random moments and compares what they leave.

    python benchmarks/kill_drill.py --kills 300 --jobs 2

Each variant is run once as a plain command. Then it is run again and again under other names, killed by SIGKILL up to
three times at moments drawn over its length, and continued to its end. Every file of the two run directories must be
equal, but for the clock's: names and paths in the settings, seconds, `time/` and `speed/` metrics. In the variant
`workers` an env's process is killed and not the run, which must then end; its episodes are others.
All runs but the plain ones are forked from a process that has imported everything: that saves seconds a kill.
tests/test_invariants.py has a few such kills, at chosen moments, and compares by `differences` too.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml

# Settings of all variants, which may have others.
COMMON = ["env=echo", "prompt=action_only", "prompt.max_reply_tokens=4", "hardware.threads=1", "tracking=jsonl"]
# What the variants start from: made once, never killed.
MADE = {
    "collect": "stage=collect stage.episodes=96",
    "preprocess": "stage=preprocess stage.success_only=false stage.val_fraction=0.2",
    "sft": "stage=sft stage.epochs=2 stage.batch_size=16",
    "adapter": "stage=sft stage.data=outputs/made/preprocess stage.batch_size=16 model/lora=adapter",
}
SFT = "stage=sft stage.data=outputs/made/preprocess stage.batch_size=8 stage.epochs=2.5 stage.checkpoint_every=7"
PPO = "stage=ppo stage.iterations=4 stage.episodes=8 stage.num_envs=4 stage.eval_episodes=6 env.turns=2 algo.epochs=1"
VARIANTS = {
    "collect-expert": "stage=collect stage.episodes=300 stage.num_envs=8",
    "collect-model": "stage=collect stage.policy=model stage.episodes=150 stage.num_envs=8 stage.init=outputs/made/sft",
    "preprocess": "stage=preprocess stage.data=[outputs/made/collect] stage.success_only=false stage.val_fraction=0.2",
    "sft": SFT,
    "sft-lora": f"{SFT} model/lora=adapter",
    "eval": "stage=eval stage.init=outputs/made/sft stage.episodes=40 stage.num_envs=8",
    "merge": "stage=merge stage.init=outputs/made_adapter/sft",
    "ppo": f"{PPO} stage.init=outputs/made/sft",
    "ppo-lora": f"{PPO} model/lora=adapter algo.kl_coef=0.1",
    "ppo-novelty": f"{PPO} model/lora=adapter algo.novelty.coef=0.1",
    "ppo-temperature": f"{PPO} model/temperature_head=learned algo.turn_entropy_coef=0.1 stage.eval_every=2",
    "ppo-whole-chat": f"{PPO} prompt.history=full stage.checkpoint_every=2 stage.keep_checkpoints=1",
    "ppo-budget": f"{PPO} prompt.history=full prompt.max_prompt_tokens=150",
    "ppo-groups": f"{PPO} algo=dapo algo.group_size=2 algo.count_coef=0.1 env.turns=1 stage.eval_every=2",
    "ppo-shaped": f"{PPO} algo=gigpo algo.group_size=4 algo.filters=[reward,rank] algo.oversample=2 model/lora=adapter "
    "algo.progress_coef=0.3 algo.utility_share=0.5 algo.kl_reward_coef=0.05 stage.checkpoint_every=2",
    "ppo-steps": f"{PPO} algo=bilevel_ppo stage.env_steps=40 stage.stop_on_collapse=true stage.checkpoint_every=3",
    "ppo-mlflow": f"{PPO} tracking=mlflow",
    "workers": f"{PPO} env.workers=true",
}
# Reads a line of JSON: words, and after how many seconds to kill the run, or one of its env workers; writes status,
# seconds, and whether something was killed.
SERVER = """
import json, os, random, signal, sys, time
import mlflow
import vlm_agents.models.action_predictor, vlm_agents.models.lora
import vlm_agents.stages.collect, vlm_agents.stages.eval, vlm_agents.stages.merge, vlm_agents.stages.ppo
import vlm_agents.stages.preprocess, vlm_agents.stages.sft
from vlm_agents.__main__ import main

def children(pid):
    found = open(f"/proc/{pid}/task/{pid}/children").read().split()
    return [int(word) for word in found]

def kill(pid, workers):
    victims = [worker for server in children(pid) for worker in children(server)] if workers else [pid]
    if victims:
        os.kill(random.choice(victims), signal.SIGKILL)
    return bool(victims)

for line in sys.stdin:
    order = json.loads(line)
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["vlm-agents", *order["words"]]
        os._exit(main())
    left, killed = order["kill_after"], False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if left is not None and time.monotonic() - start >= left:
            left, killed = None, kill(pid, order["workers"])
        time.sleep(0.002)
    answer = [os.waitstatus_to_exitcode(status), time.monotonic() - start, killed]
    print(json.dumps(answer), flush=True)
"""


class Server:
    """Runs command lines in `folder`, one at a time, each in a fork of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", SERVER]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def run(self, words: Sequence[str], kill_after: float | None = None, workers: bool = False) -> list[Any]:
        """Exit status, seconds, and whether the run, or else a worker of it, was killed after that many seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"words": list(words), "kill_after": kill_after, "workers": workers}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline}


@dataclass
class Tally:
    """What the kills of one variant did."""

    kills: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)  # exit status and name of runs that could not be continued
    differing: Counter[str] = field(default_factory=Counter)
    temporaries: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        return not (self.lost or self.differing or self.temporaries)


def drill(server: Server, folder: Path, variant: str, kills: int, seed: int) -> Tally:
    """Run `variant` undisturbed, then kill it `kills` times."""
    words = list({word.split("=")[0]: word for word in [*COMMON, *VARIANTS[variant].split()]}.values())  # the last wins
    stage = VARIANTS[variant].split()[0].removeprefix("stage=")
    rng, tally, workers, seconds = random.Random(seed), Tally(), variant == "workers", 0.0
    plain(folder, [*words, f"name={variant}_0"])
    unbroken = folder / f"outputs/{variant}_0/{stage}"
    while tally.kills < kills or not tally.runs:
        tally.runs += 1
        name = f"{variant}_{tally.runs}"
        # the first is not killed: it says how long the variant takes
        for _ in [] if tally.runs == 1 else range(rng.randint(1, 3)):
            status, _seconds, killed = server.run([*words, f"name={name}"], rng.uniform(0, seconds), workers)
            tally.kills += killed
            if status != -signal.SIGKILL:
                break  # done before that, or lost
        status, took, _killed = server.run([*words, f"name={name}"])
        if tally.runs == 1:
            seconds = took
        if status:
            tally.lost.append(f"{name} ({status})")
        elif not workers:
            tally.differing.update(differences(unbroken, folder / f"outputs/{name}/{stage}"))
            tally.temporaries.update(path.name for path in (folder / f"outputs/{name}").rglob(".*"))
    return tally


def plain(folder: Path, words: Sequence[str]) -> None:
    """Run a command line in a process of its own; exit where it fails."""
    command = [sys.executable, "-m", "vlm_agents", *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")


def prepare(folder: Path) -> None:
    for name, line in MADE.items():
        plain(folder, [*line.split(), *COMMON, "name=made_adapter" if name == "adapter" else "name=made"])


# ---- what two run directories have in common -------------------------------------------------------------------------
def differences(unbroken: Path, killed: Path) -> Iterator[str]:
    """The files in which two run directories differ."""
    names = {path.relative_to(folder) for folder in (unbroken, killed) for path in folder.rglob("*") if path.is_file()}
    for name in sorted(names):
        one, other = unbroken / name, killed / name
        if not (one.is_file() and other.is_file()) or (
            one.read_bytes() != other.read_bytes() and not same(content(one), content(other))
        ):
            yield str(name)


def content(path: Path) -> Any:
    """What a file says, without the clock and the run's own name."""
    match path.name:
        case "mlflow_run_id" | "lock":
            return None
        case "config.yaml":
            return {
                key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in ("name", "run_dir")
            }
        case "overrides":
            return [line for line in path.read_text().splitlines() if not line.startswith(("name=", "run_dir="))]
        case "README.md":
            return re.sub(r" name=\S+`", "`", path.read_text())
        case "metrics.jsonl":
            return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        case "summary.json" | "state.json":
            return timeless(json.loads(path.read_text()))
        case "report.html":
            page, block = path.read_text().split('id="block">', 1)
            told = json.loads(block.split("</script>", 1)[0])
            for part in ("curves", "groups"):
                told[part] = [one for one in told[part] if not re.match("(time|speed)(/|$)", one["name"])]
            told["facts"] = [fact for fact in told["facts"] if fact[0] not in ("command", "time")]
            return page, told
        case _ if path.suffix in (".pt", ".pth"):
            return torch.load(path, weights_only=path.suffix == ".pt")  # made by this very script
    return path.read_bytes()


# The clock's figures, and what depends on how many digits they have.
CLOCKS = re.compile(r"time/.*|speed/.*|wall_seconds|seconds|training_seconds|offsets|last_lines|.*\.pt|.*\.pth")


def timeless(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: timeless(child) for key, child in node.items() if not CLOCKS.fullmatch(key)}
    return node


def same(one: Any, other: Any) -> bool:
    """Equal, bit for bit, whatever the order of keys."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "tobytes"):
        return one.tobytes() == other.tobytes()
    return one == other


def main() -> int:
    parser = argparse.ArgumentParser(description="Does a run that is killed end like one that isn't?")
    parser.add_argument("--kills", type=int, default=20, help="of each variant")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to run; kept. Default: a temporary one")
    parser.add_argument("variants", nargs="*", metavar="variant", help=f"{', '.join(VARIANTS)}; default: all")
    args = parser.parse_args()
    chosen = args.variants or list(VARIANTS)
    if unknown := set(chosen) - VARIANTS.keys():
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        servers: SimpleQueue[Server] = SimpleQueue()
        for _ in range(args.jobs):
            servers.put(Server(folder))

        def run(variant: str) -> bool:
            server = servers.get()
            start = time.monotonic()
            tally = drill(server, folder, variant, args.kills, args.seed)
            servers.put(server)
            print(
                f"{variant:<18}{tally.kills:>6} kills{tally.runs:>5} runs{len(tally.lost):>5} lost"
                f"{sum(tally.differing.values()):>5} files differ{sum(tally.temporaries.values()):>5} temporaries"
                f"{time.monotonic() - start:>7.0f} s",
                *(f"    lost: {name}" for name in tally.lost),
                *(f"    differs in {count}: {name}" for name, count in tally.differing.items()),
                *(f"    left over: {name}" for name in tally.temporaries),
                sep="\n",
                flush=True,
            )
            return tally.sound

        with ThreadPoolExecutor(args.jobs) as pool:
            sound = list(pool.map(run, chosen))
        while not servers.empty():
            servers.get().close()
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
