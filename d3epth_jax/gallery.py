"""Pictures for people: galleries of predictions (NumPy and Pillow).

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
INK = (34, 34, 34)


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
    return _cell(error, mask & np.isfinite(error), 0.0, max_error, "OrRd", np.fmax)


def _cell(values, mask, low, high, color_map, over=np.fmin) -> np.ndarray:
    """In colours. Where sparse values overlap, `over` chooses: the nearer depth, the larger error.

    It ignores NaN, as np.fmin and np.fmax do.
    """
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
                values = over(values, padded[top : top + height, left : left + width])
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
    headings = [wrap(title, font, cell_width) for title in column_titles]
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


def wrap(text: str, font, width: int) -> list[str]:
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
