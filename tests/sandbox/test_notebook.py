"""What a cell shows, in a real session."""

import pytest
from PIL import Image

from vlm_agents.sandbox.notebook import fitted
from vlm_agents.sandbox.session import Result, Sandbox


def run(sandbox: Sandbox, *cells: str) -> Result:
    with sandbox.open({"image_clue_0": Image.new("RGB", (40, 30), (0, 0, 255))}) as session:
        return [session.run(cell) for cell in cells][-1]


def shapes(result: Result) -> list[str | tuple[int, int]]:
    return [part if isinstance(part, str) else part.size for part in result.parts]


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1 + 1", ["2\n"]),
        ("'a'", ["'a'\n"]),
        ("x = 1", []),
        ("None", []),
        ("", []),
        ("print('a'); 2", ["a\n2\n"]),
        ("image_clue_0", [(40, 30)]),
        ("image_clue_0.show(); print('a'); image_clue_0.resize((2, 2))", [(40, 30), "a\n", (2, 2)]),
        ("display('a', image_clue_0)", ["'a'\n", (40, 30)]),
        ("plt.figure(figsize=(2, 1), dpi=50); plt.show(); print('a')", [(100, 50), "a\n"]),
        ("plt.figure(figsize=(2, 1), dpi=50); print('a')", ["a\n", (100, 50)]),  # open at the end
        ("f = plt.figure(figsize=(2, 1), dpi=50)\nplt.show(block=False)\nf", [(100, 50), (100, 50)]),
        ("f = plt.figure(figsize=(2, 1), dpi=50)\nf.show()", [(100, 50)]),
        ("plt.figure(figsize=(2, 1), dpi=50)\nplt.close()", []),
        ("import sys; print('a', file=sys.stderr)", ["a\n"]),
        ("raise SystemExit(3)", []),
        ("import sys; sys.exit('no card')", ["no card\n"]),
        (
            "for _ in range(5): image_clue_0.show()",
            [(40, 30)] * 3 + ["[further pictures left out: at most 3 at a time]\n"],
        ),
    ],
)
def test_parts_come_in_their_order(sandbox: Sandbox, code: str, shown: list[str | tuple[int, int]]) -> None:
    result = run(sandbox, code)
    assert shapes(result) == shown
    assert (result.ended, result.error) == ("done", None)


def test_a_figure_is_shown_once(sandbox: Sandbox) -> None:
    assert shapes(run(sandbox, "plt.figure(figsize=(1, 1))", "1")) == ["1\n"]


def test_the_last_value_has_a_name(sandbox: Sandbox) -> None:
    assert run(sandbox, "6 * 7", "_ + 1").text == "43\n"


def test_a_traceback_begins_in_the_cell_and_names_no_place_of_this_machine(sandbox: Sandbox) -> None:
    result = run(sandbox, "def f():\n    import json\n    json.loads('{')", "print('before')\nf()")
    error = str(result.error)
    assert (result.ended, result.text) == ("error", "before\n")
    assert error.startswith('Traceback (most recent call last):\n  File "<cell 2>", line 2, in <module>\n    f()\n')
    assert '  File "<cell 1>", line 3, in f\n    json.loads' in error
    assert '  File "json/__init__.py", line' in error
    assert "json.decoder.JSONDecodeError: Expecting property name" in error


def test_what_caused_an_error_is_told_without_our_part(sandbox: Sandbox) -> None:
    code = "try:\n    Image.new('L', (0, 1)).show()\nexcept ValueError as e:\n    raise KeyError('x') from e"
    error = str(run(sandbox, code).error)
    assert "a picture of 0x1 pixels can't be shown" in error
    assert error.endswith("KeyError: 'x'\n")
    assert "notebook" not in error


def test_a_syntax_error_is_an_error(sandbox: Sandbox) -> None:
    result = run(sandbox, "x = 1\nif x:\nprint(2)")
    assert result.ended == "error"
    assert str(result.error).endswith("IndentationError: expected an indented block after 'if' statement on line 2\n")
    assert "notebook" not in str(result.error)


def test_text_is_cut(sandbox: Sandbox) -> None:
    text = run(sandbox, "print('x' * 1500); print('y' * 1500); print('z')").text
    assert text == "x" * 1500 + "\n" + "y" * 499 + "\n[output cut after 2000 characters]\n"  # 1500 + 1 + 499 = 2000


def test_pictures_come_in_rgb(sandbox: Sandbox) -> None:
    modes = "for m in ('RGBA', 'L', '1'): Image.new(m, (2, 2)).show()"
    assert [image.getpixel((0, 0)) for image in run(sandbox, modes).images] == [(255,) * 3, (0,) * 3, (0,) * 3]


def test_a_large_picture_is_scaled_down(sandbox: Sandbox) -> None:
    result = run(sandbox, "Image.new('L', (4000, 4000))")
    assert shapes(result) == ["[picture scaled from 4000x4000 to 2000x2000 pixels]\n", (2000, 2000)]  # 4 million pixels


@pytest.mark.parametrize(
    ("width", "height", "most", "size"),
    [(4000, 1000, 1_000_000, (2000, 500)), (10**6, 1, 1000, (1000, 1)), (1, 10**6, 1000, (1, 1000)), (3, 3, 4, (2, 2))],
)
def test_fitted_keeps_the_shape_where_it_can(width: int, height: int, most: int, size: tuple[int, int]) -> None:
    assert fitted(width, height, most) == size


def test_sessions_draw_alike(sandbox: Sandbox) -> None:
    code = "import random\nprint(random.random(), np.random.rand(), hash('a'))"
    assert run(sandbox, code).text == run(sandbox, code).text
    assert run(sandbox, code).text.startswith("0.844421851")  # random.seed(0); random.random()


def test_pictures_of_another_mode_are_bound_in_rgb(sandbox: Sandbox) -> None:
    with sandbox.open({"p": Image.new("RGBA", (2, 2), (255, 0, 0, 0))}) as session:
        assert session.run("print(p.mode, p.getpixel((0, 0)))").text == "RGB (255, 255, 255)\n"
        session.bind({"p": Image.new("L", (3, 3), 7)})
        assert session.run("print(p.size, p.getpixel((0, 0)))").text == "(3, 3) (7, 7, 7)\n"


def test_skimage_is_there_where_it_is_installed(sandbox: Sandbox) -> None:
    pytest.importorskip("skimage")
    code = "from skimage import measure\nprint(measure.label(np.eye(3, dtype=int), connectivity=1).max())"
    assert run(sandbox, code).text == "3\n"  # without diagonals each of the ones is a region
