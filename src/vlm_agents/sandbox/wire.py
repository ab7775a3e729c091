"""Messages between a sandbox and who uses it: four bytes of length, a JSON header of that length, then raw bytes.

Nothing is unpickled and no picture is decoded. How many raw bytes follow, the reader works out from the header, after
it held its numbers against its limits: nothing is allocated on another's word.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

_LENGTH = 4  # bytes, big-endian


class BrokenMessage(Exception):
    """What came is no message."""


def packed(header: dict[str, Any], blobs: Iterable[bytes] = ()) -> list[bytes]:
    """A message in the pieces in which it is to be written."""
    text = json.dumps(header).encode()
    return [len(text).to_bytes(_LENGTH, "big") + text, *blobs]


def filled(count: int, receive: Callable[[memoryview], int]) -> bytearray:
    """So many bytes, as `receive` puts them into what it is given, and says how many; EOFError where it says none."""
    found = bytearray(count)
    view, done = memoryview(found), 0
    while done < count:
        got = receive(view[done:])
        if not got:
            raise EOFError
        done += got
    return found


def header(read: Callable[[int], bytes | bytearray], most_bytes: int) -> dict[str, Any]:
    """The header of the next message, or BrokenMessage; `read` gives as many bytes as it is asked for, or raises."""
    length = int.from_bytes(read(_LENGTH), "big")
    if length > most_bytes:
        raise BrokenMessage(f"a header of {length} bytes, more than {most_bytes}")
    try:
        found = json.loads(bytes(read(length)))
    except (ValueError, RecursionError) as error:
        raise BrokenMessage(f"a header that is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BrokenMessage("a header that is no object")
    return found
