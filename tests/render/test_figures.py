import numpy as np
import pytest
from PIL import Image

from vitcmp.render import figures

IMAGE = np.random.default_rng(0).random((32, 32, 3))


def pixels(path):
    return np.array(Image.open(path))


def panels(figure):
    """The axes that show images."""
    return [axes for axes in figure.axes if axes.images]


def test_a_panel_a_layer_and_head_beside_the_image(tmp_path):
    maps = np.random.default_rng(0).random((3, 2, 8, 8))
    figure = figures.maps_by_layer_and_head(IMAGE, maps, tmp_path / "a.png", "title", "note")
    shown = panels(figure)
    assert len(shown) == 1 + 3 * 2
    np.testing.assert_array_equal(shown[0].images[0].get_array(), IMAGE)
    np.testing.assert_array_equal(shown[4].images[1].get_array(), maps[1, 1])
    figures.maps_by_layer_and_head(IMAGE, maps[:, :, ::-1], tmp_path / "b.png", "title", "note")
    assert pixels(tmp_path / "a.png").shape == pixels(tmp_path / "b.png").shape
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_negative_entries_get_a_scale_around_zero(tmp_path, lowest):
    maps = np.linspace(lowest, 0.5, 16).reshape(1, 1, 4, 4)
    drawn = panels(figures.maps_by_layer_and_head(IMAGE, maps, tmp_path / "a.png", "", ""))[1].images[1]
    assert (drawn.norm.vmin, drawn.norm.vmax) == ((0, 0.5) if lowest == 0 else (-1, 1))
    assert float(drawn.norm(0.0)) == (0 if lowest == 0 else 0.5)


def test_side_by_side_has_a_row_a_mechanism_and_says_why_a_view_lacks(tmp_path):
    views = {
        "softmax": {"rollout": np.eye(4), "Grad-CAM": np.ones((32, 32))},
        "xca": {"rollout": "it has no map", "Grad-CAM": 0 - np.eye(4)},
    }
    figure = figures.side_by_side(IMAGE, views, tmp_path / "a.png", "t", {"xca": "says $1 bill"}, "note")
    assert len(figure.axes) == 2 * 3
    assert [len(axes.images) for axes in figure.axes] == [1, 2, 2, 1, 0, 2]
    assert [text.get_text() for text in figure.axes[4].texts] == ["it has no map"]
    assert figure.axes[1].get_xlabel() == "0 … 1"
    assert figure.axes[5].get_xlabel() == "-1 … 0"
    height, width, _ = pixels(tmp_path / "a.png").shape
    assert (width, height) == tuple(np.round(figure.get_size_inches() * figures.DPI))


def test_a_sheet_shows_each_sample_with_its_label(tmp_path):
    images = np.random.default_rng(0).random((11, 8, 8))
    figure = figures.sample_sheet(images, [f"class {i}" for i in range(11)], tmp_path / "a.png", "t")
    assert [axes.get_xlabel() for axes in figure.axes] == [f"class {i}" for i in range(11)]
    np.testing.assert_array_equal(figure.axes[10].images[0].get_array(), images[10])


def test_profiles_draw_the_mean_over_heads(tmp_path):
    array = np.array([[1.0, 3.0], [2.0, 6.0]])
    values = {"softmax": dict.fromkeys(figures.PROFILES, array), "linear": dict.fromkeys(figures.PROFILES, array + 1)}
    figure = figures.profiles(values, tmp_path / "a.png", "t", "note", uniform=4.0)
    assert len(figure.axes) == 3
    for axes in figure.axes:
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert (lines["softmax"], lines["linear"]) == ([2, 4], [3, 5])
    assert len(figure.axes[0].lines) == len(figure.axes[1].lines) + 1
    assert pixels(tmp_path / "a.png").std() > 0


def test_glyphs_that_the_font_lacks_raise_no_warning(tmp_path):
    figures.sample_sheet(np.zeros((1, 4, 4)), ["\u732b"], tmp_path / "a.png", "\u732b")
    assert pixels(tmp_path / "a.png").shape[2] == 4
