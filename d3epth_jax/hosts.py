"""Several processes that train one model: each feeds its own devices, the first one writes.

All run the same program in step, so whatever decides what is computed next must be the same in all
of them. They share the workdir, as Orbax's checkpoints need too.
"""

import contextlib
import itertools
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from d3epth_jax import sharding

log = logging.getLogger(__name__)

# Seconds that a process which failed waits for the others at its end, before it ends them.
PATIENCE = 30
_asked = itertools.count()  # rises through all jobs of a process, as JAX needs


def join(where: str) -> None:
    """Makes this process one of several; call it before anything else touches JAX's devices.

    where: "auto" on a TPU pod, under Slurm, Open MPI or Kubernetes, where JAX finds the others;
    else "ADDRESS:PORT,COUNT,INDEX", the address being that of process 0. ValueError for others.
    """
    if where == "auto":
        jax.distributed.initialize(shutdown_timeout_seconds=PATIENCE)
        return
    address, *numbers = where.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(f"--distributed is auto, or ADDRESS:PORT,COUNT,INDEX, not {where!r}")
    count, index = map(int, numbers)
    if index >= count:
        raise ValueError(f"--distributed={where}: INDEX counts from 0, and is less than COUNT")
    jax.distributed.initialize(
        address,
        count,
        index,
        cluster_detection_method="deactivate",
        shutdown_timeout_seconds=PATIENCE,
    )


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], object]) -> None:
    """Calls it in the first process while the others wait; what it refuses, all refuse.

    ValueError in all for a ValueError or OSError in the first; else they would wait for ever.
    """
    if jax.process_count() == 1:
        function()
        return
    refusal = b""
    if is_first():
        try:
            function()
        except (ValueError, OSError) as error:
            refusal = str(error).encode() or type(error).__name__.encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(refusal))))
    if length:
        text = np.frombuffer(refusal.ljust(length, b" ")[:length], np.uint8)
        raise ValueError(bytes(multihost_utils.broadcast_one_to_all(text)).decode())


def require_one(job: str) -> None:
    """Raises ValueError where there are several: each would do the whole job."""
    if (count := jax.process_count()) > 1:
        raise ValueError(f"the job {job!r} runs in one process, not in {count}")


@contextlib.contextmanager
def asked_to_end() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or SIGINT came; a second one interrupts at once.

    Only in the main thread, which alone gets signals. Several processes are all told at one and the
    same call, of SIGTERM alone.
    """
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))
        return
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)
        log.warning("ending after this step, with a checkpoint; once more: at once")

    alone = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if alone else ()
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:  # after the last step, and nothing was lost
        raise KeyboardInterrupt("the training had ended, and is saved")


def local_mesh(mesh: Mesh) -> Mesh:
    """The mesh, or of several processes this one's devices, which share parameters as they can."""
    if jax.process_count() == 1:
        return mesh
    devices = jax.local_devices()
    return sharding.make_mesh(math.gcd(mesh.shape["fsdp"], len(devices)), devices)


def gathered(tree):
    """The tree with whole arrays in each process: itself, or copies in the hosts' memory."""
    if jax.process_count() == 1:
        return tree

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))  # one array at a time

    return jax.tree.map(whole, tree)


def meet(place: str) -> None:
    """Waits until all processes are there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)
