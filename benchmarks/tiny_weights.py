"""Makes the shipped weights of the tiny model anew, in about 90 minutes: `python benchmarks/tiny_weights.py`.

Experts are cloned on MiniGrid and the card games, then players of DoorKey whose hand slips, so that PPO has something
to do; what each step is for is in models/tiny_weights/README.md. Runs are kept under outputs/tiny_*, and one that is
finished isn't done again. `--dry-run` prints the commands alone.
"""

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src/vlm_agents/models/tiny_weights"
SKELETON = "outputs/tiny_skeleton"  # random weights, and a tokenizer that knows the chats of the first step

ROOMS = ["DoorKey-5x5", "Empty-Random-5x5", "Empty-Random-6x6"]
GAMES = ["number_line", "blackjack", "ezpoints", "points24"]
SOLVABLE = "env=points24 env.solvable_only=true stage.noise=0"

# Of each collect run, what is played: DoorKey-6x6 unless an env is named.
PLAYED = {
    "DoorKey-6x6": "env.id=MiniGrid-DoorKey-6x6-v0 env.max_steps=null stage.episodes=2500",
    **{room: f"env.id=MiniGrid-{room}-v0 env.max_steps=null stage.episodes=250" for room in ROOMS},
    "number_line": "env=number_line stage.episodes=200",
    "blackjack": "env=blackjack stage.episodes=1500 stage.noise=0.1",
    "ezpoints": "env=ezpoints stage.episodes=400 stage.noise=0",
    "points24": f"{SOLVABLE} stage.episodes=1500",
    "slips": "seed=1 stage.episodes=800 stage.noise=0.6",
    "slips2": "seed=2 stage.episodes=1000 stage.noise=0.4",
    "number_line2": "seed=2 env=number_line stage.episodes=600",
    "blackjack2": "seed=2 env=blackjack stage.episodes=3000 stage.noise=0.1",
    "ezpoints2": "seed=2 env=ezpoints stage.episodes=600 stage.noise=0",
    "points24_2": f"seed=2 {SOLVABLE} stage.episodes=2000",
    "keys": "seed=3 env.max_steps=8 stage.episodes=2500 stage.noise=0.9",
    "points24_3": f"seed=3 {SOLVABLE} stage.episodes=500",
}
# Of each preprocess run, the collect runs that it takes, and how it labels.
CHATS = {
    "cloned": (["DoorKey-6x6", *ROOMS, *GAMES], "expert"),
    "slips": (["slips", *GAMES], "played"),
    "slips2": (["slips2", *ROOMS, "number_line2", "blackjack2", "ezpoints2", "points24_2"], "played"),
    "keys": (["keys", "number_line2", "blackjack", "ezpoints2", "points24_3"], "expert"),
}
# Each sft run goes on from the one before.
CLONED = {
    "cloned": "",
    "slips": "stage.init=outputs/tiny_cloned/sft",
    "slips2": "stage.init=outputs/tiny_slips/sft",
    "keys": "stage.init=outputs/tiny_slips2/sft",
    "rough": "stage.init=outputs/tiny_keys/sft stage.data=outputs/tiny_slips/preprocess "
    "stage.epochs=0.15 stage.lr=3e-4",
}


def commands() -> list[str]:
    """What follows `python -m`, in order."""

    def agents(stage: str, run: str, words: str) -> str:
        return f"vlm_agents tracking=jsonl stage={stage} name=tiny_{run} {words}".strip()

    def chats(runs: list[str], label: str) -> str:
        folders = ",".join(f"outputs/tiny_{run}/collect" for run in runs)
        return f"stage.data=[{folders}] stage.success_only=false stage.label={label}"

    return [
        *(agents("collect", run, words) for run, words in PLAYED.items()),
        *(agents("preprocess", run, chats(*taken)) for run, taken in CHATS.items()),
        f"vlm_agents.models.tiny {SKELETON} outputs/tiny_cloned/preprocess/train.parquet",
        *(agents("sft", run, f"model.path={SKELETON} stage.batch_size=16 {words}") for run, words in CLONED.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    dry = parser.parse_args().dry_run
    for command in commands():
        print(f"python -m {command}", flush=True)
        if not dry:
            subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=ROOT, check=True)
    if not dry:
        made = ROOT / "outputs/tiny_rough/sft/model"
        shutil.copytree(made, SHIPPED, ignore=shutil.ignore_patterns("README.md"), dirs_exist_ok=True)
        print(hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
