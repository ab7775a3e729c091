"""Which versions a run is made with. Reads what pip installed, imports none of it."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("vlm-agents", "torch", "transformers")


def versions() -> str:
    """One line for each of ours, torch, transformers and Python."""
    return "\n".join([*(f"{name} {installed(name)}" for name in PACKAGES), f"python {platform.python_version()}"])


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "isn't installed"
