"""What is measured runs in a process of its own: one JSON line asks, one answers.

So memory is that of one model, a failure takes nothing else with it, and torch can be measured
beside JAX in the same way.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping

import numpy as np


class WorkerError(RuntimeError):
    """What the worker was asked for failed; its message says why, in one line."""


class Worker:
    """A process `python -m MODULE` that answers as `serve` does; a context manager."""

    def __init__(self, module: str, env: Mapping[str, str] | None = None):
        self._module, self._errors = module, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # Ctrl-C is for the process that asks
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        """Ends the process; what it computes is lost."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, do: str, **request) -> dict:
        """The answer to a request. Raises WorkerError."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):  # it may have died in the middle of one
            raise WorkerError(self._end())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        last = lines[-1] if lines else ""
        killed = " (killed, most likely for want of memory)" if code == -9 else ""
        return f"the process {self._module} ended with code {code}{killed} {last}".strip()


def serve(handlers: Mapping[str, Callable[..., dict]]) -> None:
    """Answers requests {"do": name, ...} on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except Exception as error:  # whatever it is, the one who asked is told
            text = " ".join(str(error).split())
            kind = type(error).__name__
            answer = {"error": f"{kind}: {text[:600]}" if text else kind}
        print(json.dumps(answer), file=answers, flush=True)


def random_picture(size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3], the same for everyone who asks."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


def cores() -> int:
    """CPU cores this process may use: what `taskset` leaves."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    """The host in words and numbers."""
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    except OSError:
        pass
    return {"cpu": name, "cores": cores(), "system": platform.platform()}
