"""Pictures as a viewer shows them: the one that episodes hold, and the one way in for files and bytes from outside.

Upright, what is transparent over white, 16-bit grey scaled; of an animation the first frame. Colour profiles aren't
applied: models were trained without, too. Where a picture came from, and what becomes of it, is not known here.
"""

import hashlib
import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.Image import Transpose

from vlm_agents.errors import DataError

Image.init()  # every format, before anybody needs one in a thread
# What data sets hold. Pillow knows others, among them EPS, a program that it would have Ghostscript run.
FORMATS = ["AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # AVIF since Pillow 11.3
MODES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBA", "RGBa"}
TURNS = {  # by EXIF's orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
GREYS = {"1": 255, "L;2": 85, "L;4": 17}  # what Pillow multiplies a PNG's grey of so few bits by


class Picture:
    """A picture in RGB, as a viewer shows it, and the one identity that it has everywhere: equal keys, equal pictures.

    What isn't RGB is made so, see `as_shown`. Its pixels are not to be changed.
    """

    __slots__ = ("__weakref__", "_key", "image")

    def __init__(self, image: Image.Image) -> None:
        plain = type(image) is Image.Image and image.mode == "RGB" and not image.info
        self.image = image if plain else as_shown(image)
        self._key = ""

    @property
    def key(self) -> str:
        """16 hex digits that depend on size and pixels alone; made when first asked for."""
        if not self._key:
            kind = repr((self.image.mode, self.image.size, None))  # None: without a palette
            self._key = hashlib.sha256(kind.encode() + self.image.tobytes()).hexdigest()[:16]
        return self._key

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Picture) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Picture({self.image.width}x{self.image.height})"


@contextmanager
def opened(source: Path | bytes) -> Iterator[ImageFile.ImageFile]:
    """A file, or a file's bytes, as Pillow opens it: in its own mode, not decoded yet.

    Whatever is wrong with it, the block's decoding included, becomes a DataError that says what, not where it stood.
    """
    try:
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):
            raise DataError("it is no ordinary file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as file:
                yield file
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"it is no picture of a format that is read: {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise whatever they stumble over in a broken file
        raise DataError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def read_picture(source: Path | bytes) -> Image.Image:
    """The picture in a file, or in a file's bytes, upright and as `as_shown` has it. Errors as of `opened`."""
    with opened(source) as file:
        if file.format == "PNG" and "transparency" in file.info and (step := GREYS.get(str(file.tile[0][3]))):
            file.info["transparency"] = min(255, step * file.info["transparency"])
        if file.format == "TIFF" and file.mode.startswith("I;16"):
            tags = getattr(file, "tag_v2", {})
            if tags.get(BITS_PER_SAMPLE) != (16,) or tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
                raise DataError("it is a TIFF of grey in other than 16 bits, or of white as 0: save it as PNG")
        file.load()
        image = file.convert("I;16") if (file.format, file.mode) == ("PPM", "I") else file
        try:
            turn = TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # noqa: BLE001 (EXIF that can't be read turns nothing, in a viewer neither)
            turn = None
        return as_shown(image if turn is None else image.transpose(turn))


def as_shown(image: Image.Image) -> Image.Image:
    """The same picture in RGB, of the same size and without metadata: what is transparent over white, 16-bit grey
    scaled to 8. DataError for numbers of which nobody knows which is white: 32-bit integers, floats."""
    if image.mode.startswith("I;16"):
        image = _in_8_bits(image)
    if image.mode not in MODES:
        raise DataError(f"its pixels are of mode {image.mode}, of which nobody knows how they look: save it in RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow has no other way out of La
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    shown = image.convert("RGB")
    shown.info = {}
    return shown


def _in_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey of either byte order as L, or as LA where one grey stands for transparent."""
    values = np.asarray(image)
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
