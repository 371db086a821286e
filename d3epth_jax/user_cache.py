"""Where this user's own files that can be made again are kept."""

import os
import pathlib


def user_cache(content: str) -> pathlib.Path:
    """The folder of one kind of content: d3epth_jax/CONTENT in $XDG_CACHE_HOME or ~/.cache.

    It need not exist yet. Raises FileNotFoundError if the user has no home.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home, nor XDG_CACHE_HOME") from error
    return pathlib.Path(home) / "d3epth_jax" / content
