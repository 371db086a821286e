"""Metrics of a run: metrics.jsonl, TensorBoard where it is installed, pictures as PNG."""

import importlib.util
import json
import logging
import math
import pathlib

import numpy as np

from d3epth_jax import atomic, hosts
from d3epth_jax import image as image_lib

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes to `<workdir>/metrics.jsonl`, `<workdir>/pictures` and `<workdir>/tensorboard`.

    A resumed run continues its file: lines after `start_step` are dropped, since they are about to
    be written again. Of several processes only the first one writes.
    """

    def __init__(self, workdir: pathlib.Path, *, start_step: int = 0):
        self._file = self._tensorboard = None
        if not hosts.is_first():
            return
        self._pictures = workdir / "pictures"
        self._pictures.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start_step]
        atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1, write_to_disk=True
            )
        else:
            log.info("TensorBoard is off: pip install 'd3epth-jax[tensorboard]' turns it on")

    def scalars(self, step: int, values: dict[str, float], *, prefix: str = "train") -> None:
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        # JSON has no NaN; a metric without a value is null.
        row = {name: value if math.isfinite(value) else None for name, value in named.items()}
        log.info("step %d: %s", step, ", ".join(f"{n} {v:.4g}" for n, v in values.items()))
        if self._file:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        if self._tensorboard:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture uint8 [H,W,3]."""
        if self._file:
            image_lib.save_png(self._pictures / f"{name}_{step:07d}.png", picture)
        if self._tensorboard:
            self._tensorboard.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics.jsonl, [] where there is none; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
