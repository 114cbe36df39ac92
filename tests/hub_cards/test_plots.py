"""The plots of a card: files with lines in them, of what was measured and of nothing else."""

import matplotlib.image
import numpy as np
import pytest

from fspad.hub_cards import Evaluation, Measurement
from fspad.hub_cards.plots import COLORS, draw_acceptance, draw_training

GREEDY = Measurement("Held-out prompts", 0, tau=2.0, acceptance_by_depth=[0.6, 0.3, 0.1])
OTHER = Measurement("Spec-Bench", 0, tau=1.5, acceptance_by_depth=[0.4, 0.1])
MATH = Measurement("Spec-Bench", 0, tau=1.5, acceptance_by_depth=[0.4, 0.1], task="math")
TAU = [Evaluation(100, tau=1.5), Evaluation(200, tau=2.0)]
ACCURACY = [Evaluation(100, accuracies=(0.5, 0.25)), Evaluation(200, accuracies=(0.75, 0.5))]


def colors_in(path):
    """Which colours of lines are in a PNG file, by their place in the palette."""
    pixels = np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int)
    palette = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS[:-1]]  # text is black too
    return [index for index, color in enumerate(palette) if (pixels == color).all(axis=-1).sum() > 50]


@pytest.mark.parametrize(
    ("measurements", "colors"),
    [
        ([GREEDY], [0]),
        ([GREEDY, OTHER], [0, 1]),
        ([GREEDY, Measurement("Held-out prompts", 1, tau=1.5, acceptance_by_depth=[0.4])], [0]),
        ([GREEDY, OTHER, MATH], [0, 1]),
        ([GREEDY, MATH], [0, 1]),
    ],
)
def test_acceptance_has_a_color_for_each_set_of_prompts(tmp_path, measurements, colors):
    path = tmp_path / "plot.png"
    assert draw_acceptance(measurements, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert matplotlib.image.imread(path).shape[:2] == (600, 960)
    assert colors_in(path) == colors


@pytest.mark.parametrize(
    ("evaluations", "height", "colors"),
    [
        (TAU, 510, [0]),
        (ACCURACY, 510, [0, 1]),
        ([*TAU, *ACCURACY], 930, [0, 1]),
        ([Evaluation(e.step, name, e.tau) for name in ("a", "b", "c") for e in TAU], 510, [0, 1, 2]),
    ],
)
def test_training_has_a_panel_for_what_was_measured(tmp_path, evaluations, height, colors):
    path = tmp_path / "plot.png"
    assert draw_training(evaluations, path)
    assert matplotlib.image.imread(path).shape[:2] == (height, 960)
    assert colors_in(path) == colors


def test_nothing_to_draw(tmp_path):
    path = tmp_path / "plot.png"
    assert not draw_acceptance([Measurement("Some", 0, tau=2.0)], path)
    assert not draw_training([], path)
    assert not draw_training([Evaluation(100, tau=1.5, accuracies=(0.5,))], path), "one step is no curve"
    assert not path.exists()


def test_the_same_figures_give_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        draw_acceptance([GREEDY, OTHER], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw_acceptance([GREEDY, GREEDY], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_settings_of_the_program_stay_as_they_are(tmp_path):
    before = dict(matplotlib.rcParams)
    draw_acceptance([GREEDY], tmp_path / "plot.png")
    draw_training(TAU, tmp_path / "plot.png")
    assert dict(matplotlib.rcParams) == before
