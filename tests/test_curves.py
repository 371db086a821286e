import numpy as np
import pytest

from d3epth_jax.training import curves


@pytest.mark.parametrize("logy", [False, True])
def test_line_plot_draws_every_curve(logy):
    x = np.arange(100)
    series = {
        "nothing": ([], []),
        "zero": (x, 0 * x),
        "teacher": (x, np.exp(-x / 30)),
        "student": (x[:50], np.where(x[:50] == 20, np.nan, 0.5)),
        "one point": ([70], [0.8]),
    }
    plot = curves.line_plot(series, "loss", "step", "SSI", logy, size=(500, 300))
    assert plot.shape == (300, 500, 3) and plot.dtype == np.uint8
    area = plot[60:248, 40:330].astype(int)  # without legend, labels and the axes
    for number, name in enumerate(series):
        color = np.array(list(bytes.fromhex(curves.LINES[number][1:])))
        drawn = (np.abs(area - color).max(-1) < 40).sum()
        expected = name != "nothing" and not (logy and name == "zero")
        assert (drawn > 10) == expected, (name, drawn)


def test_line_plot_of_nothing_and_of_large_values():
    assert curves.line_plot({}, "empty", "x", "y").shape == (400, 720, 3)
    plot = curves.line_plot({"a": ([0, 1e6], [1e8, 1e8])}, "flat", "x", "y")
    assert plot.shape == (400, 720, 3)


def test_ticks_are_round():
    assert [text for _, text in curves._ticks(0, 1)] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [text for _, text in curves._ticks(0.249, 0.31)] == [
        "0.25", "0.26", "0.27", "0.28", "0.29", "0.3", "0.31"
    ]  # fmt: skip
    assert curves._ticks(0, 1e6)[-1] == (1e6, "1000000")
    assert [text for _, text in curves._log_ticks(-2, 1)] == ["0.01", "0.1", "1", "10"]
    assert [text for _, text in curves._log_ticks(-1, 0)] == ["0.1", "0.2", "0.5", "1"]
