"""Pictures from outside: what a viewer shows, or one line that says why not."""

import io
import os
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_agents.errors import DataError
from vlm_agents.pictures import Picture, as_shown, read_picture

WHITE = (255, 255, 255)


def test_a_picture_is_what_it_shows():
    """Whatever its mode and its object; its key is what episodes name its file by, and must never change."""
    red = Picture(Image.new("RGB", (2, 1), "red"))
    assert red.key == "1aee68b0b41b970d"
    others = (Image.new("P", (2, 1)), Image.new("RGBA", (2, 1), (255, 0, 0, 255)))
    others[0].putpalette([255, 0, 0])
    assert {red, *map(Picture, others)} == {red}
    assert all(Picture(image).image.mode == "RGB" for image in others)
    unequal = (Image.new("RGB", (1, 2), "red"), Image.new("RGB", (2, 1), "blue"))
    assert red not in list(map(Picture, unequal))
    assert pickle.loads(pickle.dumps(red)) == red
    with pytest.raises(DataError, match="of mode F"):
        Picture(Image.new("F", (1, 1)))


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(depth: int, colour: int, row: bytes, width: int = 2, height: int = 1, clear: Sequence[int] = ()) -> bytes:
    """A PNG made by hand, of rows that are all alike; `clear` is the colour that its tRNS chunk makes transparent."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * min(height, 100)))
    transparent = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + transparent + body + chunk(b"IEND", b"")


def pixels(source: Path | bytes) -> list[tuple[int, ...]]:
    picture = read_picture(source)
    assert (picture.mode, picture.info) == ("RGB", {})
    return [tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()]


# ---- ordinary ones -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_an_ordinary_picture_is_what_pillow_decodes(kind: str):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    file = encoded(noise, kind)
    with Image.open(io.BytesIO(file)) as decoded:
        assert read_picture(file).tobytes() == decoded.convert("RGB").tobytes()
    assert as_shown(noise).tobytes() == noise.tobytes()


def test_cmyk_and_an_animation():
    red = Image.new("CMYK", (1, 1), (0, 255, 255, 0))  # in a JPEG its numbers are stored the other way round
    assert pixels(encoded(red, "JPEG")) == [(255, 0, 0)]
    frames = [Image.new("RGB", (1, 1), colour) for colour in ("red", "blue")]
    assert pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [(255, 0, 0)]


# ---- upright -------------------------------------------------------------------------------------------------------
UPRIGHT = {  # by EXIF's orientation: where its first row and column are to be seen
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_picture_is_upright_and_not_turned_twice(kind: str, orientation: int):
    stored = np.zeros((16, 32), dtype=np.uint8)
    stored[:8, :8] = 255  # a corner, so that no two orientations look alike
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture(encoded(Image.fromarray(stored), kind, exif=exif))
    assert (np.asarray(picture.convert("L")) == UPRIGHT[orientation](stored)).all()
    assert not picture.getexif()
    assert read_picture(encoded(picture)).tobytes() == picture.tobytes()


def test_exif_that_can_not_be_read_turns_nothing():
    file = encoded(Image.new("RGB", (4, 2)), "JPEG", exif=b"Exif\0\0no such thing")
    assert read_picture(file).size == (4, 2)


# ---- alpha over white ----------------------------------------------------------------------------------------------
BLACK_HALF_CLEAR = Image.new("RGBA", (1, 1), (0, 0, 0, 128))


@pytest.mark.parametrize("way", [["RGBA"], ["LA"], ["RGBa"], ["LA", "La"]], ids=lambda way: way[-1])
def test_alpha_is_over_white(way: list[str]):
    image = BLACK_HALF_CLEAR
    for mode in way:
        image = image.convert(mode)
    assert as_shown(image).getpixel((0, 0)) == (127, 127, 127)  # 255 * (1 - 128 / 255)


def test_a_palette_may_be_transparent_as_a_whole_or_in_one_colour():
    drawing = Image.new("P", (2, 1))
    drawing.putpalette([0, 0, 0, 255, 0, 0])
    drawing.putpixel((1, 0), 1)
    assert pixels(encoded(drawing)) == [(0, 0, 0), (255, 0, 0)]
    assert pixels(encoded(drawing, transparency=0)) == [WHITE, (255, 0, 0)]
    assert pixels(encoded(drawing, "GIF", transparency=0)) == [WHITE, (255, 0, 0)]
    assert pixels(encoded(drawing, transparency=bytes([128, 255]))) == [(127, 127, 127), (255, 0, 0)]


# Two pixels each, the first black and transparent; grey of 1, 2 and 4 bits is multiplied by 255, 85 and 17.
@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear", "second"),
    [
        (1, 0, b"\x40", [0], 255),
        (2, 0, b"\x10", [0], 85),
        (4, 0, b"\x0a", [0], 170),
        (8, 0, b"\x00\x80", [0], 128),
        (16, 0, b"\x00\x00\x80\x00", [0], 128),
        (8, 2, b"\0\0\0\x80\x80\x80", [0, 0, 0], 128),
        (16, 2, b"\0\0" * 3 + b"\x80\0" * 3, [0, 0, 0], 128),
    ],
)
def test_a_transparent_colour_is_white(depth: int, colour: int, row: bytes, clear: list[int], second: int):
    assert pixels(png(depth, colour, row)) == [(0, 0, 0), (second,) * 3]
    assert pixels(png(depth, colour, row, clear=clear)) == [WHITE, (second,) * 3]


def test_a_transparent_grey_of_few_bits_is_found_where_it_is_not_black():
    assert pixels(png(1, 0, b"\x40", clear=[1])) == [(0, 0, 0), WHITE]
    assert pixels(png(4, 0, b"\x0a", clear=[10])) == [(0, 0, 0), WHITE]


# ---- 16 bits -------------------------------------------------------------------------------------------------------
def test_16_bit_grey_is_scaled():
    # 128 = 32768 / 257 rounded; 0x0180 / 257 = 1.49 and 0x0182 / 257 = 1.502
    values, shown = np.array([[0, 0x0180, 0x0182, 0x8000, 0xFFFF]]), [0, 1, 2, 128, 255]
    little, big = values.astype("<u2").tobytes(), values.astype(">u2").tobytes()
    files = [
        png(16, 0, big, width=5),
        encoded(Image.frombytes("I;16", (5, 1), little), "TIFF"),
        encoded(Image.frombytes("I;16B", (5, 1), big), "TIFF"),
        b"P5 5 1 65535\n" + big,
    ]
    for file in files:
        assert pixels(file) == [(value,) * 3 for value in shown]


@pytest.mark.parametrize(("tag", "value"), [(258, 12), (262, 0)], ids=["12 bits", "white is 0"])
def test_a_tiff_whose_grey_pillow_takes_for_another_is_refused(tag: int, value: int):
    data = encoded(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), "TIFF")
    assert pixels(data) == [(0, 0, 0), WHITE]
    at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8  # the entry's value stands behind tag, type and count
    with pytest.raises(DataError, match="a TIFF of grey in other than 16 bits, or of white as 0: save it as PNG"):
        read_picture(data[:at] + struct.pack("<H", value) + data[at + 2 :])


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_numbers_without_a_known_white_are_refused(mode: str):
    with pytest.raises(DataError, match=f"of mode {mode}, "):
        read_picture(encoded(Image.new(mode, (2, 2)), "TIFF"))


# ---- what is no picture --------------------------------------------------------------------------------------------
def test_what_is_no_picture_is_one_line(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")  # nobody ever writes into it
    (tmp_path / "program").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    refusals: dict[Path | bytes, str] = {
        tmp_path / "nowhere": "No such file",
        tmp_path / "folder": "it is no ordinary file",
        tmp_path / "fifo": "it is no ordinary file",
        Path("/dev/zero"): "it is no ordinary file",
        tmp_path / "program": "no picture of a format that is read: .*PNG",
        b"": "no picture of a format that is read",
        b"text": "no picture of a format that is read",
        png(8, 0, b"\0" * 30_000, 30_000, 30_000): "Image size .900000000 pixels. exceeds limit",
        png(8, 0, b"\0" * 10_000, 10_000, 10_000): "Image size .100000000 pixels. exceeds limit",
        png(8, 0, b"\0\0", 2, 2)[:-30]: ".",
        png(8, 7, b"\0\0"): ".",  # no such colour type
    }
    for source, problem in refusals.items():
        with pytest.raises(DataError, match=problem) as refused:
            read_picture(source)
        assert "\n" not in str(refused.value)
