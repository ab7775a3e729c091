import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_agents.sandbox import wire


def reader(data: bytes):
    stream = io.BytesIO(data)

    def read(count: int) -> bytes:
        found = stream.read(count)
        if len(found) < count:
            raise EOFError
        return found

    return read


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5)


@given(st.dictionaries(st.text(), JSON), st.lists(st.binary()))
def test_a_header_comes_as_it_went_and_the_rest_is_left(header: dict, blobs: list[bytes]) -> None:
    read = reader(b"".join(wire.packed(header, blobs)))
    assert wire.header(read, 10**6) == header
    rest = b"".join(blobs)
    assert read(len(rest)) == rest


@given(st.binary(max_size=100))
def test_rubbish_is_no_header(data: bytes) -> None:
    try:
        found = wire.header(reader(data), 50)
    except (wire.BrokenMessage, EOFError):
        return
    assert isinstance(found, dict)


@pytest.mark.parametrize("text", [b"[]", b"1", b"{", b"[" * 100_000, b"1" * 10_000, b"\xff", b'{"a": \xff}'])
def test_what_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(wire.BrokenMessage):
        wire.header(reader(len(text).to_bytes(4, "big") + text), 10**6)


def test_a_long_header_is_refused_before_it_is_read() -> None:
    asked = []

    def read(count: int) -> bytes:
        asked.append(count)
        return (2**32 - 1).to_bytes(4, "big")

    with pytest.raises(wire.BrokenMessage, match="more than 100"):
        wire.header(read, 100)
    assert asked == [4]


def test_text_of_any_kind_is_plain_ascii_on_the_way() -> None:
    (piece,) = wire.packed({"text": "größe \ud83d \x00"})
    assert json.loads(piece[4:].decode("ascii")) == {"text": "größe \ud83d \x00"}
