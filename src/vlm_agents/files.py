"""Writing files so that what was there before survives a crash and a full disk. Knows nothing of what is written."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from vlm_agents.errors import DataError

OUR_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
MARKED = 1 << 16  # bytes of a line's end that tell it from the others
TAIL, REMEMBERED = 1 << 20, 8  # bytes, and lines in them, of a file's end by which it is found again
REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "You may not write there: run in another folder"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "A file or a dead link is where a folder should be: move it away"),
    errno.EISDIR: "A folder is where a file should be: move it away",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "A link there leads to itself: remove it",
}


def hold(file: IO[bytes]) -> bool:
    """Does this process hold the file's lock now? It has it until the file is closed; another process's stays its own.

    Unlike flock's, it isn't inherited by forked env workers. A file that was removed since it was opened is no lock any
    more."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, PermissionError, FileNotFoundError):  # POSIX has either of two for another's lock
        return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block (full disk, no permission) into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "Make room there, then give the same command again")
        raise DataError(f"can't write {path}: {error.strerror or error}. {remedy}") from error


def temporary_of(path: Path) -> Path:
    """Where this process makes what is to replace `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep_temporaries(folder: Path) -> None:
    """Remove what processes that were killed had begun to write into `folder`, where nobody else writes now."""
    for path in folder.glob(".*.tmp"):
        if OUR_TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def atomic_write(path: Path, content: bytes | str, durable: bool = True, mode: int = 0o666) -> None:
    """Replace `path` by `content` in one step: after a crash it holds the old content or the new, never a part.

    After a crash of the whole machine too, where `durable`: that waits for the disk, some milliseconds. `mode`, less
    what the umask takes, is that of the new file.
    """
    temporary = temporary_of(path)
    with writing(path):
        try:
            with open(temporary, "wb", opener=partial(os.open, mode=mode)) as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def inside(folder: Path, name: str) -> Path | None:
    """The path of that name in the folder, from the root; None for one that leads out of it. Links aren't resolved: one
    in the folder may lead out, as whoever made it wanted."""
    folder = Path(os.path.abspath(folder))
    path = Path(os.path.abspath(folder / name))
    return path if path.is_relative_to(folder) else None


def append_line(path: Path, line: str) -> None:
    """Append one line, whole or not at all."""
    data = line.encode() + b"\n"
    with writing(path), open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def sync(path: Path) -> None:
    """Have the content of a file, or the entries of a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mark_of(line: bytes) -> str:
    """What a line, with or without its end, is known by."""
    return hashlib.blake2b(line.rstrip(b"\n")[-MARKED:], digest_size=16).hexdigest()


def last_lines(path: Path, end: int) -> list[str]:
    """The marks of the last lines before byte `end`, newest first: as many as a MiB holds, eight at most."""
    start = max(0, end - TAIL)
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read(end - start).splitlines()
    return [mark_of(line) for line in reversed(lines[1 if start and len(lines) > 1 else 0 :])][:REMEMBERED]


def cut_after(path: Path, end: int, marks: Sequence[str]) -> bool:
    """Cut an append-only file behind the line that ended at byte `end`, and is known by the first of `marks`; whether
    it was found.

    Somebody may have removed or changed lines: then it is looked for, and where it is gone itself, those before it,
    whose marks are the others. Where none is left, the whole lines up to `end` are kept, be they newer or not.
    """
    size = path.stat().st_size
    if end <= size and (end == 0 or not marks or last_lines(path, end)[:1] == [marks[0]]):
        os.truncate(path, end)
        return True
    at, whole, places = 0, 0, dict[str, int]()
    with open(path, "rb") as file:
        for line in file:
            at += len(line)
            if line.endswith(b"\n"):
                places[mark_of(line)] = at
                whole = at if at <= end else whole
    os.truncate(path, next((places[mark] for mark in marks if mark in places), whole))
    return bool(marks) and marks[0] in places
