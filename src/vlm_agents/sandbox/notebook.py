"""Runs code as a notebook does its cells: one namespace for all, and what a cell prints and shows, in its order.

Pictures come out as RGB. What is shown beyond the limits is left out, and the text says so.
"""

import ast
import linecache
import sys
import traceback
from types import CodeType
from typing import Any, TextIO

from PIL import Image

from vlm_agents.sandbox.settings import SandboxSettings

Shown = str | Image.Image
_OWN = __file__.rpartition("/")[0]
_PRELUDE = "import base64, io, math\nimport PIL\nfrom PIL import Image\n"
_PRELUDE_IF_THERE = ("import numpy as np", "import matplotlib", "import matplotlib.pyplot as plt")


class Output:
    """What one cell has shown so far."""

    def __init__(self, settings: SandboxSettings) -> None:
        self._settings = settings
        self._chars_left = settings.output_chars
        self._pictures = 0
        self.parts: list[Shown] = []

    def text(self, text: str) -> None:
        if self._chars_left < 0 or not text:
            return
        kept = text[: self._chars_left]
        self._chars_left -= len(text)
        if self._chars_left < 0:
            kept += f"\n[output cut after {self._settings.output_chars} characters]\n"
        self._append(kept)

    def picture(self, picture: Image.Image) -> None:
        self._pictures += 1
        if self._pictures > self._settings.pictures:
            if self._pictures == self._settings.pictures + 1:
                self._append(f"[further pictures left out: at most {self._settings.pictures} at a time]\n")
            return
        if not picture.width or not picture.height:
            raise ValueError(f"a picture of {picture.width}x{picture.height} pixels can't be shown")
        most = self._settings.picture_pixels
        if picture.width * picture.height > most:
            size = fitted(picture.width, picture.height, most)
            note = f"[picture scaled from {picture.width}x{picture.height} to {size[0]}x{size[1]} pixels]\n"
            picture = picture.resize(size, reducing_gap=2.0)
            self._append(note)
        self.parts.append(opaque(picture))

    def _append(self, text: str) -> None:
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        else:
            self.parts.append(text)


def fitted(width: int, height: int, most_pixels: int) -> tuple[int, int]:
    """The largest size of about the same shape with at most so many pixels."""
    scale = (most_pixels / (width * height)) ** 0.5
    short = max(1, int(min(width, height) * scale))
    long = min(int(max(width, height) * scale), most_pixels // short)
    return (long, short) if width >= height else (short, long)


def opaque(picture: Image.Image) -> Image.Image:
    """A copy in RGB, what is transparent over white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


class _Stream:
    """sys.stdout and sys.stderr of the cells; can't be closed."""

    encoding, errors, closed, name = "utf-8", "replace", False, "<output>"

    def __init__(self, notebook: "Notebook") -> None:
        self._notebook = notebook

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._notebook.output.text(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None: ...
    def close(self) -> None: ...
    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


class Notebook:
    """One namespace, which lives as long as this does."""

    def __init__(self, settings: SandboxSettings) -> None:
        self._settings = settings
        self.output = Output(settings)
        self._cells = 0
        self._paths = [f"{path}/" for path in sorted(filter(None, sys.path), key=len, reverse=True)]
        self._stream: TextIO = _Stream(self)  # pyright: ignore[reportAttributeAccessIssue]
        self.names: dict[str, Any] = {"__name__": "__main__", "display": self.display}
        exec(_PRELUDE, self.names)
        for line in _PRELUDE_IF_THERE:
            try:
                exec(line, self.names)
            except ImportError:
                continue
        self._plt, display = self.names.get("plt"), self.display
        Image.Image.show = lambda self, *_, **__: display(self)  # pyright: ignore[reportAttributeAccessIssue]
        if self._plt is not None:
            from matplotlib.figure import Figure

            self._plt.show = lambda *_, **__: self._show_figures()
            Figure.show = lambda self, *_, **__: display(self)  # pyright: ignore[reportAttributeAccessIssue]

    def run(self, code: str) -> tuple[list[Shown], str | None]:
        """Run a cell: what it showed, and the traceback where it raised."""
        self._cells += 1
        self.output = Output(self._settings)
        sys.stdout = sys.stderr = self._stream
        file, error = f"<cell {self._cells}>", None
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)  # for tracebacks
        try:
            body, last = _compiled(code, file)
            exec(body, self.names)
            if last is not None:
                self._show_value(eval(last, self.names))
            self._show_figures()
        except SystemExit as ended:  # a cell may say that it is at its end, and why
            if isinstance(ended.code, str):
                self.output.text(f"{ended.code}\n")
        except BaseException as raised:  # noqa: BLE001 (whatever the code raised is its answer)
            error = self._told(raised)
        finally:
            if self._plt is not None:
                self._plt.close("all")
        return self.output.parts, error

    def display(self, *values: Any) -> None:
        """Show pictures and figures as such, anything else as text."""
        for value in values:
            if isinstance(value, Image.Image):
                self.output.picture(value)
            elif hasattr(value, "canvas") and hasattr(value, "get_size_inches"):
                self._show_figure(value)
            else:
                self.output.text(f"{value!r}\n")

    def _show_value(self, value: Any) -> None:
        self.names["_"] = value
        if value is not None:
            self.display(value)

    def _show_figures(self) -> None:
        """Show and close the figures that are open, as a notebook does at the end of a cell."""
        if self._plt is not None:
            for number in self._plt.get_fignums():
                self._show_figure(self._plt.figure(number))

    def _show_figure(self, figure: Any) -> None:
        """Draw at a resolution that keeps to the limit, before any memory is taken; and close it, if pyplot has it."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        width, height = (side * figure.dpi for side in figure.get_size_inches())
        if width * height > self._settings.picture_pixels:
            scale = (self._settings.picture_pixels / (width * height)) ** 0.5
            figure.set_dpi(figure.dpi * scale * 0.999)  # 0.999: sizes are rounded
            self.output.text(f"[figure of {width:.0f}x{height:.0f} pixels scaled down]\n")
        canvas = FigureCanvasAgg(figure)  # a figure that was closed has lost its own
        canvas.draw()
        self.output.picture(Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())))
        if self._plt is not None and getattr(figure, "number", None) is not None:
            self._plt.close(figure)

    def _told(self, raised: BaseException) -> str:
        """The traceback without our own part of it, and without where things lie on this machine."""
        try:
            told = traceback.TracebackException.from_exception(raised)
            _leave_out(told)
            text = "".join(told.format())
        except BaseException:  # noqa: BLE001 (an exception that can't even be told)
            text = f"{type(raised).__name__}\n"
        for path in self._paths:
            text = text.replace(path, "")
        most = self._settings.output_chars
        return text if len(text) <= most else f"{text[: most // 4]}\n[...]\n{text[-(most - most // 4) :]}"


def _leave_out(told: traceback.TracebackException | None) -> None:
    """Leave out the frames of this package, of what caused the error too."""
    while told is not None:
        told.stack[:] = [frame for frame in told.stack if not frame.filename.startswith(_OWN)]
        told = told.__cause__ or told.__context__


def _compiled(code: str, file: str) -> tuple[CodeType, CodeType | None]:
    """A cell as statements, and the expression that ends it, if one does."""
    tree = ast.parse(code, file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    expression = compile(ast.Expression(last.value), file, "eval") if isinstance(last, ast.Expr) else None
    return compile(tree, file, "exec"), expression
