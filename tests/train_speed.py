"""A training step against the same one in torch: `python -m tests.train_speed [ROUNDS] [--parts]`.

D^2epth's step (METHOD 8) at a quarter of its width, so a sixteenth of its work: frozen KL encoder,
UNet trained, frozen KL decoder with the gradient through it, SSI, clipping, AdamW, moving average
(tests/train_step.py). Torch runs diffusers' modules, contiguous and channels_last. Each way has a
process and two threads, or all of them and share one NVIDIA GPU; they take turns of two runs,
because the first after a pause may have to fetch its memory back. What is compared is the least
time of each, to which other work on the machine adds little. `--parts` also compares the networks
one by one.
"""

import contextlib
import json
import os
import shutil
import sys

from d3epth_jax.bench.cli import when
from d3epth_jax.bench.worker import Worker

WANTED = {"cpu": 0.8, "gpu": 1.0}  # torch's time / ours
WAYS = ("ours", "torch", "torch, channels_last")


def main(rounds: int = 5, parts: bool = False) -> dict:
    """Prints seconds and ratios torch / ours, of the faster of torch's layouts.

    Returns {name: {"seconds" of each way, "ratio"}}, the device, and the `wanted` ratio of a step.
    """
    found = {}
    # Tests set flags under which programs are not optimised.
    env = {"XLA_FLAGS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        if not shutil.which("nvidia-smi"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # the workers inherit it
        workers = {way: stack.enter_context(Worker("tests.train_step", env)) for way in WAYS}
        opened = {way: each.ask("open", way=way, parts=parts) for way, each in workers.items()}
        devices = {way: each["device"] for way, each in opened.items()}
        if len(set(devices.values())) > 1:
            raise RuntimeError(f"not all compute on the same kind of device: {devices}")
        names = opened["ours"]["names"]
        for name in names:
            for worker in workers.values():
                worker.ask("run", name=name)  # compiles
            runs = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, worker in workers.items():
                    runs[way] += [worker.ask("run", name=name) for _ in range(2)]
            seconds, processor = (
                {way: min(run[clock] for run in runs[way]) for way in WAYS}
                for clock in ("wall", "processor")
            )
            found[name] = {"seconds": seconds, "ratio": ratio(seconds)}
            told = ", ".join(f"{way} {time:.3g} s" for way, time in seconds.items())
            print(
                f"{name:18} {told}: torch / ours {ratio(seconds):.2f}"
                f" (by processor time {ratio(processor):.2f})",
                file=sys.stderr,
                flush=True,
            )
    device = devices["ours"]
    print(f"wanted of the step on a {device}: {WANTED[device]}", file=sys.stderr)
    return found | {"device": device, "wanted": WANTED[device]}


def ratio(seconds: dict[str, float]) -> float:
    return min(seconds["torch"], seconds["torch, channels_last"]) / seconds["ours"]


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--parts"]
    found = main(*map(int, arguments), parts="--parts" in sys.argv)
    print(json.dumps(found | when("python -m tests.train_speed")))
