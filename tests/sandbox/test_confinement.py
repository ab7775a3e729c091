"""The parts of the confinement that can be looked at without a sandbox."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_agents.errors import ConfigError
from vlm_agents.sandbox import seccomp, syscalls
from vlm_agents.sandbox.settings import SandboxSettings
from vlm_agents.sandbox.zygote import remove, within_limits

ALLOW, EPERM, PRETEND, KILL = 0x7FFF0000, 0x00050001, 0x00050000, 0x80000000
X86_64, AARCH64 = 0xC000003E, 0xC00000B7


def verdict(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a filter says of a call: the three kinds of operation that it has, carried out."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    ops = list(struct.iter_unpack("=HBBI", program))
    place = word = 0
    while True:
        code, true, false, value = ops[place]
        place += 1
        if code == 0x20:
            (word,) = struct.unpack_from("=I", data, value)
        elif code == 0x15:
            place += true if word == value else false
        else:
            assert code == 0x06
            return value


@pytest.mark.parametrize(
    ("machine", "architecture", "calls"),
    [
        # read, execve, clone, socket, chmod or fchmod; kill, fcntl, tgkill, prlimit64
        ("x86_64", X86_64, ((0, 59, 56, 41, 90), (62, 72, 234, 302))),
        ("aarch64", AARCH64, ((63, 221, 220, 198, 52), (129, 25, 131, 261))),
    ],
)
def test_the_filter_lets_through_what_it_should(
    monkeypatch: pytest.MonkeyPatch, machine: str, architecture: int, calls: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    monkeypatch.setattr(syscalls, "MACHINE", machine)
    monkeypatch.setattr(syscalls, "AUDIT_ARCH", architecture)
    program = seccomp.program(77)
    (read, execve, clone, socket, chmod), (kill, fcntl, tgkill, prlimit) = calls
    said = [verdict(program, architecture, number) for number in (read, execve, clone, socket, chmod)]
    assert said == [ALLOW, EPERM, EPERM, EPERM, PRETEND]
    assert [verdict(program, architecture, kill, pid, 9) for pid in (77, 78, 0, 2**32 - 1)] == [ALLOW] + [EPERM] * 3
    assert verdict(program, architecture, kill, 77 + (5 << 32), 9) == ALLOW  # the kernel reads 32 bits: 77
    assert [verdict(program, architecture, fcntl, 3, command) for command in (1, 8, 10, 15, 1030)] == [
        *(ALLOW, EPERM, EPERM, EPERM, ALLOW)
    ]
    assert [verdict(program, architecture, tgkill, pid, pid, 9) for pid in (77, 78)] == [ALLOW, EPERM]
    assert [verdict(program, architecture, prlimit, pid) for pid in (0, 77)] == [ALLOW, EPERM]
    assert verdict(program, architecture, 9999) == EPERM
    assert verdict(program, 0x40000003, read) == KILL  # i386
    assert verdict(program, architecture, read | 0x40000000) == EPERM  # x32
    assert len(program) // 8 < 4096  # the kernel's bound


def test_a_call_of_an_unknown_machine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "AUDIT_ARCH", None)
    with pytest.raises(OSError, match="are not known"):
        syscalls.call("unshare", 0)


def test_the_inner_modules_need_nothing_of_ours_but_themselves() -> None:
    """They are imported where only they can be read."""
    code = "import sys, vlm_agents.sandbox.zygote; print(*sorted(m for m in sys.modules if m.startswith('vlm_agents')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    inner = "child confinement landlock notebook seccomp settings syscalls wire zygote".split()  # noqa: SIM905
    assert done.stdout.split() == ["vlm_agents", "vlm_agents.errors", "vlm_agents.sandbox"] + [
        f"vlm_agents.sandbox.{name}" for name in inner
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"require": "isolatd"}, "Did you mean 'isolated'?"),
        ({"turn_s": 0.0}, "sandbox.turn_s=0.0 must be"),
        ({"turn_s": float("nan")}, "sandbox.turn_s=nan must be"),
        ({"memory_mib": 1}, "sandbox.memory_mib=1 must be a whole number, at least 64"),
        ({"pictures": -1}, "sandbox.pictures=-1 must be"),
        ({"tmp_files": 2.5}, "sandbox.tmp_files=2.5 must be a whole number"),
    ],
)
def test_settings_are_checked(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        SandboxSettings(**wrong)
    assert said in str(raised.value)


def deep(folder: Path, levels: int) -> None:
    here = os.getcwd()
    os.chdir(folder)
    for _ in range(levels):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir(here)


def test_a_folder_is_removed_however_deep_it_is(tmp_path: Path) -> None:
    folder, kept = tmp_path / "private", tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (folder / "closed").mkdir(parents=True)
    (folder / "closed" / "file").touch()
    (folder / "beside").mkdir()
    (folder / "link").symlink_to(kept)
    (folder / "closed").chmod(0)
    deep(folder, 30)  # 6000 characters: more than a path may have
    assert not within_limits(str(folder), SandboxSettings(tmp_files=5000))
    remove(str(folder))
    assert list(tmp_path.iterdir()) == [kept]
    assert list(kept.iterdir()) == [kept / "file"]


def test_a_folder_is_held_to_its_limits(tmp_path: Path) -> None:
    settings = SandboxSettings(tmp_mib=1, tmp_files=3)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(1_000_000))
    assert within_limits(str(tmp_path), settings)
    (tmp_path / "a" / "c").write_bytes(bytes(100_000))  # 1.1 MB are more than 1 MiB
    assert not within_limits(str(tmp_path), settings)
    (tmp_path / "a" / "c").write_bytes(b"")
    assert within_limits(str(tmp_path), settings)
    (tmp_path / "d").touch()  # the fourth
    assert not within_limits(str(tmp_path), settings)
