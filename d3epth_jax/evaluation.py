"""Evaluation of any predictor over any source (METHOD 10): per image, per group, as pictures."""

import csv
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from d3epth_jax import gallery, metrics
from d3epth_jax import image as image_lib
from d3epth_jax.data import read_samples
from d3epth_jax.progress import Progress

COLUMNS = {  # metric key: (title, better is, digits)
    "abs_rel": ("AbsRel", "lower", 4),
    "delta1": ("delta1", "higher", 3),
    "rmse": ("RMSE", "lower", 3),
    "silog": ("SILog", "lower", 1),
    "boundary_f1": ("F1", "higher", 3),
    "negative_scale": ("s<0", "lower", 3),
}


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A way to predict depth.

    Attributes:
      predict: pictures uint8 [N,H,W,3] to predictions [N,H,W,1], up to scale and shift.
      space: what grows in the prediction, METHOD 2: depth | disparity | sqrt_disparity.
      shuffled: give it another image's picture, half the set away, while the depth stays: what
        remains of a score then does not come from looking at the picture.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    space: str = "depth"
    shuffled: bool = False


@dataclasses.dataclass(frozen=True)
class Results:
    """Scores of an evaluation.

    Attributes:
      protocol: one line that says how the numbers were made.
      rows: a dict per image and predictor: predictor, image, group, and the metrics.
      pictures: the gallery, uint8 [H,W,3], or None.
    """

    protocol: str
    rows: list[dict]
    pictures: np.ndarray | None

    def mean(self, predictor: str, metric: str = "abs_rel", group: str | None = None) -> float:
        """Unweighted mean over the images of a predictor, or over those of one group.

        Images on which a metric is not defined (no valid pixel) do not count; NaN if none is left.
        """
        values = [
            row[metric]
            for row in self.rows
            if row["predictor"] == predictor and group in (None, row["group"])
        ]
        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else float("nan")

    @property
    def predictors(self) -> list[str]:
        return list(dict.fromkeys(row["predictor"] for row in self.rows))

    @property
    def groups(self) -> list[str]:
        return sorted({row["group"] for row in self.rows})

    def mean_over_groups(self, predictor: str, metric: str = "abs_rel") -> float:
        """Mean per group, then over groups: a source with many pictures counts once."""
        return float(np.mean([self.mean(predictor, metric, group) for group in self.groups]))

    def table(self) -> str:
        """Markdown tables that also read well on a terminal, under the protocol."""
        header = ["predictor", *(title for title, _, _ in COLUMNS.values())]
        rows = [
            [
                name,
                *(f"{self.mean(name, key):.{digits}f}" for key, (_, _, digits) in COLUMNS.items()),
            ]
            for name in self.predictors
        ]
        text = [self.protocol, "", format_table(header, rows)]
        if len(self.groups) > 1:
            header = ["AbsRel by source", *self.groups, "mean of sources"]
            rows = [
                [
                    name,
                    *(f"{self.mean(name, group=group):.4f}" for group in self.groups),
                    f"{self.mean_over_groups(name):.4f}",
                ]
                for name in self.predictors
            ]
            text += ["", format_table(header, rows)]
        return "\n".join(text)

    def save(self, directory: pathlib.Path, name: str = "evaluation") -> None:
        """Writes NAME.csv (a line per image and predictor), .md, .json and .png (the gallery)."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        (directory / f"{name}.md").write_text(self.table() + "\n")
        keys = [key for key in self.rows[0] if key not in ("predictor", "image", "group")]
        means = {p: {key: _or_none(self.mean(p, key)) for key in keys} for p in self.predictors}
        summary = {"protocol": self.protocol, "mean": means}
        (directory / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
        if self.pictures is not None:
            image_lib.save_png(directory / f"{name}.png", self.pictures)


def evaluate(
    predictors: Mapping[str, Predictor],
    source,
    *,
    min_depth: float,
    max_depth: float,
    title: str = "evaluation",
    num_images: int | None = None,
    batch_size: int = 16,
    num_pictures: int = 8,
    pictured: tuple[str, ...] | None = None,
) -> Results:
    """Scores predictors on a source of {image, depth in metres, mask}.

    Per image: least squares in the predictor's space over mask & min < d < max (metres), clipped to
    that range, then the metrics at the ground truth's resolution.

    Args:
      source: `__len__`, `__getitem__`, and if it has them `name(i)` and `group(i)`.
      num_images: evaluate the first so many only; None all.
      num_pictures: rows of the gallery, evenly spread over the images; 0 for none.
      pictured: predictors shown in the gallery, None all.
    """
    count = min(len(source), num_images or len(source))
    if not count or not predictors:
        raise ValueError("nothing to evaluate: no image, or no predictor")
    shown = (
        set(np.linspace(0, count - 1, num_pictures).round().astype(int)) if num_pictures else set()
    )
    rows, cells, known = [], {}, 0
    progress = Progress(title, count, unit="image")
    for indices in _batches_of_one_size(source, count, batch_size):
        samples = read_samples(source, indices)
        images, depth, mask = (
            np.stack([s[key] for s in samples]) for key in ("image", "depth", "mask")
        )
        counted = mask & (depth > min_depth) & (depth < max_depth)
        known += int(counted.any((1, 2, 3)).sum())
        for name, predictor in predictors.items():
            if predictor.shuffled:
                others = [(i + max(1, count // 2)) % count for i in indices]
                size = images.shape[1:3]
                pictures = np.stack([_picture(s, size) for s in read_samples(source, others)])
            else:
                pictures = images
            prediction = _padded(predictor.predict, pictures, batch_size)
            finite = np.isfinite(prediction).all((1, 2, 3))
            if not finite.all():
                broken = [_name(source, i) for i, f in zip(indices, finite, strict=True) if not f]
                raise ValueError(f"{name} predicts NaN or infinity on {', '.join(broken)}")
            scores, aligned = _padded(
                functools.partial(_score, predictor.space, min_depth, max_depth),
                (prediction, depth, counted),
                batch_size,
            )
            for j, index in enumerate(indices):
                rows.append(
                    {
                        "predictor": name,
                        "image": _name(source, index),
                        "group": source.group(index) if hasattr(source, "group") else "all",
                        **{key: float(value[j]) for key, value in scores.items()},
                    }
                )
                if index in shown and (pictured is None or name in pictured):
                    cells.setdefault(index, {})[name] = np.asarray(aligned[j])
        for j, index in enumerate(indices):
            if index in cells:
                cells[index] = gallery.row(images[j], depth[j], counted[j], cells[index])
        progress.update(indices[-1] + 1)
    spaces = sorted({predictor.space for predictor in predictors.values()})
    return Results(
        protocol=(
            f"{title}: {known} of {count} images have valid pixels;"
            f" least squares in {' / '.join(spaces)} over valid pixels with"
            f" {min_depth:g} < d < {max_depth:g} m, clipped to that range; mean over images"
        ),
        rows=rows,
        pictures=gallery.sheet([cells[i] for i in sorted(cells)]) if cells else None,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(space: str, min_depth: float, max_depth: float, arrays) -> tuple[dict, jax.Array]:
    prediction, depth, counted = arrays
    aligned, scale = metrics.align_to_metric(
        prediction, depth, counted, space=space, min_depth=min_depth, max_depth=max_depth
    )
    scores = metrics.compute(aligned, depth, counted, min_depth=min_depth, max_depth=max_depth)
    scores["boundary_f1"] = metrics.boundary_f1(aligned, depth, counted)
    scores["negative_scale"] = (scale < 0).astype(np.float32)
    return scores, aligned


def _padded(function, arrays, batch_size: int):
    """Calls with the last item repeated up to `batch_size`: one compilation per picture size."""
    count = len(jax.tree.leaves(arrays)[0])
    fill = batch_size - count
    full = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], fill, 0)]), arrays)
    return jax.tree.map(lambda x: np.asarray(x)[:count], function(full))


def _name(source, index: int) -> str:
    return source.name(index) if hasattr(source, "name") else f"{index:06d}"


def _picture(sample: dict, size: tuple[int, int]) -> np.ndarray:
    picture = sample["image"]
    if picture.shape[:2] == size:
        return picture
    resized = image_lib.resize(picture.astype(np.float32), size, antialias=True)
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


def _batches_of_one_size(source, count: int, batch_size: int):
    """Runs of successive indices whose pictures have one size."""
    batch, size = [], None
    for index in range(count):
        this = source.shape(index) if hasattr(source, "shape") else None
        if batch and (this != size or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(index)
        size = this
    yield batch


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        first, *rest = (cell for cell in cells)
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
