"""Pictures from outside, as a viewer shows them: the one way in for files and bytes that this project didn't draw."""

import io
import stat
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from vlm_agents.errors import DataError

Image.init()  # every format, before anybody needs one in a thread


def read_picture(source: Path | bytes) -> Image.Image:
    """The picture in a file, or in a file's bytes, in RGB. DataError says what is wrong with it, not where it stood."""
    try:
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):
            raise DataError("it is no ordinary file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
                return as_shown(file)
    except DataError:
        raise
    # SyntaxError is how Pillow calls a broken PNG
    except (
        *(OSError, SyntaxError, ValueError, TypeError),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning),
    ) as error:
        raise DataError(str(error) or type(error).__name__) from error


def as_shown(image: Image.Image) -> Image.Image:
    """The same picture in RGB: upright, what is transparent over white, 16 bits a channel scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
