"""Compiled programs kept on disk between runs, by JAX's persistent cache."""

import logging
import os
import pathlib

import jax

log = logging.getLogger(__name__)


def use_compilation_cache() -> None:
    """Keeps what is compiled from now on, in a folder of the user's own; for command lines.

    The folder is d3epth_jax/xla in $XDG_CACHE_HOME, by default ~/.cache. JAX's own settings come
    first: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    switches it off. Where the folder cannot be written all goes on without, and a line says so.
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
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(home) / "d3epth_jax" / "xla"
        # Programs in it are run: nobody else may write there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        log.info("compiled programs are not kept for the next run: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
