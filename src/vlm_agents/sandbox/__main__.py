"""python -m vlm_agents.sandbox PROGRAM.py: runs a program as one turn and prints what came of it, as JSON."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from vlm_agents.errors import VlmAgentsError
from vlm_agents.sandbox.session import Sandbox
from vlm_agents.sandbox.settings import MEANINGS, SandboxSettings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_agents.sandbox", description=__doc__)
    parser.add_argument("program", type=Path, help="a file of Python")
    for field in fields(SandboxSettings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{MEANINGS[field.name]}: %(default)s",
        )
    asked = vars(parser.parse_args())
    program = asked.pop("program")
    try:
        code = program.read_text()
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: can't read {program} ({error}): name a file of Python in UTF-8", file=sys.stderr)
        return 2
    try:
        with Sandbox(SandboxSettings(**asked)) as sandbox, sandbox.open() as session:
            result = session.run(code)
    except (VlmAgentsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = {"text": result.text, "images": len(result.images), "error": result.error, "isolated": result.isolated}
    print(json.dumps(told | {"seconds": round(result.seconds, 4)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
