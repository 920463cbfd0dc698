"""Pictures: pixels where they belong, round ticks, grids of images, training curves."""

import numpy as np
import pytest
from pictures import random_images
from PIL import Image

from plot import COLOURS, SCALE, Axes, figure, save_curves, save_grid, ticks

# axes


@pytest.mark.parametrize("low, high, log, texts", [
    (-4.5, 4.5, False, "-4 -2 0 2 4"), (2.2, 3.8, False, "2.5 3 3.5"), (0, 2345, False, "0 500 1000 1500 2000"),
    (-0.1, 0.1, False, "-0.1 -0.05 0 0.05 0.1"), (0.01, 80, True, "0.01 0.1 1 10"), (3.2, 500, True, "5 10 20 50 100 200 500"),
    (1e-5, 1e5, True, "1e-5 0.001 0.1 10 1000 1e5"),
    (3, 4, True, "3 3.2 3.4 3.6 3.8 4"), (100000, 100001, False, "100000 100000.2 100000.4 100000.6 100000.8 100001")])
def test_ticks_are_round_and_inside(low, high, log, texts):
    found = ticks(low, high, log)
    assert " ".join(text for _, text in found) == texts
    assert all(float(text) == pytest.approx(value, rel=1e-9, abs=1e-12) for value, text in found)


def test_points_lie_where_their_coordinates_say():
    linear = Axes((-1, 3), (10, 20), size=(200, 100))
    np.testing.assert_allclose(linear.at([[-1, 10], [3, 20], [1, 15]]), SCALE * np.array([[0, 100], [200, 0], [100, 50]]))
    log = Axes((0.01, 100), (1, 10), log_x=True, log_y=True, size=(200, 100))
    np.testing.assert_allclose(log.at([[0.01, 1], [1, 10 ** 0.5], [100, 10]]), SCALE * np.array([[0, 100], [100, 50], [200, 0]]))
    assert np.isfinite(log.at([[0, -1]])).all()  # off a log scale, but no crash


def test_what_is_drawn_has_its_colour_and_is_cut_off_at_the_frame():
    axes = Axes((0, 1), (0, 1), "title", "x", "y", size=(100, 100))
    axes.scatter([[0.25, 0.25], [5, 5]], (255, 0, 0), 4)
    axes.line([[0, 0.5], [1, 0.5]], (0, 0, 255), 4, label="line")
    axes.arrows([[0.75, 0.6]], [[0, 0.3]], (0, 200, 0), 4)
    inside = np.array(axes.inside)
    assert (inside[150, 50] == (255, 0, 0)).all() and (inside[100, 100] == (0, 0, 255)).all() and (inside[50, 150] == (0, 200, 0)).all()
    assert (inside[20, 20] == 255).all()
    assert (np.array(axes.image()) == (255, 0, 0)).all(2).sum() == pytest.approx(np.pi * 4 ** 2, rel=0.25)  # the other is outside


def test_a_figure_holds_all_axes():
    one = Axes((0, 1), (0, 1), size=(120, 80)).image()
    both = figure([[Axes((0, 1), (0, 1), size=(120, 80))] * 3, [Axes((0, 1), (0, 1), size=(120, 80))]])
    assert both.size == (3 * one.width, 2 * one.height)
    corner = both.crop((0, one.height, one.width, 2 * one.height))
    assert np.array_equal(np.array(corner), np.array(one))


# grids of images


def test_grid(tmp_path):
    images = random_images(5, 70, 70, 3)
    save_grid(images, tmp_path / "g.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (2 * 72, 3 * 72, 3)
    assert np.array_equal(grid[72 + 1:72 + 71, 72 + 1:72 + 71], images[4]) and (grid[73:, 145:] == 255).all()


def test_titles_of_rows(tmp_path):
    """Left of the pictures, which stay as they are; whatever folders are called."""
    images = random_images(6, 70, 70, 1)
    save_grid(images, tmp_path / "plain.png", columns=2)
    save_grid(images, tmp_path / "titled.png", 2, ["a\nb", "\udce9\u732b", "name " * 100])
    plain, titled = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "titled.png"))
    margin = titled.shape[1] - plain.shape[1]
    assert 20 < margin < 330 and np.array_equal(titled[:, margin:], plain)
    assert all((titled[72 * row:72 * row + 72, :margin] < 128).any() for row in range(3))


# training curves


def panel():
    """The size of one panel, in pixels."""
    return Axes((0, 1), (0, 1)).image().size


def drawn(path, width, height):
    """The panels of a picture of training curves, width and height panels large, row by row."""
    picture = np.array(Image.open(path))
    w, h = panel()
    assert picture.shape == (height * h, width * w, 3)
    return [panel for row in np.split(picture, height) for panel in np.split(row, width, axis=1)]


def has(picture, colour):
    return (picture == colour).all(2).sum() > 20


def lines_of_a_log(count, latents=3, older=False):
    """As train_stage1.py writes them; those of older versions had less."""
    line = dict(perplexity=[1.0 + i for i in range(latents)])
    new = {} if older else dict(grad_norm=0.5, lr=1e-3, skipped=0, images_per_second=7.0)
    return [dict(images=1000 * i, loss=1 / i, bits=0.3 * i, **line, **new) for i in range(1, count + 1)]


def test_curves_of_several_latents(tmp_path):
    """A panel for each of loss, bits, codes in use, gradients and rate; in the third, a line for each latent."""
    save_curves(lines_of_a_log(5), tmp_path / "curves.png")
    loss, bits, codes, norm, rate, empty = drawn(tmp_path / "curves.png", 3, 2)
    assert [has(codes, colour) for colour in COLOURS[:4]] == [True] * 3 + [False]
    for one_line in (loss, bits, norm, rate):
        assert has(one_line, COLOURS[4]) and not has(one_line, COLOURS[0])
    assert (empty == 255).all()


def test_curves_of_a_prior_have_both_kinds_of_bits(tmp_path):
    save_curves([dict(images=50 * i, bits=7.0 - i, held_out_bits=7.2 - i) for i in range(3)], tmp_path / "curves.png")
    (bits,) = drawn(tmp_path / "curves.png", 1, 1)
    assert has(bits, COLOURS[4]) and has(bits, COLOURS[0])


def test_curves_of_older_logs(tmp_path):
    """Without the new keys there are no panels of them; what begins in mid-run is drawn from there on."""
    save_curves(lines_of_a_log(5, older=True), tmp_path / "older.png")
    assert has(drawn(tmp_path / "older.png", 3, 1)[2], COLOURS[2])
    older, newer = lines_of_a_log(5, older=True), lines_of_a_log(5)
    save_curves(older[:3] + newer[3:], tmp_path / "both.png")
    _, bits, _, norm, *_ = drawn(tmp_path / "both.png", 3, 2)
    first, first_of_norm = (np.flatnonzero((part == COLOURS[4]).all(2).any(0)).min() for part in (bits, norm))
    assert first_of_norm == pytest.approx(first, abs=2)  # each panel from its own first point on
    save_curves(older[:4] + newer[4:], tmp_path / "late.png")  # one point is no curve
    drawn(tmp_path / "late.png", 3, 1)


def test_what_is_no_curve_leaves_no_picture(tmp_path):
    """No line, one line, two of the same moment, and none that is finite; what is not finite is left out."""
    once, nan = lines_of_a_log(1), float("nan")
    for lines in ([], once, once * 2, [dict(images=i, loss=nan, bits=None) for i in range(3)]):
        save_curves(lines, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
    lines = [dict(images=i, loss=nan if i == 1 else 0.5, perplexity=[1.0, nan if i else 1.0]) for i in range(4)]
    save_curves(lines, tmp_path / "curves.png")
    (loss,) = drawn(tmp_path / "curves.png", 1, 1)
    assert has(loss, COLOURS[4])
