"""Where arrays live: a ("data", "fsdp") mesh, and rules on shapes."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))


def use_cpu_cores(count: int) -> None:
    """Shows `count` CPU cores to JAX as devices; call it before anything else touches JAX.

    XLA's own threads share out one small convolution badly; a sharded batch uses the cores better
    (2 cores, small UNet: 1.3 to 1.5 times the speed). On a machine with an accelerator this changes
    nothing: JAX uses the accelerator.
    """
    if count < 1:
        raise ValueError(f"cpu_devices must be at least 1, not {count}")
    # A device that waits for the others in an all-reduce blocks one thread of XLA's pool, by
    # default one per core: with none to spare a busy machine can come to a standstill.
    os.environ.setdefault("PJRT_NPROC", str(2 * count))
    flags = os.environ.get("XLA_FLAGS", "")
    if count > 1 and "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    jax.config.update("jax_num_cpu_devices", count)


def require_devices() -> None:
    """Raises ValueError, in words, where JAX cannot use the devices that it is to use."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # of a plugin that is absent it says nothing
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX has no device{f' for JAX_PLATFORMS={asked}' if asked else ''}: install '.[cuda]'"
            f" or '.[tpu]', or unset JAX_PLATFORMS. {error}".strip()
        ) from error


def make_mesh(fsdp: int = 1, devices=None) -> Mesh:
    """All devices as ("data", "fsdp"); `fsdp` devices share one copy of the parameters."""
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp={fsdp} does not divide the {len(devices)} devices there are")
    grid = np.asarray(devices).reshape(-1, fsdp)
    # Auto written out: the default is Explicit, where Linen's Conv fails.
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def params_sharding(tree, mesh: Mesh, *, min_size: int = 2**16):
    """The sharding of every array of a tree, parameters and optimiser state by the same rule.

    The largest dimension that the fsdp axis divides is sharded; arrays below `min_size` elements
    stay replicated.
    """
    size = mesh.shape["fsdp"]

    def rule(x):
        dims = sorted(
            (d for d in range(x.ndim) if x.shape[d] % size == 0), key=lambda d: -x.shape[d]
        )
        if size == 1 or x.size < min_size or not dims:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * dims[0], "fsdp"))

    return jax.tree.map(rule, tree)


def put_params(tree, mesh: Mesh, dtype=None):
    """Places a tree by `params_sharding`, its floating-point arrays as `dtype` if that is given.

    A few threads copy, since tensors mapped from a file are transposed as they are read. Of several
    processes each places its devices' part of the same tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    shardings = jax.tree.leaves(params_sharding(tree, mesh))

    def put(leaf, sharding):
        # Cast one by one: the whole tree in two types would not fit where one does.
        if dtype is not None and leaf.dtype != dtype and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    with ThreadPoolExecutor(4) as pool:
        return structure.unflatten(pool.map(put, leaves, shardings))


def put_batch(batch, mesh: Mesh):
    """This process's part of a batch, an array or a tree of them, split over all devices."""
    sharding = NamedSharding(mesh, BATCH)

    def put(x):
        if isinstance(x, jax.Array) and len(x.sharding.device_set) == mesh.size:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put, batch)
