"""benchmarks/results.json: what each benchmark of `make bench` measured, beside what was aimed at."""

import json
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
GOALS = {
    "rollout_vs_serial": 30.0,
    "iteration_vs_serial": 25.0,
    "rollout_vs_trl": 5.0,
    "iteration_vs_trl": 5.0,
    "rollout_vs_generate": 2.5,
}


def write(values: Mapping[str, float], unit: str = "times") -> None:
    """Beside what others wrote."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {name: {"value": round(its, 2), "goal": GOALS.get(name), "unit": unit} for name, its in values.items()}
    RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")
