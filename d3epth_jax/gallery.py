"""Pictures for people: galleries of predictions, and curves (NumPy and Pillow).

A gallery's row shows one image with its ground truth and predictions in one colour range, each
prediction followed by its error in a range fixed for the whole sheet.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d3epth_jax.image import visualize_depth

CELL_WIDTH = 240
MAX_ERROR = 0.3  # AbsRel at the dark end of the error scale
INK, PALE = (34, 34, 34), (222, 222, 222)
# Okabe and Ito's colours, told apart by the colour-blind too; yellow left out on white.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


class Row(NamedTuple):
    title: str
    cells: dict[str, np.ndarray]  # column title -> uint8 [H, W, 3]


def thin(array: np.ndarray) -> np.ndarray:
    """About every n-th pixel of [H, W, C], a copy, small enough to be kept until it is drawn."""
    step = max(1, array.shape[1] // (4 * CELL_WIDTH))
    # Each time another one of n: else depth on every n-th line may never be met.
    rows, columns = (
        np.minimum(np.arange(0, size, step) + np.arange(-(-size // step)) % step, size - 1)
        for size in array.shape[:2]
    )
    return array[rows[:, None], columns]


def depth_range(depth: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """2 and 98 % quantiles of the known depth (metres), the colour range of a row."""
    known = depth[mask]
    if known.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.quantile(known, (0.02, 0.98)))
    return low, max(high, low + 1e-3)


def depth_cell(
    depth: np.ndarray, low: float, high: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """Depth [H, W, 1] in colours: red at `low`, blue at `high`, grey where unknown."""
    mask = np.isfinite(depth) if mask is None else mask & np.isfinite(depth)
    return _cell(depth, mask, low, high, "Spectral")


def error_cell(
    prediction: np.ndarray, depth: np.ndarray, mask: np.ndarray, *, max_error: float = MAX_ERROR
) -> np.ndarray:
    """|prediction - depth| / depth of [H, W, 1], pale at 0 and dark red from `max_error` on."""
    error = np.abs(prediction - depth) / np.where(mask, depth, 1)
    return _cell(error, mask & np.isfinite(error), 0.0, max_error, "OrRd")


def _cell(values, mask, low, high, color_map) -> np.ndarray:
    values = np.where(mask, values, np.nan)
    if mask.mean() < 0.3:
        # Sparse points would vanish when the cell is shrunk: draw each as a small square.
        radius = max(1, round(values.shape[1] / CELL_WIDTH / 2))
        padded = np.pad(
            values, ((radius, radius), (radius, radius), (0, 0)), constant_values=np.nan
        )
        height, width = values.shape[:2]
        for top in range(2 * radius + 1):
            for left in range(2 * radius + 1):
                # fmin ignores NaN; where squares overlap, the nearer point stays in front.
                values = np.fmin(values, padded[top : top + height, left : left + width])
    return visualize_depth(values, color_map=color_map, val_min=low, val_max=high)


def row(
    image: np.ndarray,
    depth: np.ndarray,
    mask: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    *,
    title: str | None = None,
) -> Row:
    """One image's cells: picture uint8 [H,W,3], ground truth, and per prediction depth and error.

    Depth, mask and the aligned predictions are [H, W, 1], in metres. Without a title the row is
    labelled by its colour range. Cells are no wider than CELL_WIDTH.
    """
    low, high = depth_range(depth, mask)
    cells = {"image": image, "ground truth": depth_cell(depth, low, high, mask)}
    for name, prediction in predictions.items():
        cells[name] = depth_cell(prediction, low, high)
        cells[f"error: {name}"] = error_cell(prediction, depth, mask)
    cells = {
        name: np.asarray(_scaled(cell, min(CELL_WIDTH, cell.shape[1])))
        for name, cell in cells.items()
    }
    colours = f"{low:.1f} to\n{high:.1f} m"
    return Row(colours if title is None else f"{title}\n{colours}", cells)


class Galleries:
    """Two galleries that an evaluation fills as it goes: chosen images, and the worst ones.

    Only drawn rows are kept, so that a set of any length needs little memory.
    """

    def __init__(self, chosen: set[int], num_worst: int):
        self._chosen, self._num_worst = chosen, num_worst
        self._rows: dict[int, Row] = {}
        self._worst: list[tuple[float, int, Row]] = []

    def add(self, index: int, name: str, error: float, *arrays) -> None:
        """Draws an image if it is chosen or among the worst so far; `arrays` as `row` takes them.

        error: what "worst" means, NaN if there is none.
        """
        if index in self._chosen:
            self._rows[index] = row(*arrays)
        full = len(self._worst) == self._num_worst
        if self._num_worst and math.isfinite(error) and not (full and error <= self._worst[-1][0]):
            title = f"AbsRel {error:.3f}\n{textwrap.fill(name.replace('/', '/ '), 24)}"
            self._worst.append((error, index, row(*arrays, title=title)))
            self._worst.sort(key=lambda entry: (-entry[0], entry[1]))
            del self._worst[self._num_worst :]

    def sheets(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(chosen, worst first), uint8 [H,W,3] each, None without a row."""
        chosen = [self._rows[index] for index in sorted(self._rows)]
        worst = [row for _, _, row in self._worst]
        return tuple(sheet(rows) if rows else None for rows in (chosen, worst))


def sheet(rows: Sequence[Row], *, cell_width: int = CELL_WIDTH) -> np.ndarray:
    """Rows of one set of columns as a gallery with a legend of both colour scales."""
    titles = list(dict.fromkeys(title for row in rows for title in row.cells))
    body = contact_sheet(
        [[row.cells.get(title) for title in titles] for row in rows],
        titles,
        [row.title for row in rows],
        cell_width=cell_width,
    )
    legend = _legend(body.shape[1])
    room = ((0, 0), (0, legend.shape[1] - body.shape[1]), (0, 0))  # one column: the legend is wider
    return np.concatenate([np.pad(body, room, constant_values=255), legend])


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    *,
    cell_width: int = CELL_WIDTH,
) -> np.ndarray:
    """Cells uint8 [H, W, 3] in a titled grid, uint8 [H, W, 3]; None leaves a place empty.

    Every cell is scaled to `cell_width`, keeping its shape; a row is as high as its highest cell.
    """
    if len(rows) != len(row_titles) or any(len(row) != len(column_titles) for row in rows):
        raise ValueError(
            f"{len(rows)} rows of {sorted({len(row) for row in rows})} cells do not fit "
            f"{len(row_titles)} row titles and {len(column_titles)} column titles"
        )
    font = ImageFont.load_default(15)
    margin, gap, line = 14, 6, 19
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [pen.multiline_textbbox((0, 0), title, font)[2:] for title in row_titles]
    label_width = max((width for width, _ in labels), default=0)
    left = margin + math.ceil(label_width) + (12 if label_width else 0)
    headings = [_wrap(title, font, cell_width) for title in column_titles]
    top = margin + line * max((len(lines) for lines in headings), default=0) + gap
    scaled = [[_scaled(cell, cell_width) for cell in row] for row in rows]
    heights = [
        max([line, label, *(cell.height for cell in row if cell is not None)])
        for row, (_, label) in zip(scaled, labels, strict=True)
    ]

    width = left + len(column_titles) * (cell_width + gap) - gap + margin
    canvas = Image.new("RGB", (width, top + sum(heights) + gap * len(heights) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(headings):
        x = left + column * (cell_width + gap) + cell_width / 2
        for number, text in enumerate(reversed(lines)):  # headings stand on the grid
            pen.text((x, top - gap - number * line), text, INK, font, anchor="md")
    y = top
    for cells, title, height in zip(scaled, row_titles, heights, strict=True):
        if title:
            pen.multiline_text((margin, y + height / 2), title, INK, font, anchor="lm")
        for column, cell in enumerate(cells):
            if cell is not None:
                canvas.paste(cell, (left + column * (cell_width + gap), y))
        y += height + gap
    return np.array(canvas)


def _scaled(cell: np.ndarray | None, width: int) -> Image.Image | None:
    if cell is None:
        return None
    height = max(1, round(cell.shape[0] * width / cell.shape[1]))
    return Image.fromarray(cell).resize((width, height), Image.Resampling.BILINEAR)


def _wrap(text: str, font, width: int) -> list[str]:
    """Words in lines no wider than `width`; a word too long for a line loses its end."""
    lines = [""]
    for word in text.split():
        if font.getlength(word) > width:
            while word and font.getlength(word + "…") > width:
                word = word[:-1]
            word += "…"
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _legend(width: int) -> np.ndarray:
    """Both colour scales with their ends, beside each other or, on a narrow sheet, below."""
    font = ImageFont.load_default(14)
    scales = (
        ("depth, 2 to 98 % of each row's ground truth:", "Spectral", "near", "far"),
        ("error |p - d| / d:", "OrRd", "0", f"{MAX_ERROR:g} or more"),
    )
    ramp = np.linspace(0, 1, 110)[None, :, None].repeat(12, axis=0)
    pieces = []
    for title, color_map, low, high in scales:
        texts = [font.getlength(text) for text in (title, low, high)]
        strip = Image.new("RGB", (math.ceil(sum(texts)) + 110 + 3 * 8 + 28, 24), "white")
        pen, x = ImageDraw.Draw(strip), 14
        pen.text((x, 12), title, INK, font, anchor="lm")
        x += texts[0] + 8
        pen.text((x, 12), low, INK, font, anchor="lm")
        x += texts[1] + 8
        colors = visualize_depth(ramp, color_map=color_map)
        strip.paste(Image.fromarray(colors), (round(x), 6))
        pen.text((x + 110 + 8, 12), high, INK, font, anchor="lm")
        pieces.append(strip)
    beside = sum(piece.width for piece in pieces) <= width
    width = max(width, *(piece.width for piece in pieces))
    canvas = Image.new("RGB", (width, 34 if beside else 58), "white")
    x, y = 0, 2
    for piece in pieces:
        canvas.paste(piece, (x, y))
        x, y = (x + piece.width, y) if beside else (x, y + piece.height)
    return np.array(canvas)


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
    names = {name: _wrap(name, font, canvas.width // 4) for name in curves}
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
