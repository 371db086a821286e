"""Compiled programs kept on disk between runs, by JAX's persistent cache."""

import contextlib
import logging
import os
import pathlib

import jax

from d3epth_jax.user_cache import user_cache

log = logging.getLogger(__name__)

MOST = 2 * 1024**3  # bytes of programs; the quickstart's are 0.03 GiB


def use_compilation_cache() -> None:
    """Keeps what is compiled from now on, in a folder of the user's own; for command lines.

    The folder is d3epth_jax/xla in $XDG_CACHE_HOME, by default ~/.cache. JAX's own settings come
    first: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    switches it off. Where the folder cannot be written all goes on without, and a line says so.
    Above `MOST` bytes, the programs that were not used for the longest time are deleted from it.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    # Also the many small ones: on a CPU the smallest model's take a second all together.
    for threshold, least in (("min_compile_time_secs", 0.0), ("min_entry_size_bytes", 0)):
        name = f"jax_persistent_cache_{threshold}"
        if name.upper() not in os.environ:
            jax.config.update(name, least)
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = user_cache("xla")
        # Programs in it are run: nobody else may write there.
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
        with contextlib.suppress(FileNotFoundError):  # another process does so now
            prune(folder, MOST)
    except OSError as error:
        log.info("compiled programs are not kept for the next run: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def prune(folder: pathlib.Path, most: int) -> None:
    """Deletes the files that were not read for the longest time, until `most` bytes are left.

    JAX's own limit (jax_compilation_cache_max_size) looks at every file before each it writes.
    """
    files = [entry for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    for file in sorted(files, key=lambda file: file.stat().st_atime, reverse=True):
        most -= file.stat().st_size
        if most < 0:
            pathlib.Path(file).unlink(missing_ok=True)
