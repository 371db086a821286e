"""What `d3epth bench` shows of its measurements: tables in Markdown, and a chart of MACs."""

import statistics
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from d3epth_jax.tables import format_table

PARTS = {"encoder": (76, 114, 176), "unet": (221, 132, 82), "decoder": (85, 168, 104)}
PICTURES = {"stage2": 20_000 * 32, "stage1": 30_000 * 32}  # METHOD 7 and 8: steps of 32
NOTES = {
    "predict": "GMACs: multiply-accumulates of convolutions and products, taps on the padding"
    " included. Latency: median of whole calls of the pipeline, uint8 picture in, depth out."
    " MFU: 2 MACs / latency, of the best measured speed of a large matrix product in the same type;"
    " on a CPU large convolutions of one picture in float32 take 4/9 of these MACs, so that it may"
    " pass 100."
    " First call: with folding and compiling; compile: XLA's share of it; - where others were"
    " compiled at the same time (--ahead), or by an earlier version."
    " Peak: of an accelerator's allocator since the process began, reading and compiling included;"
    " on a CPU of the process since the model was read.",
    "train": "Batches lie on the device: no loading of data. MFU: forward and gradients, without"
    " what is recomputed, of a large matrix product's best measured speed. Hours: for the pictures"
    " of METHOD's 20k (stage 2) and 30k (stage 1) steps of 32. Compile: - where others were"
    " compiled at the same time (--ahead). Peak: - where only a larger batch's is known, which did"
    " not fit.",
    "compare": "Ratio: diffusers' time / ours, alternating runs, the same weights and threads;"
    " above 1 ours is faster. GiB: ours as above, theirs of predicting alone."
    " Difference: the largest between the two depth maps, in [0,1].",
    "pieces": "MACs without taps on the padding, by formula and by XLA's cost analysis of the"
    " lowered convolutions and products, one picture.",
}


def document(machine: dict, rows: list[dict]) -> str:
    """bench.md: which calls measured where, and what."""
    devices = sorted({row["device"] for row in rows if "device" in row})
    calls = {  # each with its last date
        (row["command"], row.get("code", "")): row["date"] for row in rows if "command" in row
    }
    lines = [f"{date}: `{command}` {code}".rstrip() for (command, code), date in calls.items()]
    lines.append(f"{machine['cpu']}, {machine['cores']} cores; device: {', '.join(devices)}")
    return "\n\n".join([*lines, markdown(rows)])


def markdown(rows: Iterable[dict]) -> str:
    """All tables there are rows for; each row is what measure.py made of one measurement."""
    rows = _with_peak(rows)
    predicted = _sorted(row for row in rows if "parts" in row)
    tables = [
        ("Prediction", "predict", PREDICT, [_prediction(row) for row in predicted]),
        ("Beside diffusers", "compare", COMPARE, [x for row in predicted for x in _beside(row)]),
        ("Training", "train", TRAIN, [x for row in rows for x in _training(row)]),
        ("Folding", "pieces", PIECES, [x for row in rows for x in _pieces(row)]),
    ]
    text = [
        f"### {title}\n\n{format_table(head, body)}\n\n{NOTES[kind]}\n"
        for title, kind, head, body in tables
        if body
    ]
    text += [f"{name(row)}: {row['error']}\n" for row in rows if "error" in row]
    return "\n".join(text)


def _with_peak(rows: Iterable[dict]) -> list[dict]:
    """Each row's matrix product as fast as its device ever was at it, in any of the rows.

    A product that other work slows down would flatter what is held against it.
    """
    rows, peak = list(rows), {}
    for row in rows:
        kind = row.get("device"), row.get("dtype")
        peak[kind] = max(peak.get(kind, 0), row.get("matmul", 0))
    return [row | {"matmul": peak[row.get("device"), row.get("dtype")]} for row in rows]


def _sorted(rows: Iterable[dict]) -> list[dict]:
    """Predictions by model, as they were asked for, then by batch, the unfolded one first."""
    rows = list(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    return sorted(rows, key=lambda row: (models.index(row["model"]), row["batch"], row["fold"]))


def name(row: dict) -> str:
    """A measurement in words."""
    height, width = row["size"]
    words = [row["what"], row["model"], f"{height}x{width}"]
    if row["what"] != "pieces":
        words += [f"batch {row['batch']}", _type(row)]
        words += [f"{row['micro']} at a time"] if row.get("micro") else []
    if row["what"] == "predict":
        words.append("folded" if row["fold"] else "not folded")
    if "remat" in row:
        words.append("rematerialised" if row["remat"] else "all activations kept")
    return " ".join(words)


PREDICT = (
    *("model", "size", "batch", "type", "folded", "params M"),
    *("GMACs enc", "UNet", "dec", "all", "compile s", "first call s", "latency ms", "enc ms"),
    *("UNet ms", "dec ms", "images/s", "MFU %", "peak GiB"),
)
COMPARE = ("model", "size", "batch", "variant", "ours ms", "theirs ms", "ratio", "encoder",
           "UNet", "decoder", "ours GiB", "theirs GiB", "difference", "depth's std")  # fmt: skip
TRAIN = ("step", "model", "size", "batch", "type", "remat", "trained M", "compile s", "s/step",
         "images/s", "MFU %", "peak GiB", "hours")  # fmt: skip
PIECES = ("piece", "model", "size", "params M", "after", "GMACs", "after", "saved", "by XLA")


def _prediction(row: dict) -> list[str]:
    seconds = statistics.median(row["seconds"])
    macs = [row["macs"][part] / row["batch"] / 1e9 for part in PARTS]
    parts = [
        f"{1e3 * statistics.median(times):.1f}" if times else "-"
        for times in (row["parts"].get(part) for part in PARTS)
    ]
    flops = 2 * sum(row["macs"].values()) / seconds
    return [
        row["model"], _size(row), str(row["batch"]), _type(row), "yes" if row["fold"] else "no",
        f"{sum(row['params'].values()) / 1e6:.2f}",
        *(_giga(x) for x in (*macs, sum(macs))),
        *(f"{row[key]:.1f}" if key in row else "-" for key in ("compile_s", "first_s")),
        f"{1e3 * seconds:.1f}", *parts,
        f"{row['batch'] / seconds:.3g}",
        f"{100 * flops / row['matmul']:.1f}" if row["matmul"] else "-",
        _gib(row["memory"]),
    ]  # fmt: skip


def _beside(row: dict) -> Iterable[list[str]]:
    for variant, found in row.get("compare", {}).items():
        ours, theirs = (statistics.median(found[who]["pipeline"]) for who in ("ours", "theirs"))
        parts = [
            statistics.median(found["theirs"][part]) / statistics.median(found["ours"][part])
            for part in PARTS
        ]
        yield [
            row["model"] + (" folded" if row["fold"] else ""), _size(row), str(row["batch"]),
            variant, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{theirs / ours:.2f}",
            *(f"{ratio:.2f}" for ratio in parts),
            _gib(row["memory"]), _gib(found["memory"]),
            f"{found['difference']:.1e}", f"{found['depth_std']:.3f}",
        ]  # fmt: skip


def _training(row: dict) -> Iterable[list[str]]:
    for found in row.get("results", ()):
        seconds = statistics.median(found["seconds"])
        count = found["micro"] * found["accumulate"]
        batch = f"{found['micro']}x{found['accumulate']}" if found["accumulate"] > 1 else str(count)
        yield [
            row["what"], row["model"], _size(row), batch, _type(row),
            "yes" if row["remat"] else "no",
            f"{row['trained'] / 1e6:.2f}",
            f"{found['compile_s']:.1f}" if "compile_s" in found else "-", f"{seconds:.3g}",
            f"{count / seconds:.3g}",
            f"{100 * 2 * found['macs'] / seconds / row['matmul']:.1f}",
            _gib(found["memory"]) if "memory" in found else "-",
            f"{seconds / count * PICTURES[row['what']] / 3600:.2f}",
        ]  # fmt: skip


def _pieces(row: dict) -> Iterable[list[str]]:
    for piece, found in row.get("pieces", {}).items():
        saved = [found[kind][0] - found[kind][1] for kind in ("macs", "xla")]
        params, macs = found["params"], found["macs"]
        yield [
            piece, row["model"], _size(row), *(f"{x / 1e6:.2f}" for x in params),
            *(_giga(x / 1e9) for x in (*macs, *saved)),
        ]  # fmt: skip


def _size(row: dict) -> str:
    return "x".join(map(str, row["size"]))


def _type(row: dict) -> str:
    """What is computed in, and by which attention where that is not the device's own."""
    return row["dtype"] + (", chunked" if row.get("attention") == "chunked" else "")


def _giga(x: float) -> str:
    return f"{x:.1f}" if x >= 10 else f"{x:.3g}"


def _gib(memory: dict) -> str:
    return f"{memory['bytes'] / 2**30:.2f}"


def macs_chart(rows: Iterable[dict]) -> Image.Image | None:
    """Bars of GMACs per picture by part, one for each model, size and folding; None: no rows."""
    bars = {}
    for row in _sorted(row for row in rows if "macs" in row):
        label = f"{row['model']}{' folded' if row['fold'] else ''}  {_size(row)}"
        bars[label] = [row["macs"][part] / row["batch"] / 1e9 for part in PARTS]
    if not bars:
        return None
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    left = 30 + int(max(font.getlength(label) for label in bars))
    width, high, top = 900, 40, 70
    image = Image.new("RGB", (left + width + 130, top + high * len(bars) + 20), "white")
    pen = ImageDraw.Draw(image)
    x = left
    for part, color in PARTS.items():
        pen.rectangle((x, 22, x + 18, 40), fill=color)
        pen.text((x + 26, 31), part if part != "unet" else "UNet", "black", font, anchor="lm")
        x += 140
    pen.text((x, 31), "GMACs per picture", "black", font, anchor="lm")
    scale = width / max(sum(parts) for parts in bars.values())
    for number, (label, parts) in enumerate(bars.items()):
        y = top + high * number
        pen.text((left - 12, y + 15), label, "black", font, anchor="rm")
        x = float(left)
        for macs, color in zip(parts, PARTS.values(), strict=True):
            end = x + macs * scale
            pen.rectangle((x, y, end, y + 30), fill=color)
            text = _giga(macs)
            if small.getlength(text) + 8 < end - x:
                pen.text(((x + end) / 2, y + 15), text, "white", small, anchor="mm")
            x = end
        pen.text((x + 8, y + 15), _giga(sum(parts)), "black", font, anchor="lm")
    return image
