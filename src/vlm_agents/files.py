"""Writing files so that what was there before survives a crash and a full disk. Knows nothing of what is written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_agents.errors import DataError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block (full disk, no permission) into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"can't write {path}: {reason}. Make room there, then give the same command again") from error


def atomic_write(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Replace `path` by `content` in one step: after a crash it holds the old content or the new, never a part.

    After a crash of the whole machine too, where `durable`: that waits for the disk, some milliseconds.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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
