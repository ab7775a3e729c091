"""The limits of a sandbox, and what it may be without."""

from dataclasses import dataclass
from typing import Literal, get_args

from vlm_agents.errors import ConfigError, did_you_mean

Isolation = Literal["bubblewrap", "landlock", "rlimits"]  # from the strongest down
Require = Literal["isolated", "bubblewrap", "landlock", "rlimits", "any"]

# of the settings that are whole numbers
LEAST = {"cpu_s": 1, "memory_mib": 64, "file_mib": 1, "tmp_mib": 1, "tmp_files": 1, "output_chars": 100}
LEAST |= {"pictures": 0, "picture_pixels": 1024}
MEANINGS = {
    "require": "what must keep it in: isolated, bubblewrap or landlock; any, rlimits alone will do; else this one",
    "turn_s": "seconds of a turn; longer code is ended",
    "cpu_s": "seconds of CPU time of all turns together",
    "memory_mib": "MiB of memory beyond what the libraries take",
    "file_mib": "MiB of one file",
    "tmp_mib": "MiB of all files of the private folder",
    "tmp_files": "files and folders in it",
    "output_chars": "characters of text that a turn gives; what is beyond is left out",
    "pictures": "pictures that a turn gives; what is beyond is left out",
    "picture_pixels": "pixels of a picture that comes back; a larger one is scaled down",
    "start_s": "seconds until the libraries are imported",
}


@dataclass(frozen=True)
class SandboxSettings:
    """Limits of each session, as MEANINGS says. A session is one process with one thread, and can't start another."""

    require: Require = "isolated"
    turn_s: float = 10.0
    cpu_s: int = 120
    memory_mib: int = 1024
    file_mib: int = 16
    tmp_mib: int = 64
    tmp_files: int = 1000
    output_chars: int = 20_000
    pictures: int = 8
    picture_pixels: int = 4_000_000
    start_s: float = 120.0

    def __post_init__(self) -> None:
        choices = get_args(Require)
        if self.require not in choices:
            raise ConfigError(
                f"env.sandbox.require={self.require} is not one of {', '.join(choices)}."
                f"{did_you_mean(str(self.require), choices)}"
            )
        for name in ("turn_s", "start_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"sandbox.{name}={getattr(self, name)} must be a number of seconds above 0")
        for name, low in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"sandbox.{name}={value} must be a whole number, at least {low}")

    @property
    def accepted(self) -> tuple[Isolation, ...]:
        """The kinds of isolation that will do, from the strongest down."""
        if self.require == "isolated":
            return ("bubblewrap", "landlock")
        return ("bubblewrap", "landlock", "rlimits") if self.require == "any" else (self.require,)
