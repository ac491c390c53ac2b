"""Looking at the figures that were drawn."""

import numpy as np
from bridge.report.figure_style import DARK, LIGHT
from matplotlib.image import imread


def assert_drawn(path):
    pixels = imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 700
    assert len(np.unique(pixels[..., :3].sum(axis=2))) > 20


def assert_drawn_in_both_themes(draw, evidence, path):
    for theme in (LIGHT, DARK):
        assert_drawn(draw(evidence, path, theme))
        background = imread(path)[0, 0, :3].mean()
        assert background > 0.9 if theme is LIGHT else background < 0.2
