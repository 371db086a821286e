"""A run's curves as a picture (NumPy and Pillow)."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d3epth_jax.gallery import INK, wrap
from d3epth_jax.metric_writer import read_metrics

PALE = (222, 222, 222)
# Okabe and Ito's colours, told apart by the colour-blind too; yellow left out on white.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def curves(workdir: pathlib.Path) -> np.ndarray:
    """Every loss, and AbsRel on the validation set, over a run's steps so far: uint8 [H,W,3]."""
    rows = read_metrics(workdir / "metrics.jsonl")
    lines = {
        name: tuple(zip(*((row["step"], row[name]) for row in rows if name in row), strict=True))
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    prefix, score = "train/loss/", "eval/abs_rel"
    losses = {name.removeprefix(prefix): lines[name] for name in lines if name.startswith(prefix)}
    scores = {"AbsRel": lines[score]} if score in lines else {}
    return np.concatenate(
        [
            line_plot(losses, "losses, training", "step", "loss", logy=True),
            line_plot(scores, "AbsRel, validation", "step", "AbsRel"),
        ]
    )


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    logy: bool = False,
    *,
    size: tuple[int, int] = (720, 400),
) -> np.ndarray:
    """Curves {name: (x, y)} with axes and legend, uint8 [H, W, 3]; `size` is (width, height).

    What is not finite, or not positive where `logy`, breaks its line.
    """
    curves = {
        name: np.stack([np.asarray(axis, np.float64) for axis in curve])
        for name, curve in series.items()
    }
    for points in curves.values():
        points[1, ~np.isfinite(points).all(0) | (logy & (points[1] <= 0))] = np.nan
        if logy:
            points[1] = np.log10(points[1])
    shown = [points[:, np.isfinite(points[1])] for points in curves.values()]
    joined = np.concatenate([np.zeros((2, 0)), *shown], axis=1)
    if joined.size == 0:
        joined = np.array([[0.0, 1.0], [0.0, 1.0]])
    (x_low, y_low), (x_high, y_high) = joined.min(axis=1), joined.max(axis=1)
    x_high = x_high if x_high > x_low else x_low + 1
    room = 0.05 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    y_low, y_high = y_low - room, y_high + room

    # Pillow draws jagged lines: everything is drawn twice as large and then halved.
    zoom = 2
    font, bold = ImageFont.load_default(13 * zoom), ImageFont.load_default(16 * zoom)
    canvas = Image.new("RGB", (size[0] * zoom, size[1] * zoom), "white")
    pen = ImageDraw.Draw(canvas)
    y_ticks = _log_ticks(y_low, y_high) if logy else _ticks(y_low, y_high)
    names = {name: wrap(name, font, canvas.width // 4) for name in curves}
    legend = max((font.getlength(t) for lines in names.values() for t in lines), default=0)
    x0 = max((font.getlength(text) for _, text in y_ticks), default=0) + 24 * zoom
    x1 = canvas.width - legend - 52 * zoom
    y0, y1 = canvas.height - 50 * zoom, 58 * zoom

    def place(x, y):
        return (
            x0 + (x - x_low) / (x_high - x_low) * (x1 - x0),
            y0 + (y - y_low) / (y_high - y_low) * (y1 - y0),
        )

    pen.text((16 * zoom, 10 * zoom), title, INK, bold)
    pen.text((16 * zoom, 36 * zoom), ylabel, INK, font)
    pen.text(((x0 + x1) / 2, canvas.height - 10 * zoom), xlabel, INK, font, anchor="md")
    for value, text in y_ticks:
        y = place(x_low, value)[1]
        pen.line((x0, y, x1, y), PALE, zoom)
        pen.text((x0 - 7 * zoom, y), text, INK, font, anchor="rm")
    for value, text in _ticks(x_low, x_high):
        x = place(value, y_low)[0]
        pen.line((x, y0, x, y0 + 5 * zoom), INK, zoom)
        pen.text((x, y0 + 8 * zoom), text, INK, font, anchor="ma")
    pen.line((x0, y1, x0, y0, x1, y0), INK, zoom)

    y = y1
    for number, (name, points) in enumerate(curves.items()):
        color = LINES[number % len(LINES)]
        missing = np.flatnonzero(np.isnan(points[1]))
        for piece in np.split(points, missing, axis=1):
            piece = piece[:, np.isfinite(piece[1])]
            path = [place(*point) for point in piece.T]
            if len(path) > 1:
                pen.line(path, color, 2 * zoom, joint="curve")
            elif path:
                pen.circle(path[0], 3 * zoom, color)
        pen.line((x1 + 14 * zoom, y + 9 * zoom, x1 + 34 * zoom, y + 9 * zoom), color, 3 * zoom)
        for text in names[name]:
            pen.text((x1 + 40 * zoom, y + 9 * zoom), text, INK, font, anchor="lm")
            y += 18 * zoom
        y += 4 * zoom
    return np.array(canvas.resize(size, Image.Resampling.LANCZOS))


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About 8 round numbers in [low, high], steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, f"{number * step:.10g}") for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks for log10 values: powers of ten, with their 2 and 5 folds where those are few."""
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [
            (math.log10(factor) + power, f"{factor * 10.0**power:.10g}")
            for power in range(math.floor(low), math.ceil(high) + 1)
            for factor in factors
        ]
        ticks = [tick for tick in ticks if low <= tick[0] <= high]
        if len(ticks) > 2:
            return ticks[:: math.ceil(len(ticks) / 9)]
    return [(math.log10(v), t) for v, t in _ticks(10**low, 10**high)]
