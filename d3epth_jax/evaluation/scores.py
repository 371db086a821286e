"""Evaluation of any predictor over any source (METHOD 10): per image, per group, as pictures."""

import csv
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from d3epth_jax import atomic, gallery, metrics
from d3epth_jax import image as image_lib
from d3epth_jax.data import read_samples
from d3epth_jax.evaluation.protocols import PROTOCOLS, Protocol
from d3epth_jax.progress import Progress
from d3epth_jax.tables import format_table

COLUMNS = {  # of the table; metric key: (title, digits). All metrics are in the files.
    "abs_rel": ("AbsRel", 4),
    "delta1": ("delta1", 3),
    "rmse": ("RMSE", 3),
    "silog": ("SILog", 1),
    "boundary_f1": ("F1", 3),
    "dbe_acc": ("DBE acc", 2),
    "dbe_comp": ("DBE comp", 2),
    "negative_scale": ("s<0", 3),
}
LABELS = ("predictor", "image", "group")  # what a row holds besides its metrics
MAX_GROUPS = 12  # more columns no one can read
MAX_PIXELS = 2**24  # of a batch: large pictures come in smaller batches


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A way to predict depth.

    Attributes:
      predict: pictures uint8 [N,H,W,3] and the N samples' names to predictions [N,H,W,1], up to
        scale and shift.
      space: what grows in the prediction, METHOD 2: depth | disparity | sqrt_disparity.
      note: how it predicts, such as the processing resolution, told with the results.
      shuffled: give it another image's picture, half the set away, while the depth stays: what
        remains of a score then does not come from looking at the picture.
    """

    predict: Callable[[np.ndarray, Sequence[str]], np.ndarray]
    space: str = "depth"
    note: str = ""
    shuffled: bool = False


@dataclasses.dataclass(frozen=True)
class Results:
    """Scores of an evaluation.

    Attributes:
      protocol: Markdown that says how the numbers were made, in full.
      rows: a dict per image and predictor: predictor, image, group, and the metrics.
      pictures: the gallery, uint8 [H,W,3], or None.
      worst: the gallery of the worst images, or None.
    """

    protocol: str
    rows: list[dict]
    pictures: np.ndarray | None = None
    worst: np.ndarray | None = None

    def mean(self, predictor: str, metric: str = "abs_rel", group: str | None = None) -> float:
        """Unweighted mean over the images of a predictor, or over those of one group.

        Images on which a metric is not defined (no valid pixel) do not count; NaN if none is left.
        """
        values = [
            row.get(metric, np.nan)
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

    @property
    def metrics(self) -> list[str]:
        return [
            key for key in dict.fromkeys(k for row in self.rows for k in row) if key not in LABELS
        ]

    def mean_over_groups(self, predictor: str) -> float:
        """Mean AbsRel per group, then over groups: a source with many pictures counts once."""
        return float(np.mean([self.mean(predictor, group=group) for group in self.groups]))

    def table(self) -> str:
        """Markdown tables that also read well on a terminal, under the protocol."""
        columns = {key: COLUMNS[key] for key in COLUMNS if key in self.metrics}
        header = ["predictor", *(title for title, _ in columns.values())]
        rows = [
            [name, *(f"{self.mean(name, key):.{digits}f}" for key, (_, digits) in columns.items())]
            for name in self.predictors
        ]
        text = [self.protocol, "", format_table(header, rows)]
        if 1 < len(self.groups) <= MAX_GROUPS:
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
        """Writes NAME.csv (a line per image and predictor), .md, .json, .png and _worst.png."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*LABELS, *self.metrics], restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        (directory / f"{name}.md").write_text(self.table() + "\n")
        summary = {
            "protocol": self.protocol,
            "mean": {
                p: {key: _or_none(self.mean(p, key)) for key in self.metrics}
                for p in self.predictors
            },
            "abs_rel_by_group": {
                p: {group: _or_none(self.mean(p, group=group)) for group in self.groups}
                for p in self.predictors
            },
        }
        for end, pictures in (("", self.pictures), ("_worst", self.worst)):
            path = directory / f"{name}{end}.png"
            path.unlink(missing_ok=True)  # an evaluation before may have made one
            if pictures is not None:
                image_lib.save_png(path, pictures)
        # Last, and whole or not at all: where it is, all is there.
        atomic.write_json(directory / f"{name}.json", summary)


def evaluate(
    predictors: Mapping[str, Predictor],
    source,
    protocol: Protocol = PROTOCOLS["default"],
    *,
    title: str = "evaluation",
    data: str = "",
    num_images: int | None = None,
    batch_size: int = 16,
    num_pictures: int = 8,
    pictured: Sequence[str] | None = None,
    num_worst: int = 0,
    worst_of: str | None = None,
) -> Results:
    """Scores predictors on a source of {image, depth in metres, mask}, as a protocol says.

    Samples that have "edges" (bool [H,W,1], iBims-1) are also scored by their boundary errors.

    Args:
      source: `__len__`, `__getitem__`, and if it has them `name(i)`, `group(i)` and `shape(i)`.
      data: what the source is, told with the results.
      num_images: evaluate so many only, evenly spread over the source; None or 0 all.
      batch_size: pictures given to a predictor at once; fewer if they are large.
      num_pictures: rows of the gallery, evenly spread over the images; 0 for none.
      pictured: predictors shown in the galleries, None all.
      num_worst: rows of the gallery of the images on which `worst_of` (None: the first predictor
        that is shown) has the highest AbsRel.

    Raises ValueError if there is nothing to evaluate or a predictor's answer is unusable.
    """
    evaluated = spread(len(source), num_images)
    count = len(evaluated)
    if not count or not predictors:
        raise ValueError("nothing to evaluate: no image, or no predictor")
    if count == 1 and any(predictor.shuffled for predictor in predictors.values()):
        raise ValueError("a shuffled predictor needs a second image to be shown instead")
    pictured = [name for name in predictors if pictured is None or name in pictured]
    worst_of = worst_of or next(iter(pictured), next(iter(predictors)))
    galleries = gallery.Galleries(
        {evaluated[i] for i in (spread(count, num_pictures) if num_pictures else ())}, num_worst
    )
    rows, sizes, known = [], set(), 0
    progress = Progress(title, count, unit="image")
    done = 0
    for indices in _batches(source, evaluated, batch_size):
        samples = read_samples(source, indices)
        counted = [protocol.valid(sample["depth"], sample["mask"]) for sample in samples]
        known += sum(bool(pixels.any()) for pixels in counted)
        sizes |= {sample["depth"].shape[:2] for sample in samples}
        kept, errors = [{} for _ in indices], [np.nan for _ in indices]
        for name, predictor in predictors.items():
            predictions = _predict(name, predictor, source, indices, samples, evaluated)
            for j, index in enumerate(indices):
                scores, metres = score(
                    predictions[j], samples[j], counted[j], predictor.space, protocol
                )
                labels = name, name_of(source, index), _group(source, index)
                rows.append(dict(zip(LABELS, labels, strict=True)) | scores)
                if name in pictured:
                    kept[j][name] = gallery.thin(metres).astype(np.float32)
                if name == worst_of:
                    errors[j] = scores["abs_rel"]
                del metres  # before the next one is made: it may have 24 megapixels
        for j, index in enumerate(indices):
            truth = (samples[j]["image"], samples[j]["depth"], counted[j])
            name = name_of(source, index)
            galleries.add(index, name, errors[j], *map(gallery.thin, truth), kept[j])
        done += len(indices)
        progress.update(done)
    pictures, worst = galleries.sheets()
    header = _header(title, data, protocol, predictors, count, len(source), known, sizes)
    if worst is not None:
        header += f"\n- worst images: by AbsRel of {worst_of}"
    return Results(header, rows, pictures, worst)


def score(
    prediction: np.ndarray,
    sample: Mapping[str, np.ndarray],
    counted: np.ndarray,
    space: str,
    protocol: Protocol,
) -> tuple[dict[str, float], np.ndarray]:
    """(metrics, aligned prediction in metres float64 [H,W,1]) of one prediction [H,W,1].

    counted: the pixels that count, bool [H,W,1].
    """
    low, high = protocol.clip_range
    truth = sample["depth"][None], counted[None]
    aligned, scale = metrics.align_to_metric(
        prediction[None],
        *truth,
        space=space,
        alignment=protocol.alignment,
        min_depth=low,
        max_depth=high,
        max_resolution=protocol.fit_resolution,
    )
    # The range is in `counted` already, and the prediction clipped to its own.
    scores = metrics.compute(aligned, *truth, min_depth=0, max_depth=np.inf)
    scores = {key: float(value[0]) for key, value in scores.items()}
    scores["boundary_f1"] = float(metrics.boundary_f1(aligned, *truth)[0])
    if "edges" in sample:
        edges = sample["edges"][..., 0]
        scores |= metrics.depth_boundary_errors(aligned[0, ..., 0], edges)
    scores["negative_scale"] = float(scale[0] < 0) if counted.any() else np.nan
    return scores, aligned[0]


def batch_size_for(size: tuple[int, int], batch_size: int) -> int:
    """How many pictures of (H, W) pixels are worked on at once: at most `batch_size`."""
    return max(1, min(batch_size, MAX_PIXELS // (size[0] * size[1])))


def _predict(
    name: str,
    predictor: Predictor,
    source,
    indices: Sequence[int],
    samples: Sequence[Mapping[str, np.ndarray]],
    evaluated: Sequence[int],
) -> np.ndarray:
    """Predictions [N,H,W,1] for a batch, checked; ValueError says what is wrong with them."""
    size = samples[0]["image"].shape[:2]
    shown = list(indices)
    if predictor.shuffled:
        half_way = {i: evaluated[j - len(evaluated) // 2] for j, i in enumerate(evaluated)}
        shown = [half_way[i] for i in indices]
        samples = read_samples(source, shown)
    images = np.stack([_picture(sample, size) for sample in samples])
    prediction = np.asarray(predictor.predict(images, [name_of(source, i) for i in shown]))
    if prediction.shape != (expected := (len(indices), *size, 1)):
        raise ValueError(f"{name} predicts {list(prediction.shape)}, expected {list(expected)}")
    finite = [bool(np.isfinite(each).all()) for each in prediction]
    if not all(finite):
        broken = [name_of(source, i) for i, f in zip(indices, finite, strict=True) if not f]
        raise ValueError(f"{name} predicts NaN or infinity on {', '.join(broken)}")
    return prediction


def _header(
    title: str,
    data: str,
    protocol: Protocol,
    predictors: Mapping[str, Predictor],
    count: int,
    available: int,
    known: int,
    sizes: set[tuple[int, int]],
) -> str:
    """All that is needed to know what the numbers are, and to compare them, in Markdown."""
    images = f"{count} image{'s' * (count != 1)}, {known} with valid pixels"
    if count < available:
        images += f", evenly spread over {available}"
    if protocol.num_images == count:
        images += f": as many as the published split has ({protocol.split})"
    elif protocol.num_images:
        images += (
            f"; the published split has {protocol.num_images} ({protocol.split}):"
            " its numbers do not compare with these"
        )
    elif protocol.split:
        images += f"; {protocol.split}"
    smallest, largest = (f"{h}x{w}" for h, w in (min(sizes), max(sizes)))
    pixels = smallest if smallest == largest else f"{smallest} to {largest}"
    lines = [f"data: {data}"] if data else []
    lines += [f"images: {images}", f"ground truth: {pixels} pixels (height x width)"]
    lines += protocol.describe()
    for name, predictor in predictors.items():
        space = protocol.alignment or predictor.space
        told = f"{name}: predicts {predictor.space}"
        if space != "none":
            told += f", aligned in {space}"
        if space not in ("depth", "none"):
            least = metrics.LEAST_DISPARITY
            told += f" (fit over prediction > 0; fitted values raised to {least:g}, then inverted)"
        lines.append(told + f"; {predictor.note}" * bool(predictor.note))
    lines.append(
        "metrics: per image at the ground truth's size, then the unweighted mean over the images"
        " that have valid pixels"
    )
    return "\n".join([f"{title}, protocol {protocol.name}", "", *(f"- {line}" for line in lines)])


def name_of(source, index: int) -> str:
    """A sample's name, or its number where the source has no names."""
    return source.name(index) if hasattr(source, "name") else f"{index:06d}"


def _group(source, index: int) -> str:
    return source.group(index) if hasattr(source, "group") else "all"


def _picture(sample: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    picture = sample["image"]
    if picture.shape[:2] == size:
        return picture
    resized = image_lib.resize(picture.astype(np.float32), size, antialias=True)
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


def spread(available: int, wanted: int | None) -> list[int]:
    """`wanted` indices evenly spread, first and last among them; all for None or 0."""
    if not wanted or wanted >= available:
        return list(range(available))
    return np.linspace(0, available - 1, wanted).round().astype(int).tolist()


def _batches(source, evaluated: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Runs of successive indices whose pictures have one size, fewer of large ones."""
    batch, size, limit = [], None, batch_size
    for index in evaluated:
        this = source.shape(index) if hasattr(source, "shape") else None
        if batch and (this != size or len(batch) == limit):
            yield batch
            batch = []
        batch.append(index)
        size, limit = this, batch_size_for(this, batch_size) if this else batch_size
    yield batch


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
