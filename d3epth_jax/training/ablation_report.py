"""What an ablation shows: means over seeds, differences paired by seed, tables and a chart.

Everything is computed from the evaluations' files (`evaluation.json`, of a model called `model`).
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from scipy import special

from d3epth_jax import atomic
from d3epth_jax import image as image_lib
from d3epth_jax.tables import format_table


@dataclasses.dataclass(frozen=True)
class Measure:
    """title; digits shown; sign: 1 where more is better, -1 where less is."""

    title: str
    digits: int
    sign: int


MEASURES = {
    "abs_rel": Measure("AbsRel", 4, -1),
    "delta1": Measure("delta1", 3, 1),
    "boundary_f1": Measure("F1", 4, 1),
    "f1_above_chance": Measure("F1 above chance", 4, 1),
    "real": Measure("AbsRel, real", 4, -1),
}
NOTES = (
    "Mean ± standard deviation over seeds. Steps and MACs: of the arm's training with all that it"
    " goes on from; what the teacher computes in it counts, the teacher's own training does not."
    " GMACs per step: of the last training's gradient, its whole batch, counted in the trace of the"
    " loss.",
    "Differences are paired by seed: their mean ± its standard error (deviation / sqrt(n)), and"
    " what is claimed: better or worse only beyond two standard errors, nothing of one seed."
    " With three seeds chance alone passes that bar in 18 of 100 comparisons: **bold** is what also"
    " passes Student's t at 5 %. Seeds share the teacher and the pictures: what another of these"
    " would change is not in it.",
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm: title, its seeds, steps in all, MACs of a step of its last training, MACs in all."""

    title: str
    seeds: tuple[int, ...]
    steps: int
    step_macs: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The mean of n paired differences, its standard error (NaN for one), and what is claimed.

    firm: the claim also passes Student's t, two-sided at 5 %.
    """

    difference: float
    error: float
    n: int
    verdict: str
    firm: bool


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN of no value, and for the deviation of one."""
    values = list(values)
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def compare(ours: Mapping[int, float], theirs: Mapping[int, float], sign: int) -> Comparison:
    """Two arms' values by seed, over the seeds that both have.

    sign: 1 where more is better, -1 where less is. A difference is claimed beyond two standard
    errors, not of one seed.
    """
    both = sorted(ours.keys() & theirs.keys())
    mean, deviation = mean_and_deviation(ours[seed] - theirs[seed] for seed in both)
    error = deviation / math.sqrt(len(both)) if both else math.nan
    if len(both) < 2:
        verdict = "one seed" if both else "no common seed"
    elif abs(mean) > 2 * error:
        verdict = "better" if sign * mean > 0 else "worse"
    else:
        verdict = "no difference shown"
    student = special.stdtrit(len(both) - 1, 0.975)  # 5 % lie beyond, both sides together
    firm = verdict in ("better", "worse") and bool(abs(mean) > student * error)
    return Comparison(mean, error, len(both), verdict, firm)


def write(
    workdir: pathlib.Path, arms: Mapping[str, Arm], comparisons: Sequence[tuple[str, str]]
) -> None:
    """Writes ablation.{json,md,png} of all evaluations there are so far."""
    content = collect(workdir, arms, comparisons)
    atomic.write_json(workdir / "ablation.json", content)
    atomic.write_text(workdir / "ablation.md", markdown(content))
    image_lib.save_png(workdir / "ablation.png", chart(content))


def collect(
    workdir: pathlib.Path, arms: Mapping[str, Arm], comparisons: Sequence[tuple[str, str]]
) -> dict:
    """All numbers of the report, as JSON has them: null is not a number."""
    rows = {}
    for name, arm in arms.items():
        found = {seed: read(workdir / f"seed{seed}" / name) for seed in arm.seeds}
        found = {seed: scores for seed, scores in found.items() if scores}
        if found:
            rows[name] = {**dataclasses.asdict(arm), "scores": by_seed(found)}
    evaluated = [
        json.loads(path.read_text())
        for name in ("scenes", "real")
        if (path := workdir / "teacher" / name / "evaluation.json").is_file()
    ]
    protocols = [each["protocol"] for each in evaluated]
    reference = {  # baselines, and the teacher
        name.replace("model", "teacher"): read(workdir / "teacher", name)
        for name in (evaluated[0]["mean"] if evaluated else ())
    }
    pairs = [
        {
            "arm": arm,
            "against": other,
            "measure": measure,
            **dataclasses.asdict(
                compare(rows[arm]["scores"][measure], rows[other]["scores"][measure], how.sign)
            ),
        }
        for arm, other in comparisons
        if arm in rows and other in rows
        for measure, how in MEASURES.items()
        if measure in rows[arm]["scores"] and measure in rows[other]["scores"]
    ]
    content = {"protocols": protocols, "reference": reference, "arms": rows, "comparisons": pairs}
    # As it is read back: seeds become words, and NaN null.
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def read(folder: pathlib.Path, predictor: str = "model") -> dict[str, float]:
    """{metric, "real" or real/SOURCE: value} of the evaluations in a folder, those there are."""
    scores = {}
    if (path := folder / "scenes/evaluation.json").is_file():
        mean = json.loads(path.read_text())["mean"]
        scores |= mean[predictor]
        chance = mean.get(f"{predictor}, pictures shuffled", {}).get("boundary_f1")
        if chance is not None and scores["boundary_f1"] is not None:
            scores["f1_above_chance"] = scores["boundary_f1"] - chance
    if (path := folder / "real/evaluation.json").is_file():
        groups = json.loads(path.read_text())["abs_rel_by_group"].get(predictor, {})
        if groups and None not in groups.values():
            scores["real"] = statistics.fmean(groups.values())
        scores |= {f"real/{name}": value for name, value in groups.items()}
    return {name: value for name, value in scores.items() if value is not None}


def by_seed(found: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """{measure: {seed: value}} of {seed: {measure: value}}."""
    names = dict.fromkeys(name for scores in found.values() for name in scores)
    return {
        name: {seed: scores[name] for seed, scores in found.items() if name in scores}
        for name in names
    }


def markdown(content: Mapping) -> str:
    """The tables, under the protocols."""
    shown = measures_of(content)
    sources = sorted(
        {
            key
            for row in content["arms"].values()
            for key in row["scores"]
            if key.startswith("real/")
        }
    )
    text = ["# Ablation", *content["protocols"], *NOTES]
    header = ["arm", *(MEASURES[name].title for name in shown), "seeds", "steps"]
    header += ["GMACs per step", "TMACs"]
    digits = {name: MEASURES[name].digits for name in shown}
    text.append(format_table(header, _rows(content, digits, budget=True)))
    if sources:
        header = ["AbsRel by source", *(name.removeprefix("real/") for name in sources)]
        text.append(format_table(header, _rows(content, dict.fromkeys(sources, 3))))
    if content["comparisons"]:
        header = ["arm", "against", *(MEASURES[name].title for name in shown), "seeds"]
        text.append(format_table(header, _compared(content, shown)))
    return "\n\n".join(text) + "\n"


def measures_of(content: Mapping) -> list[str]:
    return [m for m in MEASURES if any(m in row["scores"] for row in content["arms"].values())]


def _rows(content: Mapping, digits: Mapping[str, int], budget: bool = False) -> Iterable[list[str]]:
    for title, scores in content["reference"].items():
        cells = [_text(scores.get(name), number) for name, number in digits.items()]
        yield [title, *cells, *[""] * (4 * budget)]
    for row in content["arms"].values():
        cells = []
        for name, number in digits.items():
            values = row["scores"].get(name, {}).values()
            mean, deviation = mean_and_deviation(values)
            spread = f" ± {_text(deviation, number)}" if len(values) > 1 else ""
            cells.append(_text(mean, number) + spread)
        if budget:
            cells.append(str(max(len(values) for values in row["scores"].values())))
            cells += [str(row["steps"]), f"{row['step_macs'] / 1e9:.3g}"]
            cells.append(f"{row['macs'] / 1e12:.4g}")
        yield [row["title"], *cells]


def _compared(content: Mapping, shown: Sequence[str]) -> Iterable[list[str]]:
    pairs = {}
    for pair in content["comparisons"]:
        pairs.setdefault((pair["arm"], pair["against"]), {})[pair["measure"]] = pair
    for names, found in pairs.items():
        yield [
            *(content["arms"][name]["title"] for name in names),
            *(_claim(found[name]) if name in found else "-" for name in shown),
            str(max(pair["n"] for pair in found.values())),
        ]


def _claim(pair: Mapping) -> str:
    digits, error = MEASURES[pair["measure"]].digits, pair["error"]
    if error:  # to its first digit
        digits = max(digits, min(6, -math.floor(math.log10(error))))
    spread = "" if error is None else f" ± {_text(error, digits)}"
    verdict = pair["verdict"] if pair["verdict"] in ("better", "worse") else ""
    verdict = f"**{verdict}**" if pair["firm"] else verdict
    return f"{_text(pair['difference'], digits, '+')}{spread} {verdict}".rstrip()


def _text(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


ROW, PANEL, TOP, HEAD, GAP = 34, 300, 30, 30, 40  # pixels of the chart
SEED, MEAN = (120, 160, 210), (30, 60, 120)


def chart(content: Mapping) -> Image.Image:
    """A column for each measure, a row for the teacher and each arm: seeds, mean ± deviation.

    Arms that are compared, directly or through others, have an axis of their own.
    """
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    blocks, shown = _blocks(content), measures_of(content)
    left = 30 + int(max(font.getlength(title) for rows in blocks for title in rows))
    height = TOP + sum(HEAD + ROW * len(rows) for rows in blocks) + 20
    image = Image.new("RGB", (left + len(shown) * (PANEL + GAP), height), "white")
    pen = ImageDraw.Draw(image)
    lefts = {measure: left + column * (PANEL + GAP) for column, measure in enumerate(shown)}
    for measure, x in lefts.items():
        how = MEASURES[measure]
        title = f"{how.title} ({'more' if how.sign > 0 else 'less'} is better)"
        pen.text((x + PANEL / 2, 14), title, "black", font, anchor="mm")
    top = TOP
    for rows in blocks:
        top += HEAD
        for number, title in enumerate(rows):
            y = top + ROW * number + ROW // 2
            pen.text((left - 16, y), title, "black", font, anchor="rm")
            pen.line((left, y, image.width - GAP, y), fill=(230, 230, 230))
        for measure, x in lefts.items():
            values = [list(scores.get(measure, {}).values()) for scores in rows.values()]
            _panel(pen, (x, top), MEASURES[measure].digits, values, small)
        top += ROW * len(rows)
    return image


def _blocks(content: Mapping) -> list[dict[str, Mapping]]:
    """{title: scores} of arms that hang together by comparisons, then of teacher and all others.

    Comparisons of one seed claim nothing, so these do not spread two points over an axis.
    """
    together = {name: {name} for name in content["arms"]}
    for pair in content["comparisons"]:
        if pair["n"] > 1:
            union = together[pair["arm"]] | together[pair["against"]]
            together |= dict.fromkeys(union, union)
    blocks, rest = {}, {}
    if teacher := content["reference"].get("teacher"):
        rest["teacher"] = {measure: {"": value} for measure, value in teacher.items()}
    for name, arm in content["arms"].items():
        alone = len(together[name]) == 1
        block = rest if alone else blocks.setdefault(min(together[name]), {})
        block[arm["title"]] = arm["scores"]
    return [block for block in (*blocks.values(), rest) if block]


def _panel(pen: ImageDraw.ImageDraw, corner: tuple[int, int], digits: int, rows, font) -> None:
    """One measure's values of every row, by seed, in a range of its own."""
    left, top = corner
    bars = [_bar(row) for row in rows]
    every = [value for row in (*rows, *bars) for value in row]
    if not every:
        return
    air = 0.05 * (max(every) - min(every)) or 0.05 * abs(max(every)) or 0.5
    low, high = min(every) - air, max(every) + air

    def at(value: float) -> float:
        return left + PANEL * (value - low) / (high - low)

    for value, anchor in ((low, "lm"), (high, "rm")):
        x = at(value)
        pen.text((x, top - 10), f"{value:.{digits}f}", "black", font, anchor=anchor)
        pen.line((x, top, x, top + ROW * len(rows)), fill=(200, 200, 200))
    for number, (row, bar) in enumerate(zip(rows, bars, strict=True)):
        y = top + ROW * number + ROW // 2
        if len(row) > 1:
            pen.line((at(bar[0]), y, at(bar[2]), y), fill=MEAN, width=2)
            for end in (at(bar[0]), at(bar[2])):
                pen.line((end, y - 5, end, y + 5), fill=MEAN, width=2)
        for x in map(at, row):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=SEED)
        if bar:
            x = at(bar[len(bar) // 2])
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), outline=MEAN, width=2)


def _bar(values: Sequence[float]) -> tuple[float, ...]:
    """Mean less deviation, mean, mean and deviation; of one value itself, of none nothing."""
    mean, deviation = mean_and_deviation(values)
    return (mean - deviation, mean, mean + deviation) if len(values) > 1 else tuple(values)
