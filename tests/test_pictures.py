"""The pictures of the lessons: a PNG that weighs little, with a text for those who do not see it."""

import io
import re

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of how it draws
from IPython.core.formatters import DisplayFormatter  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from llm_course.lessons import Picture, few_colours, ink_on  # noqa: E402


def drawn(figure: Figure) -> Figure:
    "A figure with lines, letters and an area."
    ax = figure.subplots()
    ax.plot([1, 3, 2], label="a line")
    ax.add_patch(plt.Rectangle((0, 1), 1, 1, color="#123456"))
    ax.set(title="A title", xlabel="along")
    ax.legend()
    return figure


def test_a_picture_is_shown_with_its_text():
    "As IPython shows it: the PNG, the text in the PNG's metadata, and as plain text."
    data, metadata = DisplayFormatter().format(Picture(drawn(Figure()), "A line, and a box."))
    assert data["image/png"].startswith(b"\x89PNG") and data["text/plain"] == "A line, and a box."
    assert metadata == {"image/png": {"alt": "A line, and a box."}}


@pytest.mark.parametrize("width", [4, 6, 11])
def test_a_picture_can_be_read_and_weighs_little(width: float):
    "At least 600 pixels wide, whatever the figure is in inches, and a third of the bytes that matplotlib writes."
    figure, plain = drawn(Figure(figsize=(width, 3), layout="constrained")), io.BytesIO()
    picture = Picture(figure, "")
    figure.savefig(plain, dpi=max(90, 640 / width))
    assert Image.open(io.BytesIO(picture.png)).width >= 600
    assert len(picture.png) < 0.4 * len(plain.getvalue())


def test_a_figure_of_pyplot_is_closed_and_another_is_left_alone():
    "Else a notebook would show it a second time; and a figure of its own belongs to whoever made it."
    plt.close("all")
    Picture(drawn(plt.figure()), "")
    own = drawn(Figure())
    assert plt.get_fignums() == [] and Picture(own, "").png == Picture(own, "").png


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=300, unique=True))
def test_areas_keep_their_colours(colours: list[tuple[int, int, int]]):
    "To the last bit, up to some two hundred of them: of two that are nearly the same, neither becomes the other."
    image = Image.fromarray(np.array(colours, np.uint8).repeat(300, axis=0).reshape(-1, 20, 3))
    found = np.asarray(few_colours(image).convert("RGB"))
    same = (found == np.asarray(image)).all(-1).mean()
    assert same == 1 if len(colours) <= 200 else same > 0.5


def test_a_map_of_many_shades_stays_a_map():
    "More shades than a palette has are each near one that it has."
    shades = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1).astype(np.uint8)
    image = Image.fromarray(np.dstack([shades, np.full((256, 256), 90, np.uint8)]))
    found = np.asarray(few_colours(image).convert("RGB")).astype(int)
    assert abs(found - np.asarray(image)).mean() < 40


def contrast(a: object, b: object) -> float:
    "Of two colours, 1 to 21, as WCAG 2.2 defines it."

    def luminance(colour: object) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    light, dark = sorted([luminance(a), luminance(b)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_ink_can_be_read_on_every_colour(colour: tuple[float, float, float]):
    assert contrast(ink_on(colour), colour) >= 4.5


@pytest.mark.parametrize("shades", ["Reds", "YlOrRd", "YlGnBu", "tab20"])
def test_ink_can_be_read_on_the_maps_of_the_lessons(shades: str):
    "The darkest red of an attention picture had black letters on it."
    assert (
        min(
            contrast(ink_on(plt.get_cmap(shades)(x)), plt.get_cmap(shades)(x))
            for x in np.linspace(0, 1, 256)
        )
        >= 4.5
    )


def test_lessons_write_on_colours_with_ink_that_can_be_read():
    "Wherever text stands on areas in colours of a map, `ink_on` says how to write it."
    from test_layering import NOTEBOOKS, code_cells

    for path in NOTEBOOKS:
        for cell in code_cells(path):
            on_areas = re.search(r"\bax\.text\(", cell) and re.search(
                r"Rectangle\(|bbox=|imshow\(|barh\(", cell
            )
            if on_areas and re.search(r"plt\.cm\.|get_cmap|cmap=", cell):
                assert "ink_on" in cell, f"{path.name}:\n{cell}"
