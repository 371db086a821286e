"""Several processes that train one model: each feeds its own devices, the first one writes.

All run the same program in step, so whatever decides what is computed next must be the same in all
of them. They share the workdir, as Orbax's checkpoints need too.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from d3epth_jax import sharding


def join(where: str) -> None:
    """Makes this process one of several; call it before anything else touches JAX's devices.

    where: "auto" on a TPU pod, under Slurm, Open MPI or Kubernetes, where JAX finds the others;
    else "ADDRESS:PORT,COUNT,INDEX", the address being that of process 0. ValueError for others.
    """
    if where == "auto":
        jax.distributed.initialize()
        return
    address, *numbers = where.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(f"--distributed is auto, or ADDRESS:PORT,COUNT,INDEX, not {where!r}")
    count, index = map(int, numbers)
    if index >= count:
        raise ValueError(f"--distributed={where}: INDEX counts from 0, and is less than COUNT")
    jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def require_one(job: str) -> None:
    """Raises ValueError where there are several: the job would be done by each."""
    if (count := jax.process_count()) > 1:
        raise ValueError(f"the job {job!r} runs in one process, not in {count}")


def local_mesh(mesh: Mesh) -> Mesh:
    """The mesh, or of several processes this one's devices alone."""
    return mesh if jax.process_count() == 1 else sharding.make_mesh(devices=jax.local_devices())


def gathered(tree, mesh: Mesh):
    """The tree with whole arrays in each process: itself, or copies in the hosts' memory."""
    if jax.process_count() == 1:
        return tree

    everywhere = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), everywhere)


def meet(place: str) -> None:
    """Waits until all processes are there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)
